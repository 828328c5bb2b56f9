"""The state machines of a batch, with messages between agents in every order that a network can bring them in."""

from __future__ import annotations

import threading
import time

import pytest

from etha_ray.config import SUCCESSION_TIMEOUT
from etha_ray.errors import (
    BatchClosedError,
    BatchTornError,
    BatchUnmatchedError,
    PeerLostError,
    TransferCancelledError,
    TransferTimeoutError,
)
from etha_ray.tensor_bus.bus import BatchState
from etha_ray.tensor_bus.jobs import Job
from etha_ray.tensor_bus.messages import DataRead, DataReady, DataRevoked, DataStands, DataTaken, RegistrationClosed
from etha_ray.tensor_bus.registered import Registered
from etha_ray.tensor_bus.transfer_state import TransferState
from tests.tensor_bus.ends import End, ends, peer


def test_a_copy_on_this_host_needs_no_more_than_two_messages() -> None:
    source, target = ends(remote=False)
    source.start("send")
    target.start("recv")
    target.hears(*source.said())
    target.bus.copied()
    assert target.outcome().bytes == 8
    (taken,) = target.said()
    assert isinstance(taken, DataTaken)
    source.hears(taken)
    assert source.outcome().bytes == 8


def test_what_is_read_from_another_host_is_over_once_its_sender_says_that_it_stood() -> None:
    source, target = ends()
    source.start("send")
    target.start("recv", timeout=0.0)
    target.hears(*source.said())
    target.bus.copied()
    target.batch.expire(time.monotonic())  # its own time does not count any more: the data is here
    assert target.outcome() is None
    source.hears(*target.said())
    assert source.outcome() is None
    target.hears(*source.said())
    assert target.outcome().bytes == 8
    source.hears(*target.said())
    assert source.outcome().bytes == 8


def test_a_sender_that_lives_and_never_answers_is_not_waited_for_for_ever() -> None:
    source, target = ends()
    source.start("send")
    target.start("recv")
    target.hears(*source.said())
    target.bus.copied()
    asked = target.said()
    assert target.batch.deadline is not None
    target.batch.expire(target.batch.deadline)
    error = target.outcome()
    assert isinstance(error, BatchTornError)
    assert "source[0] did not say whether" in str(error)
    source.hears(*asked)
    target.hears(*source.said())  # too late, and told to nobody
    target.start("recv")
    target.bus.copied()
    source.hears(*target.said())
    target.hears(*source.said())
    assert target.outcome().bytes == 8
    source.hears(*target.said())
    assert source.outcome().bytes == 8


@pytest.mark.parametrize("again", [False, True], ids=["given up", "given up and sent again"])
@pytest.mark.parametrize("arrives", ["before", "after"])
def test_a_sender_that_gives_up_while_its_data_is_read_tears_it_however_late_that_is_heard(arrives: str, again: bool) -> None:
    source, target = ends()
    source.start("send")
    target.start("recv")
    target.hears(*source.said())
    source.batch.cancel(TransferTimeoutError("time is up"))  # its worker may write from now on
    assert isinstance(source.outcome(), TransferTimeoutError)
    if again:
        source.start("send")
    on_its_way = source.said()
    if arrives == "before":
        target.hears(*on_its_way)
        target.bus.copied()
    else:
        target.bus.copied()
        assert target.outcome() is None
        asked = target.said()
        target.hears(*on_its_way)
        source.hears(*asked)
        target.hears(*source.said())
    assert isinstance(target.outcome(), BatchTornError)
    assert not any(isinstance(message, DataTaken) for message in target.said())
    target.start("recv")
    assert bool(target.bus.moves) == again
    if again:
        target.bus.copied()
        source.hears(*target.said())
        target.hears(*source.said())
        source.hears(*target.said())
        assert target.outcome().bytes == source.outcome().bytes == 8


@pytest.mark.parametrize("how", ["closed", "lost"])
def test_a_sender_that_goes_before_it_has_said_that_its_data_stood(how: str) -> None:
    source, target = ends()
    source.start("send")
    target.start("recv")
    target.hears(*source.said())
    target.bus.copied()
    if how == "closed":
        source.batch.close(PeerLostError("its worker died"), lost=True, then=lambda: None)
        target.hears(*source.said())
    else:
        target.batch.lose_agent("agent of source", "the cable was cut")
    assert isinstance(target.outcome(), BatchTornError)
    assert target.batch.state is BatchState.LOST


