"""A registered batch, and the transfer of it that is under way. Owned by the agent's loop.

States of a batch::

    REGISTERING ──► READY ──► LOST      another member closed or died; `error` says which
         └───────────┴──────► CLOSED

Members do not wait for one another: one that has done its part of a transfer may close before another one begins its own. So in a
batch that is LOST a transfer still begins where the lost member had completed it and is not needed for it.

States of a transfer::

    send:  BLOCKED ──► ANNOUNCED ──► OVER       every receiver has been told, and takes the data when it likes
    recv:  BLOCKED ──► WAITING ──► MOVING ──► ASKING ──► OVER

BLOCKED until the batch is READY, and OVER then if the sides cannot send that way; WAITING until every sender has announced;
MOVING while a thread copies; ASKING until every sender on another host has said that what was read still stood then. A transfer
that is MOVING is never cut short: what ends it meanwhile only decides its outcome.
"""

from __future__ import annotations

import enum
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, Protocol

from etha_ray.config import FAILURE_TIMEOUT
from etha_ray.errors import (
    AgentFailedError,
    BatchClosedError,
    BatchTornError,
    EthaRayError,
    PeerLostError,
    TransferTimeoutError,
)
from etha_ray.report import Span, TransferReport
from etha_ray.tensor_bus.commands import (
    BaseCommand,
    DataRead,
    DataReady,
    DataRevoked,
    DataStands,
    DataTaken,
    Message,
    RegistrationClosed,
    Transfer,
)
from etha_ray.tensor_bus.history import Flow, PastTransfer, flow_key
from etha_ray.tensor_bus.jobs import Job
from etha_ray.tensor_bus.records import AgentRecord
from etha_ray.tensor_bus.registration import Peer, Registered, Registration
from etha_ray.transport.base import CopyProgram

_ANSWER_TIMEOUT = 3 * FAILURE_TIMEOUT
"""Seconds in which the loop of an agent that lives answers, however busy its host is."""


class BatchState(enum.Enum):
    """See the top of this file."""

    REGISTERING = "registering"
    READY = "ready"
    LOST = "lost"
    CLOSED = "closed"


class TransferState(enum.Enum):
    """See the top of this file."""

    BLOCKED = "blocked"
    ANNOUNCED = "announced"
    WAITING = "waiting"
    MOVING = "moving"
    ASKING = "asking"
    OVER = "over"


class Bus(Protocol):
    """What a batch needs of its agent."""

    def tell(self, agent: AgentRecord, message: Message) -> None:
        """Send a message to an agent."""

    def answer(self, command: BaseCommand, value: object) -> None:
        """A command succeeded."""

    def refuse(self, command: BaseCommand, error: BaseException) -> None:
        """A command failed."""

    def move(self, program: CopyProgram, done: Callable[[Job[int]], None]) -> None:
        """Run a program beside the loop."""

    def note(self, past: PastTransfer) -> None:
        """A transfer is over."""


@dataclass
class _Transfer:
    command: Transfer
    started: float
    deadline: float | None
    state: TransferState = TransferState.BLOCKED
    outstanding: set[str] = field(default_factory=set)
    moving_since: float = 0.0
    moved: float = 0.0
    torn: str = ""
    began: float = field(default_factory=time.time)
    flows: tuple[Flow, ...] = ()


