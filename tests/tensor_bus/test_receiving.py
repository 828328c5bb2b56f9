"""Receives that end midway, and atomic ones: what is torn, what is whole, and what is waited for."""

from __future__ import annotations

import pytest

from etha_ray.errors import (
    BatchTornError,
    IntegrityError,
    TransferTimeoutError,
)
from etha_ray.tensor_bus.jobs import Job
from etha_ray.tensor_bus.messages import DataRead, DataReady, DataRevoked, DataStands
from etha_ray.tensor_bus.transfer_state import TransferState
from etha_ray.tensor_bus.versions import Holding
from tests.tensor_bus.ends import End, carry, ends, seen, two_senders


class TestTorn:
    def test_what_was_taken_back_once_it_had_stood_is_good(self) -> None:
        one, two, target = two_senders(remote=True)
        for end, way in ((one, "send"), (two, "send"), (target, "recv")):
            end.start(way)
        carry(one, two, target)
        target.bus.copied()
        asked = {message.source: message for message in target.said() if isinstance(message, DataRead)}
        one.hears(asked["one"])
        target.hears(*one.said())
        one.batch.cancel(TransferTimeoutError("its worker gave up"))
        target.hears(*one.said())
        two.hears(asked["two"])
        target.hears(*two.said())
        assert target.outcome().bytes == 16

    @pytest.mark.parametrize(
        ("spoilt", "torn", "shown"),
        [("one", (0, 1, 2), "torn: tensors 0-2"), ("two", (1, 2), "torn: tensors 1-2; whole, at version 1: tensor 0")],
    )
    def test_what_the_lost_sender_did_not_feed_is_whole(self, spoilt: str, torn: tuple[int, ...], shown: str) -> None:
        one, two, target = two_senders()
        for end in (one, two):
            end.start("send")
        target.start("recv")
        carry(one, two, target)
        target.batch.lose_agent(f"agent of {spoilt}", "it died")
        target.bus.copied()
        error = target.outcome()
        assert isinstance(error, BatchTornError)
        assert f"({shown}): receive again" in str(error)
        assert target.batch.holding.torn == target.bus.held[-1].torn == torn

    @pytest.mark.parametrize(("answered", "torn"), [(False, (0, 1, 2)), (True, (1, 2))])
    def test_what_is_not_known_to_have_stood_is_not_called_whole(self, answered: bool, torn: tuple[int, ...]) -> None:
        one, two, target = two_senders(remote=True)
        for end, way in ((one, "send"), (two, "send"), (target, "recv")):
            end.start(way)
        carry(one, two, target)
        if answered:
            target.bus.copied()
            one.hears(next(message for message in target.said() if isinstance(message, DataRead) and message.source == "one"))
            target.hears(*one.said())
            target.batch.lose_agent("agent of two", "it died")
        else:
            target.batch.lose_agent("agent of two", "it died")
            target.bus.copied()
        assert isinstance(target.outcome(), BatchTornError)
        assert target.batch.holding.torn == torn

    def test_an_agent_that_was_killed_during_the_copy_and_is_not_known_to_be(self) -> None:
        source, target = ends(remote=False)
        source.start("send")
        target.start("recv")
        carry(source, target)
        target.bus.dead["agent of source"] = "agent 0 (pid 1) died"
        target.bus.copied()
        error = target.outcome()
        assert isinstance(error, BatchTornError)
        assert "source[0] went away (agent 0 (pid 1) died) while" in str(error)

    @pytest.mark.parametrize(("unfinished", "torn"), [(frozenset({0}), (0,)), (frozenset({1, 2}), (1, 2)), (None, (0, 1, 2))])
    def test_a_copy_that_failed_says_what_it_finished(self, unfinished: frozenset[int] | None, torn: tuple[int, ...]) -> None:
        source, target = ends(remote=False)
        source.start("send")
        target.start("recv")
        carry(source, target)
        target.bus.programs[-1].unfinished = lambda: unfinished  # type: ignore[method-assign]
        job: Job[int] = Job()
        job.error = OSError("the cable was cut")
        target.bus.moves.pop()(job)
        assert isinstance(target.outcome(), BatchTornError)
        assert target.batch.holding.torn == torn

    @pytest.mark.parametrize("taken_back", [False, True])
    def test_bytes_that_do_not_match_are_a_fault_unless_they_were_taken_back(self, taken_back: bool) -> None:
        source, target = ends()
        source.start("send")
        target.start("recv")
        carry(source, target)
        target.bus.programs[-1].unfinished = lambda: frozenset({1})  # type: ignore[method-assign]
        target.bus.breaks(IntegrityError("tensor 1 did not arrive as it was sent"))
        assert target.outcome() is None
        asked = target.said()
        if taken_back:
            source.batch.cancel(TransferTimeoutError("its worker writes again"))
        source.hears(*asked)
        target.hears(*source.said())
        error = target.outcome()
        assert type(error) is (BatchTornError if taken_back else IntegrityError)
        assert ("gave up waiting while its data was being read" in str(error)) == taken_back
        assert target.batch.holding.torn == ((0, 1, 2) if taken_back else (1,))
        assert source.state is (None if taken_back else TransferState.ANNOUNCED), "else it can be received again"


