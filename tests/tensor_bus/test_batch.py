"""The state machines of a batch, with messages between agents in every order that a network can bring them in."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Iterable
from typing import Any, ClassVar

import msgspec
import pytest

from etha_ray.errors import (
    BatchClosedError,
    BatchTornError,
    BatchUnmatchedError,
    ConfigError,
    IntegrityError,
    PeerLostError,
    TransferTimeoutError,
    VersionMismatchError,
    VersionTimeoutError,
)
from etha_ray.report import TransferReport
from etha_ray.tensor_bus.batch import Batch, BatchState
from etha_ray.tensor_bus.bus import Member
from etha_ray.tensor_bus.commands import (
    BaseCommand,
    DataMessage,
    DataRead,
    DataReady,
    DataRefused,
    DataRevoked,
    DataStands,
    DataTaken,
    Message,
    Ping,
    RegistrationClosed,
    Transfer,
    WaitVersion,
)
from etha_ray.tensor_bus.history import PastTransfer
from etha_ray.tensor_bus.jobs import Job
from etha_ray.tensor_bus.records import AgentRecord, MemberRecord, Standing
from etha_ray.tensor_bus.registered import Peer, Registered
from etha_ray.tensor_bus.transfer_state import TransferState
from etha_ray.tensor_bus.versions import Announced, Holding, agreed_version
from etha_ray.transport.base import CopyProgram

_numbers = itertools.count(1)


def _seen(end: _End) -> Holding:
    """What a worker can know of what it holds."""
    return msgspec.structs.replace(end.batch.holding, taken=())


class _Bus:
    """Keeps what a batch says and starts, until the test lets it arrive, or end."""

    def __init__(self) -> None:
        self.said: list[Message] = []
        self.outcomes: list[object] = []
        self.moves: list[Callable[[Job[int]], None]] = []
        self.programs: list[CopyProgram] = []
        self.past: list[PastTransfer] = []
        self.held: list[Holding] = []
        self.received_versions: list[int] = []
        self.dead: dict[str, str] = {}

    def tell(self, agent: AgentRecord, message: Message) -> None:
        self.said.append(message)

    def gone(self, agent: AgentRecord, seconds: float) -> str:
        return self.dead.get(agent.incarnation, "")

    def answer(self, command: BaseCommand, value: object) -> None:
        self.outcomes.append(value)

    def refuse(self, command: BaseCommand, error: BaseException) -> None:
        self.outcomes.append(error)

    def move(self, program: CopyProgram, done: Callable[[Job[int]], None]) -> None:
        self.moves.append(done)
        self.programs.append(program)

    def note(self, past: PastTransfer) -> None:
        self.past.append(past)

    def hold(self, client_id: str, batch_id: str, holding: Holding) -> None:
        self.held.append(holding)

    def received(self, member: Member, version: int) -> None:
        self.received_versions.append(version)

    def copied(self) -> None:
        job: Job[int] = Job()
        job.value = 1
        self.moves.pop()(job)

    def breaks(self, error: Exception) -> None:
        job: Job[int] = Job()
        job.error = error
        self.moves.pop()(job)


class _Work:
    has_agreed = True
    agreed = ("set",)
    agreed_with: ClassVar[dict[str, Peer]] = {}

    def __init__(self) -> None:
        self.confirmed: list[str] = []

    def confirm(self, agreed: Iterable[str]) -> None:
        self.confirmed += agreed


def _peer(registration: str, *, remote: bool, size: int = 8) -> Peer:
    agent = AgentRecord(0, f"agent of {registration}", 1, 0.0, "host", "host", "", "", "", "", "cpu")
    member = MemberRecord(registration, registration, "", 1, None, 0, "client", 1, 0.0, agent)
    return Peer(registration, f"{registration}[0]", member, size, remote)


class _End:
    """One side's batch, whose other members are given by name; True for those on other hosts."""

    def __init__(self, name: str, *, sources: dict[str, bool] | None = None, targets: dict[str, bool] | None = None) -> None:
        self.bus = _Bus()
        work: Any = _Work()
        self.batch = Batch(self.bus, "batch", name, "client", work, Ping())
        self.batch.job = Job()
        registered = Registered(received=(0, 1, 2))
        everyone = frozenset(sources or ())
        registered.feeds = [(0, frozenset(sorted(everyone)[:1])), (1, everyone), (2, everyone)]
        registered.sources = {source: _peer(source, remote=remote) for source, remote in (sources or {}).items()}
        registered.targets = {target: _peer(target, remote=remote) for target, remote in (targets or {}).items()}
        registered.others = {**registered.sources, **registered.targets}
        self.registered = registered
        job: Job[Registered] = Job()
        job.value = registered
        self._job = job

    def register(self) -> None:
        assert self.batch.registration_over(self._job, time.monotonic()) is None
        self.batch.catch_up()

    def start(self, direction: Any, timeout: float | None = None, version: int | None = None, atomic: bool = False) -> None:
        more = {"timeout": timeout, "version": version, "atomic": atomic, "command_id": next(_numbers)}
        self.batch.start(Transfer(batch_id="batch", transfer_type=direction, **more))

    def hears(self, *messages: Message) -> None:
        for message in messages:
            if isinstance(message, RegistrationClosed):
                self.batch.lose(message)
            else:
                assert isinstance(message, DataMessage)
                self.batch.hear(message)

    @property
    def state(self) -> TransferState | None:
        return None if self.batch.transfer is None else self.batch.transfer.state

    def said(self) -> list[Message]:
        said, self.bus.said = self.bus.said, []
        return said

    def outcome(self) -> Any:
        """What the transfer came to since this was asked last; None while it goes on."""
        assert len(self.bus.outcomes) <= 1
        return self.bus.outcomes.pop() if self.bus.outcomes else None


