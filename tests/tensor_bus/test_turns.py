"""Transfers that come while one that was given up cannot be ended: each begins in its turn, or ends with an error, whatever happens."""

from __future__ import annotations

import time

import pytest

from etha_ray.config import SUCCESSION_TIMEOUT
from etha_ray.errors import BatchClosedError, PeerLostError, TransferInProgressError, TransferTimeoutError
from etha_ray.tensor_bus.messages import DataRead, RegistrationClosed
from etha_ray.tensor_bus.semaphores import generate_semaphore_name, open_semaphore, unlink_quietly
from etha_ray.tensor_bus.transfer_state import TransferState
from tests.tensor_bus.ends import End, ends, peer


@pytest.fixture
def both() -> tuple[End, End]:
    """A sender whose send is being read on this host, by a receive that its worker has given up."""
    source, target = ends(remote=False)
    source.start("send")
    number = target.start("recv")
    target.hears(*source.said())
    target.batch.give_up(number)
    assert target.state is TransferState.MOVING
    return source, target


def over(source: End, target: End) -> None:
    """The copy that was given up ends."""
    target.bus.copied()
    assert target.outcome().version == 1
    source.hears(*target.said())
    assert source.outcome().version == 1


def test_the_next_one_begins_after_what_stands_in_the_queue(both: tuple[End, End]) -> None:
    source, target = both
    target.start("recv")
    over(source, target)
    assert target.state is None
    target.bus.called()
    assert target.state is TransferState.WAITING


def test_one_that_is_given_up_before_its_turn_is_never_begun(both: tuple[End, End]) -> None:
    """Also if the turn has come already, and its worker's word with it."""
    source, target = both
    number = target.start("recv")
    over(source, target)
    target.batch.give_up(number)
    target.bus.called()
    assert target.state is None


def test_one_whose_worker_could_not_say_so_is_passed_over(both: tuple[End, End]) -> None:
    source, target = both
    name = generate_semaphore_name("transfer", "batch")
    semaphore = open_semaphore(name, create=True)
    target.start("recv", blocking=True, semaphore_name=name)
    last = target.start("recv")
    unlink_quietly(name)
    semaphore.close()
    over(source, target)
    target.bus.called()
    assert target.batch.transfer is not None
    assert target.batch.transfer.command.command_id == last


def test_they_take_turns(both: tuple[End, End]) -> None:
    source, target = both
    numbers = [target.start("recv") for _ in range(2)]
    over(source, target)
    numbers.append(target.start("recv"))  # it comes when nothing is under way, and others wait
    for version, number in enumerate(numbers, start=2):
        target.bus.called()
        assert target.batch.transfer is not None
        assert target.batch.transfer.command.command_id == number
        source.start("send")
        target.hears(*source.said())
        target.bus.copied()
        assert target.outcome().version == version
        source.hears(*target.said())
        assert source.outcome().version == version


def test_its_time_is_what_its_worker_gave_it(both: tuple[End, End]) -> None:
    source, target = both
    target.start("recv", timeout=60.0)
    assert target.batch.deadline is not None
    target.batch.expire(target.batch.deadline)
    error = target.outcome()
    assert isinstance(error, TransferTimeoutError)
    assert "an earlier call, which was given up, or one that waits for it, was still under way; that has not" in str(error)
    assert str(error).endswith("changed within 60 s")
    before = time.monotonic()
    target.start("recv", timeout=60.0)
    asked = time.monotonic()
    over(source, target)
    target.bus.called()
    assert target.batch.transfer is not None
    assert before + 60.0 <= (target.batch.transfer.deadline or 0.0) <= asked + 60.0


def test_who_waits_hears_that_the_batch_is_closed() -> None:
    """Also where the one that was given up ends by that."""
    source, target = ends()
    source.start("send")
    number = target.start("recv", atomic=True)
    target.hears(*source.said())
    target.batch.give_up(number)
    target.start("recv")
    target.bus.copied()
    assert target.state is TransferState.ASKING
    target.batch.close(BatchClosedError("it was closed"), lost=False, then=lambda: None)
    assert [type(outcome) for outcome in target.bus.outcomes] == [BatchClosedError] * 2
    target.bus.called()
    assert target.batch.transfer is None


