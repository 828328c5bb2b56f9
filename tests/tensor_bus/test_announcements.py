"""What senders announced, alone: when it is complete, as which version it is taken, and who is told what of it."""

from __future__ import annotations

import pytest

from etha_ray.errors import VersionMismatchError
from etha_ray.tensor_bus.announcements import Announcements
from etha_ray.tensor_bus.messages import DataReady, DataRefused, DataTaken
from etha_ray.tensor_bus.versions import Holding
from tests.tensor_bus.ends import End


def ready(source: str, version: int, *, chosen: bool = False, send: str = "") -> DataReady:
    return DataReady(batch_id="x", source=source, target="target", sequence=7, version=version, chosen=chosen, send=send)


@pytest.fixture
def target() -> End:
    end = End("target", sources={"one": False, "two": False})
    end.register()
    return end


def test_it_is_complete_once_every_sender_has_announced(target: End) -> None:
    announced = Announcements(target.batch)
    announced.add(ready("one", 4))
    assert not announced.complete
    announced.add(ready("two", 4))
    assert announced.complete
    assert announced.agreed() == 4
    assert target.said() == []


def test_one_that_is_behind_is_told_alone_and_those_that_chose_apart_all_are(target: End) -> None:
    announced = Announcements(target.batch)
    announced.add(ready("one", 2))
    announced.add(ready("two", 5))
    assert announced.agreed() is None
    assert list(announced) == ["two"]
    (told,) = target.said()
    assert isinstance(told, DataRefused)
    assert (told.source, told.sequence, told.count) == ("one", 7, 5)
    for source, version in (("one", 8), ("two", 9)):
        announced.add(ready(source, version, chosen=True))
    with pytest.raises(VersionMismatchError, match="do not send the same version"):
        announced.agreed()
    assert not announced
    assert {message.source for message in target.said() if isinstance(message, DataRefused)} == {"one", "two"}


def test_what_was_taken_before_is_passed_over(target: End) -> None:
    announced = Announcements(target.batch)
    target.batch.holding = Holding(version=3, last=3, taken=("this send",))
    announced.add(ready("one", 3, send="this send"))
    announced.add(ready("two", 4, send="another"))
    assert list(announced) == ["two"]
    (told,) = target.said()
    assert isinstance(told, DataTaken)
    assert (told.source, told.version) == ("one", 3)