class TestAtomic:
    def test_senders_are_let_go_before_it_is_swapped_in(self) -> None:
        source, target = ends()
        source.start("send", version=4)
        target.start("recv", atomic=True)
        carry(source, target)
        assert target.bus.held == []
        target.bus.copied()
        carry(source, target)  # it asks, and is answered
        assert source.outcome().version == 4
        assert target.outcome() is None
        assert target.bus.held[-1].torn == (0, 1, 2)
        target.batch.cancel(TransferTimeoutError("too late"))
        target.batch.lose_agent("agent of source", "it died")
        target.bus.copied()
        assert target.outcome().version == 4
        assert seen(target) == Holding(version=4, last=4)

    def test_what_was_taken_back_is_read_again(self) -> None:
        source, target = ends()
        source.start("send")
        target.start("recv", atomic=True)
        carry(source, target)
        target.bus.copied()
        asked = target.said()
        source.batch.cancel(TransferTimeoutError("time is up"))
        assert isinstance(source.outcome(), TransferTimeoutError)
        source.start("send", version=7)
        source.hears(*asked)
        carry(source, target)
        assert target.outcome() is None
        assert target.bus.held == []
        target.bus.copied()
        carry(source, target)
        target.bus.copied()
        assert target.outcome().version == source.outcome().version == 7

    @pytest.mark.parametrize("taken_back", [False, True])
    def test_bytes_that_do_not_match_are_waited_for_again_if_they_were_taken_back(self, taken_back: bool) -> None:
        source, target = ends()
        source.start("send")
        target.start("recv", atomic=True)
        carry(source, target)
        target.bus.breaks(IntegrityError("tensor 1 did not arrive as it was sent"))
        asked = target.said()
        if taken_back:
            source.batch.cancel(TransferTimeoutError("its worker writes again"))
            assert source.outcome() is not None
        source.hears(*asked)
        target.hears(*source.said())
        if not taken_back:
            assert type(target.outcome()) is IntegrityError
            return
        assert target.state is TransferState.WAITING
        source.start("send", version=2)
        carry(source, target)
        target.bus.copied()
        carry(source, target)
        target.bus.copied()
        assert target.outcome().version == 2

    def test_an_answer_to_an_earlier_question_is_none(self) -> None:
        target = End("target", sources={"near": True, "far": True})
        target.register()
        target.start("recv", atomic=True)
        target.hears(*(DataReady(batch_id="batch", source=source, target="target", sequence=1, version=1) for source in ("near", "far")))
        target.bus.copied()
        target.hears(DataRevoked(batch_id="batch", source="far", target="target", sequence=1))
        target.hears(DataReady(batch_id="batch", source="far", target="target", sequence=2, version=1))
        target.bus.copied()
        for question, source, sequence in ((1, "near", 1), (2, "far", 2)):
            target.hears(DataStands(batch_id="batch", source=source, target="target", sequence=sequence, question=question))
        assert not target.bus.moves  # what "near" said, it said before the second look
        target.hears(DataStands(batch_id="batch", source="near", target="target", sequence=1, question=2))
        target.bus.copied()
        assert target.outcome().version == 1

    def test_senders_that_never_answer(self) -> None:
        source, target = ends()
        target.batch.holding = Holding(version=3, last=3)
        source.start("send", version=4)
        target.start("recv", atomic=True)
        carry(source, target)
        target.bus.copied()
        assert target.batch.deadline is not None
        target.batch.expire(target.batch.deadline)
        error = target.outcome()
        assert isinstance(error, TransferTimeoutError)
        assert "still hold version 3" in str(error)
        assert seen(target) == Holding(version=3, last=3)

    def test_swapping_in_fails(self) -> None:
        source, target = ends(remote=False)
        source.start("send")
        target.start("recv", atomic=True)
        carry(source, target)
        target.bus.copied()
        job: Job[int] = Job()
        job.error = OSError("the agent shuts down")
        target.bus.moves.pop()(job)
        assert isinstance(target.outcome(), BatchTornError)
        assert target.batch.holding.torn == (0, 1, 2)
