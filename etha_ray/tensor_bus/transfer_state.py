"""One transfer of a batch, while it is under way: where it stands, and what is told of it. `batch` moves it on.

States::

    send:  BLOCKED ──► ANNOUNCED ──► OVER       every receiver has been told, and takes the data when it likes
    recv:  BLOCKED ──► WAITING ──► MOVING ◄──► ASKING ──► LENDING ──► OVER
                          ▲           │         │  │        ▲
               (atomic)   └───────────┴─────────┘  └──► SWAPPING

BLOCKED until the batch is READY and the worker's GPU has done what was launched before, and OVER then if the sides cannot send that
way; WAITING until every sender has announced, and
relays have some of what is read through them; MOVING while a thread copies, or more is to come from a relay; ASKING until every sender
on another host, and every relay, has said that what was read still stood then. What a relay did not keep is read from the senders,
MOVING again. An atomic receive waits again if what it read did not stand, and is SWAPPING while what it read is copied into the tensors.
LENDING, which is passed over where nothing is passed on, while other receivers read from the tensors. A transfer that is MOVING or
SWAPPING is never cut short: what ends it meanwhile only decides its outcome; one that is LENDING has what it wanted, and ends so.
"""

from __future__ import annotations

import enum
import time
from collections.abc import Container, Iterable
from dataclasses import dataclass, field

from etha_ray.errors import EthaRayError, IntegrityError, TransferInProgressError
from etha_ray.report import Span, TransferReport, format_seconds
from etha_ray.tensor_bus.commands import Transfer
from etha_ray.tensor_bus.history import Flow, PastTransfer
from etha_ray.tensor_bus.jobs import Job
from etha_ray.tensor_bus.registered import Registered
from etha_ray.tensor_bus.versions import Announced
from etha_ray.transport.base import CopyProgram


class TransferState(enum.Enum):
    """See the top of this file."""

    BLOCKED = "blocked"
    ANNOUNCED = "announced"
    WAITING = "waiting"
    MOVING = "moving"
    ASKING = "asking"
    SWAPPING = "swapping"
    LENDING = "lending"
    OVER = "over"