def test_one_whose_time_is_up_when_its_turn_comes_is_not_begun(both: tuple[End, End]) -> None:
    source, target = both
    target.start("recv", timeout=0.0)
    over(source, target)
    target.bus.called()
    assert isinstance(target.outcome(), TransferTimeoutError)
    assert target.state is None


def test_what_is_lost_when_its_turn_comes_is_waited_for_from_then_on(both: tuple[End, End]) -> None:
    source, target = both
    target.start("recv", timeout=10 * SUCCESSION_TIMEOUT)
    over(source, target)
    target.hears(RegistrationClosed("batch", "source", "target", "its agent died", lost=True, returns="soon"))
    before = time.monotonic()
    target.bus.called()
    assert target.batch.transfer is not None
    assert (target.batch.transfer.deadline or 0.0) >= before + SUCCESSION_TIMEOUT


def test_one_that_cannot_begin_is_told_so_and_the_next_one_too(both: tuple[End, End]) -> None:
    source, target = both
    for _ in range(2):
        target.start("recv")
    over(source, target)
    target.hears(RegistrationClosed("batch", "source", "target", "it left", lost=True, returns="no"))
    for _ in range(2):
        target.bus.called()
        assert isinstance(target.outcome(), PeerLostError)


@pytest.mark.parametrize("blocking", [False, True])
def test_beside_one_that_is_waited_for_it_is_an_error(blocking: bool) -> None:
    """One that does not block is waited for, as far as its agent can know, though nobody may look at what it came to."""
    _, target = ends(remote=False)
    name = generate_semaphore_name("transfer", "batch")
    if blocking:
        semaphore = open_semaphore(name, create=True)
    target.start("recv", blocking=blocking, semaphore_name=name)
    with pytest.raises(TransferInProgressError, match="a recv is under way; wait for it before the next send"):
        target.start("send")
    if blocking:
        unlink_quietly(name)
        semaphore.close()
        target.start("recv")
        assert target.outcome() is not None, "it is cancelled"
        target.bus.called()
        assert target.state is TransferState.WAITING


class TestHurry:
    """Which transfers end when those that they wait for are known to have gone for good."""

    def test_one_that_waits_for_them(self) -> None:
        source, target = ends()
        target.start("recv")
        target.hears(RegistrationClosed("batch", "source", "target", "its agent died", lost=True, returns="soon"))
        assert target.state is TransferState.BLOCKED
        target.batch.hurry(only_if_lost=True)
        target.batch.expire(time.monotonic())
        assert isinstance(target.outcome(), PeerLostError)
        source.start("send")
        source.hears(RegistrationClosed("batch", "target", "source", "its agent died", lost=True, returns="soon"))
        source.batch.hurry(only_if_lost=True)
        source.batch.expire(time.monotonic())
        assert isinstance(source.outcome(), PeerLostError)

    def test_none_that_can_do_without_them(self) -> None:
        """It is held up by its worker's GPU, and who has gone is another sender, which had sent its part."""
        source, _ = ends()
        source.registered.others["sibling"] = peer("sibling", remote=True)
        source.start("send", mark=b"mark")
        source.hears(RegistrationClosed("batch", "sibling", "source", "it left", lost=False, returns="perhaps", completed=1))
        assert source.state is TransferState.BLOCKED
        assert source.batch.losing.can_do_without("send")
        source.batch.hurry(only_if_lost=True)
        source.batch.expire(time.monotonic())
        assert source.outcome() is None

    def test_none_that_has_all_whom_it_needs(self) -> None:
        source, target = ends()
        source.start("send")
        target.start("recv")
        for end in (source, target):
            end.batch.hurry(only_if_lost=True)
            end.batch.expire(time.monotonic())
            assert end.outcome() is None
        assert (source.state, target.state) == (TransferState.ANNOUNCED, TransferState.WAITING)
        target.hears(*source.said())
        target.bus.copied()
        assert [type(message) for message in target.said()] == [DataRead]