def test_no_sender_is_done_before_all_have_said_that_their_data_stood() -> None:
    target = End("target", sources={"near": False, "far": True, "farther": True})
    target.register()
    target.start("recv")
    for source in ("near", "far", "farther"):
        target.hears(DataReady(batch_id="batch", source=source, target="target", sequence=1, version=5, chosen=True))
    target.bus.copied()
    assert {message.source for message in target.said() if isinstance(message, DataRead)} == {"far", "farther"}
    target.hears(DataStands(batch_id="batch", source="far", target="target", sequence=1, question=1))
    assert target.said() == []
    target.hears(DataRevoked(batch_id="batch", source="farther", target="target", sequence=1))
    assert isinstance(target.outcome(), BatchTornError)
    assert target.said() == []
    target.start("recv")
    target.hears(DataReady(batch_id="batch", source="farther", target="target", sequence=2, version=5, chosen=True))
    target.bus.copied()
    for source, sequence in (("farther", 2), ("far", 1)):
        target.hears(DataStands(batch_id="batch", source=source, target="target", sequence=sequence, question=2))
    taken = [message for message in target.said() if isinstance(message, DataTaken)]
    assert {(message.source, message.sequence) for message in taken} == {("near", 1), ("far", 1), ("farther", 2)}
    assert target.outcome().bytes == 24


@pytest.mark.parametrize("sends_again", [False, True])
def test_a_sender_that_gives_up_after_its_data_was_read_spoils_nothing(sends_again: bool) -> None:
    target = End("target", sources={"near": False, "far": True})
    target.register()
    target.start("recv")
    for source in ("near", "far"):
        target.hears(DataReady(batch_id="batch", source=source, target="target", sequence=1, version=1, send=f"{source} 1"))
    target.bus.copied()
    target.hears(DataRevoked(batch_id="batch", source="near", target="target", sequence=1))
    if sends_again:
        target.hears(DataReady(batch_id="batch", source="near", target="target", sequence=2, version=2, send="next"))
    target.hears(DataStands(batch_id="batch", source="far", target="target", sequence=1, question=1))
    assert target.outcome().version == 1
    taken = [message for message in target.said() if isinstance(message, DataTaken)]
    assert {(message.source, message.sequence) for message in taken} == {("near", 1), ("far", 1)}
    target.start("recv")
    target.hears(DataReady(batch_id="batch", source="far", target="target", sequence=2, version=2, send="next"))
    assert bool(target.bus.moves) == sends_again


def test_a_second_loss_ends_the_transfer_that_the_first_one_did_not_concern() -> None:
    source = End("source", targets={"target": True})
    source.register()
    source.batch.registered.others["other"] = peer("other", remote=True)
    source.start("send")
    source.batch.lose_agent("agent of other", "it died")
    assert source.outcome() is None
    source.batch.lose_agent("agent of target", "it died too")
    assert isinstance(source.outcome(), PeerLostError)


def test_an_agent_lost_before_the_end_of_the_registration_is_lost_after() -> None:
    target = End("target", sources={"source": True})
    target.batch.lose_agent("agent of source", "the cable was cut")
    target.start("recv")
    target.register()
    assert isinstance(target.outcome(), PeerLostError)
    assert target.batch.state is BatchState.LOST


def test_a_send_that_waits_for_one_that_was_lost_is_taken_back_when_it_is_given_up() -> None:
    """The lost one may only have stood still, and the other one may be about to read: neither must read what changes from now on."""
    source = End("source", targets={"lost": False, "slow": False})
    source.register()
    source.start("send")
    assert {type(message) for message in source.said()} == {DataReady}
    source.hears(RegistrationClosed(batch_id="batch", closed="lost", target="source", reason="it stands still", lost=True, returns="soon"))
    assert source.said() == []
    source.batch.cancel(TransferCancelledError("its worker gave up waiting"))
    told = source.said()
    assert {type(message) for message in told} == {DataRevoked}
    assert {message.target for message in told if isinstance(message, DataRevoked)} == {"lost", "slow"}
    assert isinstance(source.outcome(), TransferCancelledError)