@dataclass
class UnderWay:
    """A transfer that is under way.

    ``outstanding`` are the registrations it waits for: receivers that have not taken what was announced, or senders that have not
    said that what was read still stood. ``announced``: a send of which some may have taken their part. ``reading`` is what a receive
    reads, by sender, and ``taken`` names those sends once it has. ``version`` is the one it sends or receives, as far as that is
    settled. ``moved`` are the seconds in which bytes moved, ``seconds`` all until its end. ``spoilt`` says, by sender, what happened
    while bytes moved, and ``lost`` why there is nothing more to wait for. ``stage`` is the one of its feed that moves, or is next,
    and ``moves`` whether one does. ``through`` are the relays that were read from and have not said that it stood, and ``relayed``
    those that have. ``failed``: a reading whose bytes did not match their checksums, while senders are asked whether they stood.
    ``held``: what waits for the worker's GPU. ``given_up``: its worker does not wait for it any more.
    """

    command: Transfer
    started: float
    deadline: float | None
    state: TransferState = TransferState.BLOCKED
    outstanding: set[str] = field(default_factory=set)
    announced: bool = False
    reading: dict[str, Announced] = field(default_factory=dict)
    version: int = 0
    began: float = 0.0
    moving_since: float = 0.0
    moved: float = 0.0
    swapping_since: float = 0.0
    lending_since: float = 0.0
    seconds: float = 0.0
    spoilt: dict[str, str] = field(default_factory=dict)
    lost: EthaRayError | None = None
    flows: tuple[Flow, ...] = ()
    taken: tuple[str, ...] = ()
    stage: int = 0
    moves: bool = False
    through: set[str] = field(default_factory=set)
    relayed: set[str] = field(default_factory=set)
    failed: tuple[CopyProgram, IntegrityError] | None = None
    held: Job[None] | None = None
    given_up: bool = False

    @property
    def send(self) -> str:
        """What this send is called, however often it has to be announced."""
        return f"{self.command.client_id}:{self.command.command_id}"

    @classmethod
    def of(cls, command: Transfer, started: float) -> UnderWay:
        """One that was asked for at ``started``, by the monotonic clock."""
        deadline = None if command.timeout is None else started + command.timeout
        return cls(command=command, started=started, deadline=deadline, began=time.time() - (time.monotonic() - started))

    def in_the_way_of(self, command: Transfer) -> TransferInProgressError:
        """Why another one of the batch cannot begin."""
        what = f"a {self.command.transfer_type} is under way"
        return TransferInProgressError(f"batch {command.batch_id!r}: {what}; wait for it before the next {command.transfer_type}")

    @property
    def runs(self) -> bool:
        """Whether a thread writes for it, which must come to its end."""
        return self.state in (TransferState.MOVING, TransferState.SWAPPING)

    def wait_again(self) -> None:
        """What was read did not stand, and the tensors were not touched."""
        self.state, self.spoilt, self.outstanding = TransferState.WAITING, {}, set()
        self.stage, self.through, self.relayed, self.failed = 0, set(), set(), None
        self.deadline = self.latest

    @property
    def latest(self) -> float | None:
        """When its worker wants it to be over."""
        return None if self.command.timeout is None else self.started + self.command.timeout

    def givers(self, registered: Registered) -> dict[str, tuple[str, int]]:
        """The name of everyone that a receive has read from, and the bytes, by registration."""
        found = {registration: (peer.name, peer.bytes) for registration, peer in registered.sources.items()}
        for relay, instead in registered.instead.items():
            if relay in self.relayed:
                found[relay] = registered.relays[relay].name, registered.relays[relay].bytes
                continue
            for source, size in instead.items():
                found[source] = found[source][0], found[source][1] + size
        return {registration: given for registration, given in found.items() if given[1] or not registered.instead}

    def report(self, registered: Registered) -> TransferReport:
        """What it did, now that it is over."""
        kind, moved, seconds = self.command.transfer_type, self.moved, self.seconds
        if kind == "send":  # how long each receiver read is in its answer
            peers = {registration: (peer.name, peer.bytes) for registration, peer in registered.targets.items()}
            waited, first, second = max(0.0, seconds - moved), "wait for receivers", "read by receivers"
        else:
            peers = self.givers(registered)
            waited, first, second = self.moving_since - self.started, "wait for senders", "move"
        spans = [Span(first, 0.0, waited), Span(second, waited, moved)]
        if kind == "recv" and (registered.relays or any(peer.remote for peer in registered.sources.values())):
            asked = (self.swapping_since or self.lending_since) - self.started
            spans.append(Span("ask senders", waited + moved, asked - waited - moved))
        if self.swapping_since:
            swapping = self.swapping_since - self.started
            spans.append(Span("swap in", swapping, self.lending_since - self.started - swapping))
        if kind == "recv" and registered.takers:
            lending = self.lending_since - self.started
            spans.append(Span("lend to others", lending, seconds - lending))
        return TransferReport(
            batch_id=self.command.batch_id,
            direction=kind,
            bytes=sum(size for _, size in peers.values()),
            seconds=seconds,
            move_seconds=moved,
            spans=tuple(spans),
            peers=dict(peers.values()),
            version=self.version,
        )

    def past(self, report: TransferReport | None, error: BaseException | None) -> PastTransfer:
        """What is kept of it, now that it is over: its report, or its error."""
        return PastTransfer(
            batch_id=self.command.batch_id,
            direction=self.command.transfer_type,
            client_id=self.command.client_id,
            began=self.began,
            seconds=self.seconds,
            report=report,
            kind="" if error is None else type(error).__name__,
            message="" if error is None else str(error),
            flows=self.flows,
        )

    def waits_for(self, registered: Registered, announced: Container[str]) -> str:
        """Whom it waits for, in words; empty while bytes move."""
        if self.held is not None:
            return "its worker's GPU has not done what was launched before it"
        if self.state is TransferState.BLOCKED:
            return "the other side has not registered the batch"
        if self.state is TransferState.ANNOUNCED:
            return f"{_names(registered, self.outstanding)} did not receive"
        if self.state is TransferState.WAITING:
            silent = silent_senders(registered, announced)
            return f"{silent} did not send" if silent else "those that pass on what it wants have not received it"
        if self.state is TransferState.LENDING:
            return "others that this one passes on to have not read it"
        return ""

    def who_is_missing(self, registered: Registered, announced: Container[str]) -> str:
        """Why it was not over in time."""
        elapsed, timeout = time.monotonic() - self.started, self.command.timeout
        after = format_seconds(elapsed if timeout is None else min(elapsed, timeout))
        what = f"{self.command.transfer_type} of batch {self.command.batch_id!r} was not over after {after}: "
        remedy = {
            TransferState.ANNOUNCED: ". Call transfer('recv') there, or give more time",
            TransferState.WAITING: ". Call transfer('send') there, or give more time",
        }
        return what + self.waits_for(registered, announced) + remedy.get(self.state, "")


def silent_senders(registered: Registered, announced: Container[str]) -> str:
    """The names of the senders that have not announced anything."""
    return _names(registered, (registration for registration in registered.sources if registration not in announced))


def _names(registered: Registered, registrations: Iterable[str]) -> str:
    return ", ".join(sorted(registered.others[registration].name for registration in registrations))