@dataclass
class Batch:
    """One worker's registration of a batch."""

    bus: Bus
    batch_id: str
    registration: str
    client_id: str
    work: Registration
    command: BaseCommand
    state: BatchState = BatchState.REGISTERING
    job: Job[Registered] | None = None
    registered: Registered = field(default_factory=Registered)
    error: EthaRayError | None = None
    sequence: int = 0
    completed: int = 0
    gone: dict[str, int] = field(default_factory=dict)
    announced: dict[str, int] = field(default_factory=dict)
    transfer: _Transfer | None = None
    early: dict[str, tuple[str, bool, int]] = field(default_factory=dict)
    early_agents: dict[str, str] = field(default_factory=dict)
    closing: list[Callable[[], None]] = field(default_factory=list)

    # ------------------------------------------------------------------------------------------- worker's calls

    def refusal(self, direction: Literal["send", "recv"]) -> EthaRayError | None:
        """Why a transfer cannot begin, or go on; None if it can."""
        if self.state is not BatchState.LOST:
            return self.error
        needed = self.registered.targets if direction == "send" else self.registered.sources
        done_by_all = all(completed > self.completed for completed in self.gone.values())
        return None if done_by_all and needed.keys().isdisjoint(self.gone) else self.error

    def start(self, command: Transfer) -> None:
        """Begin a transfer; the caller has checked that none is under way and that there is no `refusal`."""
        now = time.monotonic()
        deadline = None if command.timeout is None else now + command.timeout
        self.transfer = _Transfer(command=command, started=now, deadline=deadline)
        self.advance()

    def signal(self) -> bool:
        """Whether the sender's data is ready, or sent, and not yet received."""
        transfer = self.transfer
        if transfer is not None and transfer.state is TransferState.ANNOUNCED:
            return True
        sources = self.registered.sources
        return bool(sources) and all(source in self.announced for source in sources)

    def cancel(self, error: EthaRayError) -> None:
        """End the transfer under way with ``error``; one that is MOVING ends by itself, with its own outcome."""
        transfer = self.transfer
        if transfer is None or transfer.state is TransferState.MOVING:
            return
        if transfer.state is TransferState.ANNOUNCED:
            for registration in transfer.outstanding:
                peer = self.registered.targets[registration]
                self._tell(peer, DataRevoked, self.registration, registration, self.sequence)
        self._finish(error)

    def close(self, error: EthaRayError, *, lost: bool, then: Callable[[], None]) -> None:
        """Release everything and tell the other members; ``then`` runs once no byte moves and no job runs any more.

        ``error`` ends what is under way. ``lost``: the worker or its agent goes away, rather than closing the batch.
        """
        self.closing.append(then)
        if self.state is BatchState.CLOSED:
            return
        if self.job is not None:
            self.job.cancellation.cancel(str(error))
        self.cancel(error)
        self.state, self.error = BatchState.CLOSED, error
        self._say_closed(str(error), lost)
        self._release_if_idle()

    def registration_over(self, job: Job[Registered]) -> BaseException | None:
        """Take the end of the registration's job; returns why the batch cannot be used, if so."""
        self.job = None
        if job.value is not None:
            self.registered = job.value
        if self.state is BatchState.CLOSED:
            assert self.error is not None
            # All others may have seen this member agree, and take it for ready.
            self._say_closed(str(self.error), lost=False)
            self._release_if_idle()
            return self.error
        if job.value is None:
            error = job.error if isinstance(job.error, EthaRayError) else AgentFailedError(f"the registration failed: {job.error}")
            self.cancel(error)
            return job.error
        self.state = BatchState.READY
        return None

    def catch_up(self) -> None:
        """Do what had to wait for the registration; after its caller has been answered."""
        for registration, (reason, lost, completed) in self.early.items():
            if registration in self.registered.others:
                self.lose(registration, reason, lost=lost, completed=completed)
        for incarnation, reason in self.early_agents.items():
            self.lose_agent(incarnation, reason)
        refusal = None if self.transfer is None else self.refusal(self.transfer.command.transfer_type)
        if refusal is not None:
            self.cancel(refusal)
        self.advance()

    @property
    def deadline(self) -> float | None:
        """When `expire` has something to do, by the monotonic clock."""
        transfer = self.transfer
        return None if transfer is None or transfer.state is TransferState.MOVING else transfer.deadline

    def expire(self, now: float) -> None:
        """End a transfer whose time is up; one that is MOVING ends by itself."""
        transfer, deadline = self.transfer, self.deadline
        if transfer is None or deadline is None or now < deadline:
            return
        if transfer.state is TransferState.ASKING:
            # What was announced stays so: should the senders answer after all, receiving again takes it.
            names = ", ".join(sorted(map(self._name, transfer.outstanding)))
            transfer.torn = f"{names} did not say whether it still stood"
            self._finish(self._torn(transfer))
        else:
            self.cancel(TransferTimeoutError(self._who_is_missing(transfer)))

    # ------------------------------------------------------------------------------------------------- progress

    def advance(self) -> None:
        """Take the transfer under way as far as it goes now."""
        transfer = self.transfer
        if transfer is None or self.state not in (BatchState.READY, BatchState.LOST):
            return  # LOST: a transfer that does not need the lost member goes on
        if transfer.state is TransferState.BLOCKED:
            refused = self.registered.refused.get(transfer.command.transfer_type)
            if refused is not None:
                self._finish(refused)
                return
            if transfer.command.transfer_type == "send":
                self._announce(transfer)
            else:
                transfer.state = TransferState.WAITING
        if transfer.state is TransferState.WAITING and all(source in self.announced for source in self.registered.sources):
            transfer.state = TransferState.MOVING
            transfer.moving_since = time.monotonic()
            program = self.registered.program
            assert program is not None
            self.bus.move(program, self._moved)

    def _announce(self, transfer: _Transfer) -> None:
        transfer.state = TransferState.ANNOUNCED
        self.sequence += 1
        transfer.outstanding = set(self.registered.targets)
        transfer.flows = tuple(
            Flow(flow_key(self.registration, registration, self.sequence), peer.name, peer.bytes)
            for registration, peer in self.registered.targets.items()
        )
        for registration, peer in self.registered.targets.items():
            self._tell(peer, DataReady, self.registration, registration, self.sequence)
        if not transfer.outstanding:
            self._finish(None)

    def _moved(self, job: Job[int]) -> None:
        transfer = self.transfer
        assert transfer is not None
        assert transfer.state is TransferState.MOVING
        transfer.moved = time.monotonic() - transfer.moving_since
        if job.error is not None:
            self._finish(BatchTornError(f"batch {self.batch_id!r}: the copy failed midway: {job.error}"))
        elif transfer.torn:
            self._finish(self._torn(transfer))
        else:
            # On this host a DataRevoked is in the queue before anything can be written, and was handled before this. That of another
            # host may be on its way still, but its answer comes after it.
            transfer.state = TransferState.ASKING
            transfer.deadline = time.monotonic() + _ANSWER_TIMEOUT
            transfer.outstanding = {registration for registration, peer in self.registered.sources.items() if peer.remote}
            for registration in sorted(transfer.outstanding):
                self._tell(self.registered.sources[registration], DataRead, registration, self.registration, self.announced[registration])
            self._take_if_certain(transfer)

    def _take_if_certain(self, transfer: _Transfer) -> None:
        if transfer.outstanding:
            return
        transfer.flows = tuple(
            Flow(flow_key(registration, self.registration, self.announced[registration]), peer.name, peer.bytes)
            for registration, peer in self.registered.sources.items()
        )
        for registration, peer in self.registered.sources.items():
            self._tell(peer, DataTaken, registration, self.registration, self.announced.pop(registration), transfer.moved)
        self._finish(None)

    def _torn(self, transfer: _Transfer) -> BatchTornError:
        return BatchTornError(
            f"batch {self.batch_id!r}: {transfer.torn} while its data was being read, so the tensors may hold bytes of"
            " two versions: receive again"
        )

    def _finish(self, error: BaseException | None) -> None:
        transfer, self.transfer = self.transfer, None
        assert transfer is not None
        seconds = time.monotonic() - transfer.started
        report = None if error is not None else self._report(transfer, seconds)
        if error is None:
            self.completed += 1
            self.bus.answer(transfer.command, report)
        else:
            self.bus.refuse(transfer.command, error)
        transfer.state = TransferState.OVER
        self.bus.note(
            PastTransfer(
                batch_id=self.batch_id,
                direction=transfer.command.transfer_type,
                client_id=self.client_id,
                began=transfer.began,
                seconds=seconds,
                report=report,
                kind="" if error is None else type(error).__name__,
                message="" if error is None else str(error),
                flows=transfer.flows,
            )
        )
        self._release_if_idle()

    def _report(self, transfer: _Transfer, seconds: float) -> TransferReport:
        kind, moved = transfer.command.transfer_type, transfer.moved
        if kind == "send":  # how long each receiver read is in its answer
            peers, waited, first, second = self.registered.targets, max(0.0, seconds - moved), "wait for receivers", "read by receivers"
        else:
            peers, waited, first, second = self.registered.sources, transfer.moving_since - transfer.started, "wait for senders", "move"
        spans = [Span(first, 0.0, waited), Span(second, waited, moved)]
        if kind == "recv" and any(peer.remote for peer in peers.values()):
            spans.append(Span("ask senders", waited + moved, seconds - waited - moved))
        return TransferReport(
            batch_id=self.batch_id,
            direction=kind,
            bytes=sum(peer.bytes for peer in peers.values()),
            seconds=seconds,
            move_seconds=moved,
            spans=tuple(spans),
            peers={peer.name: peer.bytes for peer in peers.values()},
        )

    # ---------------------------------------------------------------------------------------- other side's messages

    def on_ready(self, message: DataReady) -> None:
        """A sender announces its data."""
        self.announced[message.source] = message.sequence
        self.advance()

    def on_read(self, message: DataRead) -> None:
        """A receiver on another host has read this side's data, and asks whether it still stands."""
        transfer, peer = self.transfer, self.registered.targets.get(message.target)
        if peer is None:
            return
        offered = transfer is not None and transfer.state is TransferState.ANNOUNCED and message.target in transfer.outstanding
        stands = offered and message.sequence == self.sequence
        self._tell(peer, DataStands if stands else DataRevoked, self.registration, message.target, message.sequence)

    def on_stands(self, message: DataStands) -> None:
        """A sender on another host says that what was read stood until then."""
        transfer = self.transfer
        asked = transfer is not None and transfer.state is TransferState.ASKING
        if transfer is not None and asked and self.announced.get(message.source) == message.sequence:
            transfer.outstanding.discard(message.source)
            self._take_if_certain(transfer)

    def on_taken(self, message: DataTaken) -> None:
        """A receiver has read this side's data."""
        transfer = self.transfer
        if transfer is None or transfer.state is not TransferState.ANNOUNCED or message.sequence != self.sequence:
            return
        transfer.outstanding.discard(message.target)
        transfer.moved = max(transfer.moved, message.seconds)
        if not transfer.outstanding:
            self._finish(None)

    def on_revoked(self, message: DataRevoked) -> None:
        """A sender takes back what it announced."""
        if self.announced.get(message.source) != message.sequence:
            return
        del self.announced[message.source]
        self._tear(f"{self._name(message.source)} gave up waiting", message.source)

    def lose(self, registration: str, reason: str, *, lost: bool, completed: int = 0) -> None:
        """Another member is gone, after it had completed so many transfers."""
        name = self._name(registration)
        text = f"batch {self.batch_id!r}: {name} is gone ({reason}): close this batch, and register it again once that side is back"
        error: EthaRayError = PeerLostError(text) if lost else BatchClosedError(text)
        transfer = self.transfer
        needed = registration in self.registered.sources or registration in self.registered.targets
        if self.state is BatchState.REGISTERING:
            # Only a member that was ready says this, and then all have agreed.
            self.early.setdefault(registration, (reason, lost, completed))
            self.work.confirm(registration)
        if self.state is BatchState.READY:
            self.state, self.error = BatchState.LOST, error
        if self.state is not BatchState.LOST:
            return
        self.gone.setdefault(registration, completed)
        if transfer is None or transfer.state is not TransferState.ASKING:
            self.announced.pop(registration, None)
        if transfer is None or not needed:
            return
        if transfer.state in (TransferState.MOVING, TransferState.ASKING):
            self._tear(f"{name} went away ({reason})", registration)
        elif transfer.state is not TransferState.ANNOUNCED or registration in transfer.outstanding:
            self.cancel(error)

    def lose_agent(self, incarnation: str, reason: str) -> None:
        """An agent is gone, or what it said may be."""
        if self.state is BatchState.REGISTERING and self.work.has_agreed:
            self.early_agents[incarnation] = reason  # it may have taken this batch for ready, and spoken
        for registration, peer in self.registered.others.items():
            if peer.member.agent.incarnation == incarnation:
                self.lose(registration, reason, lost=True)

    def _tear(self, why: str, source: str) -> None:
        transfer = self.transfer
        if transfer is None or source not in self.registered.sources:
            return
        if transfer.state is TransferState.MOVING:
            transfer.torn = why
        elif transfer.state is TransferState.ASKING and source in transfer.outstanding:
            self.announced.pop(source, None)
            transfer.torn = why
            self._finish(self._torn(transfer))

    # -------------------------------------------------------------------------------------------------- helpers

    def _name(self, registration: str) -> str:
        peer = self.registered.others.get(registration)
        return peer.name if peer is not None else "a peer"

    def _tell(
        self,
        peer: Peer,
        kind: type[DataReady] | type[DataRead] | type[DataStands] | type[DataTaken] | type[DataRevoked],
        source: str,
        target: str,
        sequence: int,
        seconds: float = 0.0,
    ) -> None:
        message = kind(batch_id=self.batch_id, source=source, target=target, sequence=sequence)
        if isinstance(message, DataTaken):
            message.seconds = seconds
        self.bus.tell(peer.member.agent, message)

    def _say_closed(self, reason: str, lost: bool) -> None:
        for peer in self.registered.others.values():
            self.bus.tell(
                peer.member.agent,
                RegistrationClosed(
                    batch_id=self.batch_id,
                    closed=self.registration,
                    target=peer.registration,
                    reason=reason,
                    lost=lost,
                    completed=self.completed,
                ),
            )

    def _release_if_idle(self) -> None:
        if self.state is not BatchState.CLOSED or self.transfer is not None or self.job is not None:
            return
        self.registered.close()
        callbacks, self.closing = self.closing, []
        for callback in callbacks:
            callback()

    def waits_for(self, transfer: _Transfer) -> str:
        """Whom the transfer waits for, in words; empty while bytes move."""
        if transfer.state is TransferState.BLOCKED:
            return "the other side has not registered the batch"
        if transfer.state is TransferState.ANNOUNCED:
            names = sorted(self._name(registration) for registration in transfer.outstanding)
            return f"{', '.join(names)} did not receive"
        if transfer.state is TransferState.WAITING:
            names = sorted(peer.name for registration, peer in self.registered.sources.items() if registration not in self.announced)
            return f"{', '.join(names)} did not send"
        return ""

    def _who_is_missing(self, transfer: _Transfer) -> str:
        what = f"{transfer.command.transfer_type} of batch {self.batch_id!r} was not over after {transfer.command.timeout:g} s: "
        remedy = {
            TransferState.ANNOUNCED: ". Call transfer('recv') there, or give more time",
            TransferState.WAITING: ". Call transfer('send') there, or give more time",
        }
        return what + self.waits_for(transfer) + remedy.get(transfer.state, "")