def test_closing_waits_for_a_copy_and_not_for_an_answer() -> None:
    source, target = ends()
    source.start("send")
    target.start("recv")
    target.hears(*source.said())
    closed = threading.Event()
    target.bus.copied()
    target.batch.close(PeerLostError("closed"), lost=False, then=closed.set)
    assert closed.is_set()
    assert isinstance(target.outcome(), PeerLostError)


def test_who_goes_away_says_what_it_saw_all_agree_to() -> None:
    """One that is ready tells the set; one that never was, and only may be taken for ready, tells none."""
    first, _ = ends(remote=False)
    first.batch.close(BatchClosedError("closed"), lost=False, then=lambda: None)
    (told,) = first.said()
    assert isinstance(told, RegistrationClosed)
    assert told.agreed == ("set",)
    again = End("target", sources={"source": False})
    again.hears(told)
    assert again.batch.work.confirmed == ["set"]
    unready = End("source", targets={"target": False})
    unready.batch.work.agreed_with = unready.batch.registered.others | {"target": peer("target", remote=False)}
    job: Job[Registered] = Job()
    job.error = BatchUnmatchedError("its time is up")
    unready.batch.registration_over(job, time.monotonic())
    (told,) = unready.said()
    assert isinstance(told, RegistrationClosed)
    assert told.agreed == ()
    assert told.lost


@pytest.mark.parametrize("direction", ["send", "recv"])
@pytest.mark.parametrize("under_way", [True, False], ids=["under way", "begun after"])
def test_one_that_is_to_be_started_again_is_waited_for_only_so_long(direction: str, under_way: bool) -> None:
    """Its node may be gone for good, and nobody tells."""
    end, other = ends() if direction == "send" else ends()[::-1]
    gone = RegistrationClosed("batch", other.batch.registration, end.batch.registration, "its agent died", lost=True, returns="soon")
    if under_way:
        end.start(direction)
        end.hears(gone)
    else:
        end.hears(gone)
        end.start(direction)
    assert end.state is TransferState.BLOCKED
    deadline = end.batch.deadline
    assert deadline is not None
    assert deadline <= time.monotonic() + SUCCESSION_TIMEOUT
    end.batch.expire(deadline - 0.01)
    assert end.outcome() is None
    end.batch.expire(deadline)
    error = end.outcome()
    assert isinstance(error, PeerLostError)
    assert f"{other.batch.registration}[0] is gone (its agent died)" in str(error)
    assert "they were not back within" in str(error)


@pytest.mark.parametrize("timeout", [None, 300.0])
def test_once_they_are_back_a_transfer_has_its_own_time_again(timeout: float | None) -> None:
    """Not what was left of the time that those who were gone had to come back."""
    source, target = ends()
    target.start("recv", timeout=timeout)
    gone = RegistrationClosed("batch", source.batch.registration, target.batch.registration, "its agent died", lost=True, returns="soon")
    target.hears(gone)
    assert target.state is TransferState.BLOCKED
    target.register()
    target.batch.advance()
    assert target.state is TransferState.WAITING
    deadline = target.batch.deadline
    assert (deadline is None) if timeout is None else (deadline is not None and deadline > time.monotonic() + SUCCESSION_TIMEOUT)


def test_a_send_ends_for_whom_it_still_needed() -> None:
    """And not for one that took what it wanted and left in order."""
    source = End("source", targets={"first": False, "second": False})
    source.register()
    source.start("send")
    assert source.state is TransferState.ANNOUNCED
    (announced,) = [message for message in source.said() if isinstance(message, DataReady) and message.target == "first"]
    source.hears(DataTaken("batch", "source", "first", announced.sequence, announced.version))
    source.hears(RegistrationClosed("batch", "first", "source", "its worker closed it", completed=1, returns="no"))
    assert source.outcome() is None
    source.hears(RegistrationClosed("batch", "second", "source", "its worker died", lost=True, returns="perhaps"))
    error = source.outcome()
    assert isinstance(error, PeerLostError)
    assert "second[0] is gone (its worker died)" in str(error)