def _ends(*, remote: bool = True) -> tuple[_End, _End]:
    source, target = _End("source", targets={"target": remote}), _End("target", sources={"source": remote})
    source.register()
    target.register()
    return source, target


def test_a_copy_on_this_host_needs_no_more_than_two_messages() -> None:
    source, target = _ends(remote=False)
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
    source, target = _ends()
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
    source, target = _ends()
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
    source, target = _ends()
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
    source, target = _ends()
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
    target = _End("target", sources={"near": False, "far": True, "farther": True})
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
    target = _End("target", sources={"near": False, "far": True})
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
    source = _End("source", targets={"target": True})
    source.register()
    source.batch.registered.others["other"] = _peer("other", remote=True)
    source.start("send")
    source.batch.lose_agent("agent of other", "it died")
    assert source.outcome() is None
    source.batch.lose_agent("agent of target", "it died too")
    assert isinstance(source.outcome(), PeerLostError)


def test_an_agent_lost_before_the_end_of_the_registration_is_lost_after() -> None:
    target = _End("target", sources={"source": True})
    target.batch.lose_agent("agent of source", "the cable was cut")
    target.start("recv")
    target.register()
    assert isinstance(target.outcome(), PeerLostError)
    assert target.batch.state is BatchState.LOST


def test_closing_waits_for_a_copy_and_not_for_an_answer() -> None:
    source, target = _ends()
    source.start("send")
    target.start("recv")
    target.hears(*source.said())
    closed = threading.Event()
    target.bus.copied()
    target.batch.close(PeerLostError("closed"), lost=False, then=closed.set)
    assert closed.is_set()
    assert isinstance(target.outcome(), PeerLostError)


def two_senders(*, remote: bool = False) -> tuple[_End, _End, _End]:
    one, two = (_End(name, targets={"target": remote}) for name in ("one", "two"))
    target = _End("target", sources={"one": remote, "two": remote})
    for end in (one, two, target):
        end.register()
    return one, two, target


def carry(*ends: _End) -> None:
    """Let everything arrive that was said, until nobody says anything more."""
    by_name = {end.batch.registration: end for end in ends}
    while said := [message for end in ends for message in end.said()]:
        for message in said:
            assert isinstance(message, DataMessage)
            own = message.source if isinstance(message, DataTaken | DataRefused | DataRead) else message.target
            by_name[own].hears(message)


