"""Versions of a batch's sends and receives, whatever order its messages come in."""

from __future__ import annotations

import pytest

from etha_ray.errors import (
    BatchTornError,
    ConfigError,
    PeerLostError,
    TransferTimeoutError,
    VersionMismatchError,
    VersionTimeoutError,
)
from etha_ray.tensor_bus.commands import WaitVersion
from etha_ray.tensor_bus.messages import DataReady, RegistrationClosed
from etha_ray.tensor_bus.records import Standing
from etha_ray.tensor_bus.versions import Announced, Holding, agreed_version
from tests.tensor_bus.ends import End, carry, carry_on, ends, peer, seen, two_senders


class TestVersions:
    def test_both_sides_count_and_the_sender_may_say(self) -> None:
        source, target = ends(remote=False)
        for chosen, expected in ((None, 1), (None, 2), (7, 7), (None, 8)):
            source.start("send", version=chosen)
            target.start("recv")
            target.hears(*source.said())
            assert target.batch.holding.version == 0
            assert target.bus.held[-1].torn == (0, 1, 2)  # written down before a byte changes
            target.bus.copied()
            source.hears(*target.said())
            assert target.outcome().version == source.outcome().version == expected
            for held in (target.bus.held[-1], source.bus.held[-1]):
                assert (held.version, held.last, held.torn) == (expected, expected, ())

    def test_it_must_grow_and_one_that_failed_may_be_tried_again(self) -> None:
        source, target = ends(remote=False)
        for _ in range(2):
            source.start("send", version=5)
            source.batch.cancel(TransferTimeoutError("time is up"))
            assert isinstance(source.outcome(), TransferTimeoutError)
        source.start("send", version=5)
        carry(source, target)
        target.start("recv")
        carry_on(source, target)
        for version in (5, 4):
            with pytest.raises(ConfigError, match=rf"version {version} is not above 5"):
                source.start("send", version=version)
            assert source.batch.transfer is None
        target.start("send")  # the other way, where nobody wants any of it
        assert target.outcome().version == 6

    def test_different_versions_are_refused_before_a_byte_moves_and_the_next_send_works(self) -> None:
        one, two, target = two_senders()
        one.start("send", version=5)
        two.start("send", version=6)
        target.start("recv")
        carry(one, two, target)
        outcomes = [end.outcome() for end in (one, two, target)]
        for error in outcomes:
            assert isinstance(error, VersionMismatchError)
            assert "one[0] says 5, two[0] says 6" in str(error)
        assert not target.bus.moves
        assert not target.bus.held
        target.start("recv")
        for end in (one, two):
            end.start("send", version=6)
        carry(one, two, target)
        target.bus.copied()
        carry(one, two, target)
        assert [end.outcome().version for end in (one, two, target)] == [6, 6, 6]

    def test_a_round_of_which_one_sender_gave_up_its_part_is_not_finished_with_the_next_one(self) -> None:
        """One receiver has taken it and the other has not: with the next sends both must receive the same again."""
        one, two = (End(name, targets={"near": False, "far": False}) for name in ("one", "two"))
        near, far = (End(name, sources={"one": False, "two": False}) for name in ("near", "far"))
        everybody = one, two, near, far
        for end in everybody:
            end.register()
        for end in (one, two, near):
            end.start("send" if end is not near else "recv")
        carry(*everybody)
        near.bus.copied()
        carry(*everybody)
        assert near.outcome().version == 1
        one.batch.cancel(TransferTimeoutError("time is up"))
        assert isinstance(one.outcome(), TransferTimeoutError)
        one.start("send")
        carry(*everybody)
        far.start("recv")
        carry(*everybody)
        error = two.outcome()
        assert isinstance(error, VersionMismatchError)
        assert "one[0] says 2, two[0] says 1" in str(error)
        assert not far.bus.moves
        for end in (two, near):
            end.start("send" if end is two else "recv")
        carry(*everybody)
        for end in (near, far):
            end.bus.copied()
        carry(*everybody)
        assert [end.outcome().version for end in everybody] == [2] * 4

    def test_one_that_is_far_behind_is_told_once(self) -> None:
        one, two, target = two_senders()
        one.batch.used = target.batch.used = 7
        for end in (one, two):
            end.start("send")
        target.start("recv")
        carry(one, two, target)
        assert isinstance(two.outcome(), VersionMismatchError)
        two.start("send")
        carry(one, two, target)
        target.bus.copied()
        carry(one, two, target)
        assert [end.outcome().version for end in (one, two, target)] == [8] * 3

    def test_members_that_meet_anew_count_on_from_the_highest(self) -> None:
        one, two, target = two_senders()
        for end, standing in ((one, Standing(last=3)), (two, Standing(last=2, used=9)), (target, Standing(last=4))):
            end.batch.registered.standings[end.batch.registration] = standing
        standings = {name: standing for end in (one, two, target) for name, standing in end.batch.registered.standings.items()}
        for end in (one, two, target):
            end.batch.registered.standings.update(standings)
            end.register()
            end.start("recv" if end is target else "send")
        carry(one, two, target)
        target.bus.copied()
        carry(one, two, target)
        assert [end.outcome().version for end in (one, two, target)] == [10] * 3

    @pytest.mark.parametrize(("standing", "goes_on"), [(Standing(pending=1), True), (Standing(last=1), True), (None, False)])
    def test_a_send_is_announced_again_only_if_no_other_sender_has_lost_its_part(self, standing: Standing | None, goes_on: bool) -> None:
        one = End("one", targets={"near": False, "far": False})
        one.register()
        one.start("send")
        one.said()
        one.batch.lose(RegistrationClosed("batch", "far", "one", "its agent died", lost=True, returns="soon"))
        assert one.batch.standing().pending == 1
        one.batch.registered.side.add("two")
        one.batch.registered.others["two"] = peer("two", remote=False)
        one.batch.registered.standings["two"] = standing or Standing()
        one.register()
        if goes_on:
            assert one.outcome() is None
            assert [type(message) for message in one.said()] == [DataReady, DataReady]
        else:
            error = one.outcome()
            assert isinstance(error, PeerLostError)
            assert "two[0] lost its part of version 1" in str(error)

    @pytest.mark.parametrize(("counted", "fits"), [(4, True), (5, False)])
    def test_who_only_counts_follows_who_says(self, counted: int, fits: bool) -> None:
        announced = {"one": Announced(1, 4, True), "two": Announced(1, counted, False)}
        if fits:
            assert agreed_version("batch", announced, last=9) == 4  # a trainer that went back to an earlier step
        else:
            with pytest.raises(VersionMismatchError, match="one says 4, two says 5"):
                agreed_version("batch", announced, last=0)

    def test_a_torn_batch_holds_no_version_and_is_not_sent_on_by_mistake(self) -> None:
        source, target = ends()
        source.start("send")
        target.start("recv")
        target.hears(*source.said())
        source.batch.cancel(TransferTimeoutError("nobody came"))
        source.outcome()
        target.hears(*source.said())
        assert target.outcome() is None
        target.bus.copied()
        assert isinstance(target.outcome(), BatchTornError)
        assert target.batch.holding.version == 0
        assert target.batch.holding.torn == (0, 1, 2)
        with pytest.raises(BatchTornError, match="must not be sent on"):
            target.start("send")
        target.start("send", version=3)  # its worker has written them all
        assert seen(target) == Holding(version=3, last=3)

    def test_waiting_for_one(self) -> None:
        source, target = ends(remote=False)
        target.batch.questions.wait_version(WaitVersion(batch_id="batch", version=2, command_id=1))
        target.batch.questions.wait_version(WaitVersion(batch_id="batch", version=2, command_id=2, timeout=0.0))
        target.batch.questions.wait_version(WaitVersion(batch_id="batch", version=9, command_id=3))
        target.batch.questions.give_up(3)
        for step in (1, 2):
            source.start("send")
            target.start("recv")
            carry_on(source, target)
            if step == 1:
                assert target.batch.deadline is not None
                target.batch.expire(target.batch.deadline)
                error = target.outcome()
                assert isinstance(error, VersionTimeoutError)
                assert "holds version 1: source[0] did not send a newer one; version 2 did not come within 0 s" in str(error)
        assert target.outcome() == 2
        target.batch.questions.wait_version(WaitVersion(batch_id="batch", version=1, command_id=4))
        assert target.outcome() == 2
        target.batch.questions.wait_version(WaitVersion(batch_id="batch", version=3, command_id=5))
        target.batch.lose_agent("agent of source", "the cable was cut")
        assert isinstance(target.outcome(), PeerLostError)
        target.batch.questions.wait_version(WaitVersion(batch_id="batch", version=3, command_id=6))
        assert isinstance(target.outcome(), PeerLostError)
