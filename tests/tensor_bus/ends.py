"""Two sides of a batch without agents: what they say is kept until the test lets it arrive."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterable
from typing import Any, ClassVar

import msgspec

from etha_ray.report import TransferReport
from etha_ray.tensor_bus.batch import Batch
from etha_ray.tensor_bus.bus import Member
from etha_ray.tensor_bus.commands import BaseCommand, Ping, Transfer
from etha_ray.tensor_bus.history import PastTransfer
from etha_ray.tensor_bus.jobs import Job
from etha_ray.tensor_bus.messages import DataMessage, DataRead, DataRefused, DataTaken, Message, RegistrationClosed
from etha_ray.tensor_bus.records import AgentRecord, MemberRecord
from etha_ray.tensor_bus.registered import Peer, Registered
from etha_ray.tensor_bus.transfer_state import TransferState
from etha_ray.tensor_bus.versions import Holding
from etha_ray.transport.base import CopyProgram

_numbers = itertools.count(1)


def seen(end: End) -> Holding:
    """What a worker can know of what it holds."""
    return msgspec.structs.replace(end.batch.holding, taken=())


class Bus:
    """Keeps what a batch says and starts, until the test lets it arrive, or end."""

    def __init__(self) -> None:
        self.said: list[Message] = []
        self.outcomes: list[object] = []
        self.calls: list[Callable[[], None]] = []
        self.moves: list[Callable[[Job[int]], None]] = []
        self.programs: list[CopyProgram] = []
        self.past: list[PastTransfer] = []
        self.held: list[Holding] = []
        self.received_versions: list[int] = []
        self.dead: dict[str, str] = {}
        self.marks: list[tuple[Job[None], Callable[[Job[None]], None]]] = []

    def tell(self, agent: AgentRecord, message: Message) -> None:
        self.said.append(message)

    def remind(self, agent: AgentRecord, message: Message) -> None:
        if agent.incarnation not in self.dead:
            self.said.append(message)

    def gone(self, agent: AgentRecord) -> str:
        return self.dead.get(agent.incarnation, "")

    def answer(self, command: BaseCommand, value: object) -> None:
        self.outcomes.append(value)

    def refuse(self, command: BaseCommand, error: BaseException) -> None:
        self.outcomes.append(error)

    def soon(self, call: Callable[[], None]) -> None:
        self.calls.append(call)

    def move(self, program: CopyProgram, done: Callable[[Job[int]], None]) -> None:
        self.moves.append(done)
        self.programs.append(program)

    def when_passed(self, mark: bytes, done: Callable[[Job[None]], None]) -> Job[None]:
        self.marks.append((Job(), done))
        return self.marks[-1][0]

    def forget_mark(self, mark: bytes) -> None:
        self.marks.clear()

    def note(self, past: PastTransfer) -> None:
        self.past.append(past)

    def hold(self, client_id: str, batch_id: str, holding: Holding) -> None:
        self.held.append(holding)

    def received(self, member: Member, version: int) -> None:
        self.received_versions.append(version)

    def called(self) -> None:
        """What was to be done soon is done."""
        calls, self.calls = self.calls, []
        for call in calls:
            call()

    def copied(self) -> None:
        job: Job[int] = Job()
        job.value = 1
        self.moves.pop()(job)

    def breaks(self, error: Exception) -> None:
        job: Job[int] = Job()
        job.error = error
        self.moves.pop()(job)


class Work:
    has_agreed = True
    agreed = ("set",)
    agreed_with: ClassVar[dict[str, Peer]] = {}

    def __init__(self) -> None:
        self.confirmed: list[str] = []

    def confirm(self, agreed: Iterable[str]) -> None:
        self.confirmed += agreed


def peer(registration: str, *, remote: bool, size: int = 8) -> Peer:
    agent = AgentRecord(0, f"agent of {registration}", 1, 0.0, "host", "host", "", "", "", "", "cpu")
    member = MemberRecord(registration, registration, "", 1, None, 0, "client", 1, 0.0, agent)
    return Peer(registration, f"{registration}[0]", member, size, remote)


class End:
    """One side's batch, whose other members are given by name; True for those on other hosts."""

    def __init__(self, name: str, *, sources: dict[str, bool] | None = None, targets: dict[str, bool] | None = None) -> None:
        self.bus = Bus()
        work: Any = Work()
        self.batch = Batch(self.bus, "batch", name, "client", work, Ping())
        self.batch.job = Job()
        registered = Registered(received=(0, 1, 2))
        everyone = frozenset(sources or ())
        registered.feeds = [(0, frozenset(sorted(everyone)[:1])), (1, everyone), (2, everyone)]
        registered.sources = {source: peer(source, remote=remote) for source, remote in (sources or {}).items()}
        registered.targets = {target: peer(target, remote=remote) for target, remote in (targets or {}).items()}
        registered.others = {**registered.sources, **registered.targets}
        self.registered = registered
        job: Job[Registered] = Job()
        job.value = registered
        self._job = job

    def register(self) -> None:
        assert self.batch.registration_over(self._job, time.monotonic()) is None
        self.batch.catch_up()

    def start(self, direction: Any, timeout: float | None = None, version: int | None = None, **more: Any) -> int:
        """Have its worker begin a transfer; the command's number."""
        command = Transfer("batch", direction, timeout=timeout, version=version, command_id=next(_numbers), **more)
        self.batch.turns.start(command)
        return command.command_id

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


def ends(*, remote: bool = True) -> tuple[End, End]:
    source, target = End("source", targets={"target": remote}), End("target", sources={"source": remote})
    source.register()
    target.register()
    return source, target


def two_senders(*, remote: bool = False) -> tuple[End, End, End]:
    one, two = (End(name, targets={"target": remote}) for name in ("one", "two"))
    target = End("target", sources={"one": remote, "two": remote})
    for end in (one, two, target):
        end.register()
    return one, two, target


def carry(*ends: End) -> None:
    """Let everything arrive that was said, until nobody says anything more."""
    by_name = {end.batch.registration: end for end in ends}
    while said := [message for end in ends for message in end.said()]:
        for message in said:
            assert isinstance(message, DataMessage)
            own = message.source if isinstance(message, DataTaken | DataRefused | DataRead) else message.target
            by_name[own].hears(message)


def carry_on(source: End, target: End) -> None:
    """One transfer on this host, to its end."""
    carry(source, target)
    target.bus.copied()
    reports = [message for message in target.bus.outcomes if isinstance(message, TransferReport)]
    target.bus.outcomes[:] = [outcome for outcome in target.bus.outcomes if outcome not in reports]
    carry(source, target)
    assert source.outcome().version == reports[0].version