class TestVersions:
    def test_both_sides_count_and_the_sender_may_say(self) -> None:
        source, target = _ends(remote=False)
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
        source, target = _ends(remote=False)
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
        one, two = (_End(name, targets={"near": False, "far": False}) for name in ("one", "two"))
        near, far = (_End(name, sources={"one": False, "two": False}) for name in ("near", "far"))
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
        one = _End("one", targets={"near": False, "far": False})
        one.register()
        one.start("send")
        one.said()
        one.batch.lose(RegistrationClosed("batch", "far", "one", "its agent died", lost=True, returns="soon"))
        assert one.batch.standing().pending == 1
        one.batch.registered.side.add("two")
        one.batch.registered.others["two"] = _peer("two", remote=False)
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
        source, target = _ends()
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
        assert _seen(target) == Holding(version=3, last=3)

    def test_waiting_for_one(self) -> None:
        source, target = _ends(remote=False)
        target.batch.wait_version(WaitVersion(batch_id="batch", version=2, command_id=1))
        target.batch.wait_version(WaitVersion(batch_id="batch", version=2, command_id=2, timeout=0.0))
        target.batch.wait_version(WaitVersion(batch_id="batch", version=9, command_id=3))
        target.batch.waits.drop(3)
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
        target.batch.wait_version(WaitVersion(batch_id="batch", version=1, command_id=4))
        assert target.outcome() == 2
        target.batch.wait_version(WaitVersion(batch_id="batch", version=3, command_id=5))
        target.batch.lose_agent("agent of source", "the cable was cut")
        assert isinstance(target.outcome(), PeerLostError)
        target.batch.wait_version(WaitVersion(batch_id="batch", version=3, command_id=6))
        assert isinstance(target.outcome(), PeerLostError)


def carry_on(source: _End, target: _End) -> None:
    """One transfer on this host, to its end."""
    carry(source, target)
    target.bus.copied()
    reports = [message for message in target.bus.outcomes if isinstance(message, TransferReport)]
    target.bus.outcomes[:] = [outcome for outcome in target.bus.outcomes if outcome not in reports]
    carry(source, target)
    assert source.outcome().version == reports[0].version


def test_who_goes_away_says_what_it_saw_all_agree_to() -> None:
    """One that is ready tells the set; one that never was, and only may be taken for ready, tells none."""
    first, _ = _ends(remote=False)
    first.batch.close(BatchClosedError("closed"), lost=False, then=lambda: None)
    (told,) = first.said()
    assert isinstance(told, RegistrationClosed)
    assert told.agreed == ("set",)
    again = _End("target", sources={"source": False})
    again.hears(told)
    assert again.batch.work.confirmed == ["set"]
    unready = _End("source", targets={"target": False})
    unready.batch.work.agreed_with = unready.batch.registered.others | {"target": _peer("target", remote=False)}
    job: Job[Registered] = Job()
    job.error = BatchUnmatchedError("its time is up")
    unready.batch.registration_over(job, time.monotonic())
    (told,) = unready.said()
    assert isinstance(told, RegistrationClosed)
    assert told.agreed == ()
    assert told.lost


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
        source, target = _ends(remote=False)
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
        source, target = _ends(remote=False)
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
        source, target = _ends()
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
        source, target = _ends()
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
        assert _seen(target) == Holding(version=4, last=4)

    def test_what_was_taken_back_is_read_again(self) -> None:
        source, target = _ends()
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
        source, target = _ends()
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
        target = _End("target", sources={"near": True, "far": True})
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
        source, target = _ends()
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
        assert _seen(target) == Holding(version=3, last=3)

    def test_swapping_in_fails(self) -> None:
        source, target = _ends(remote=False)
        source.start("send")
        target.start("recv", atomic=True)
        carry(source, target)
        target.bus.copied()
        job: Job[int] = Job()
        job.error = OSError("the agent shuts down")
        target.bus.moves.pop()(job)
        assert isinstance(target.outcome(), BatchTornError)
        assert target.batch.holding.torn == (0, 1, 2)
