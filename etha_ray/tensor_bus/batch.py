"""A registered batch, and the transfer of it that is under way. Owned by the agent's loop.

States of a batch::

    REGISTERING ──► READY ──► LOST      another member closed or died; `error` says which
         └───────────┴──────► CLOSED

Members do not wait for one another: one that has done its part of a transfer may close before another one begins its own. So in a
batch that is LOST a transfer still begins where the lost member had completed it and is not needed for it.

What states a transfer has is drawn in `transfer_state`; which version the tensors hold is kept in `versions`.
"""

from __future__ import annotations

import enum
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

from etha_ray.config import FAILURE_TIMEOUT
from etha_ray.errors import (
    AgentFailedError,
    BatchClosedError,
    BatchTornError,
    EthaRayError,
    PeerLostError,
    TransferTimeoutError,
    VersionMismatchError,
    error_class,
)
from etha_ray.tensor_bus.bus import Bus
from etha_ray.tensor_bus.commands import (
    BaseCommand,
    DataMessage,
    DataRead,
    DataReady,
    DataRefused,
    DataRevoked,
    DataStands,
    DataTaken,
    RegistrationClosed,
    Transfer,
    WaitVersion,
)
from etha_ray.tensor_bus.history import Flow, flow_key
from etha_ray.tensor_bus.jobs import Job
from etha_ray.tensor_bus.registration import Peer, Registered, Registration
from etha_ray.tensor_bus.transfer_state import TransferState, UnderWay, silent_senders
from etha_ray.tensor_bus.versions import Announced, Holding, VersionWaits, agreed_version

_ANSWER_TIMEOUT = 3 * FAILURE_TIMEOUT
"""Seconds in which the loop of an agent that lives answers, however busy its host is."""


class BatchState(enum.Enum):
    """See the top of this file."""

    REGISTERING = "registering"
    READY = "ready"
    LOST = "lost"
    CLOSED = "closed"


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
    announced: dict[str, Announced] = field(default_factory=dict)
    transfer: UnderWay | None = None
    holding: Holding = field(default_factory=Holding)
    early: dict[str, tuple[str, bool, int]] = field(default_factory=dict)
    early_agents: dict[str, str] = field(default_factory=dict)
    closing: list[Callable[[], None]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.waits = VersionWaits(self.bus.answer, self.bus.refuse)

    # ------------------------------------------------------------------------------------------- worker's calls

    def refusal(self, direction: Literal["send", "recv"]) -> EthaRayError | None:
        """Why a transfer cannot begin, or go on; None if it can."""
        if self.state is not BatchState.LOST:
            return self.error
        needed = self.registered.targets if direction == "send" else self.registered.sources
        done_by_all = all(completed > self.completed for completed in self.gone.values())
        return None if done_by_all and needed.keys().isdisjoint(self.gone) else self.error

    def start(self, command: Transfer) -> None:
        """Begin a transfer; the caller has checked that none is under way and that there is no `refusal`.

        Raises ConfigError or BatchTornError for a version that cannot be sent.
        """
        transfer = UnderWay.of(command)
        if command.transfer_type == "send":
            transfer.version = self.holding.next_send(self.batch_id, command.version)
        self.transfer = transfer
        self.advance()

    def wait_version(self, command: WaitVersion) -> None:
        """Answer once the tensors hold this version or a later one."""
        self.waits.add(command, time.monotonic())
        if self.holding.version:
            self.waits.reach(self.holding.version)
        self._end_waits()

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
        self.waits.fail(error)
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
            self.waits.fail(error)
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
    def waiting(self) -> bool:
        """Whether anything waits that may have a `deadline`."""
        return self.transfer is not None or bool(self.waits.waiting)

    @property
    def deadline(self) -> float | None:
        """When `expire` has something to do, by the monotonic clock."""
        return min((deadline for deadline in (self._transfer_deadline, self.waits.deadline) if deadline is not None), default=None)

    @property
    def _transfer_deadline(self) -> float | None:
        transfer = self.transfer
        return None if transfer is None or transfer.state is TransferState.MOVING else transfer.deadline

    def expire(self, now: float) -> None:
        """End what waits and whose time is up; a transfer that is MOVING ends by itself."""
        if self.waits.waiting:
            self.waits.expire(now, self._version_state())
        transfer, deadline = self.transfer, self._transfer_deadline
        if transfer is None or deadline is None or now < deadline:
            return
        if transfer.state is TransferState.ASKING:
            # What was announced stays so: should the senders answer after all, receiving again takes it.
            names = ", ".join(sorted(map(self._name, transfer.outstanding)))
            transfer.torn = f"{names} did not say whether it still stood"
            self._finish(self._torn(transfer))
        else:
            self.cancel(TransferTimeoutError(transfer.who_is_missing(self.registered, self.announced)))

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
            self._receive(transfer)

    def _announce(self, transfer: UnderWay) -> None:
        transfer.state = TransferState.ANNOUNCED
        self.sequence += 1
        transfer.outstanding = set(self.registered.targets)
        transfer.flows = tuple(
            Flow(flow_key(self.registration, registration, self.sequence), peer.name, peer.bytes)
            for registration, peer in self.registered.targets.items()
        )
        chosen = transfer.command.version is not None
        for registration, peer in self.registered.targets.items():
            self._tell(peer, DataReady, self.registration, registration, self.sequence, version=transfer.version, chosen=chosen)
        if not transfer.outstanding:
            self._finish(None)

    def _receive(self, transfer: UnderWay) -> None:
        """All senders have announced: read, if they mean the same version."""
        sources = self.registered.sources
        try:
            by_name = {peer.name: self.announced[registration] for registration, peer in sources.items()}
            transfer.version = agreed_version(self.batch_id, by_name, self.holding.last)
        except VersionMismatchError as error:
            for registration, peer in sources.items():
                sequence = self.announced.pop(registration).sequence
                self._tell(peer, DataRefused, registration, self.registration, sequence, kind=type(error).__name__, message=str(error))
            self._finish(error)
            return
        transfer.state = TransferState.MOVING
        transfer.moving_since = time.monotonic()
        program = self.registered.program
        assert program is not None
        self._hold(self.holding.tear(self.registered.received, f"version {transfer.version} is being received, or its agent was killed"))
        self.bus.move(program, self._moved)

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
                sequence = self.announced[registration].sequence
                self._tell(self.registered.sources[registration], DataRead, registration, self.registration, sequence)
            self._take_if_certain(transfer)

    def _take_if_certain(self, transfer: UnderWay) -> None:
        if transfer.outstanding:
            return
        transfer.flows = tuple(
            Flow(flow_key(registration, self.registration, self.announced[registration].sequence), peer.name, peer.bytes)
            for registration, peer in self.registered.sources.items()
        )
        for registration, peer in self.registered.sources.items():
            sequence = self.announced.pop(registration).sequence
            self._tell(peer, DataTaken, registration, self.registration, sequence, version=transfer.version, seconds=transfer.moved)
        self._finish(None)

    def _torn(self, transfer: UnderWay) -> BatchTornError:
        return BatchTornError(
            f"batch {self.batch_id!r}: {transfer.torn} while its data was being read, so the tensors may hold bytes of"
            " two versions: receive again"
        )

    def _finish(self, error: BaseException | None) -> None:
        transfer, self.transfer = self.transfer, None
        assert transfer is not None
        transfer.state, transfer.seconds = TransferState.OVER, time.monotonic() - transfer.started
        report = None if error is not None else transfer.report(self.registered)
        self._settle(transfer, error)
        if error is None:
            self.completed += 1
            self.bus.answer(transfer.command, report)
        else:
            self.bus.refuse(transfer.command, error)
        self.bus.note(transfer.past(report, error))
        self._release_if_idle()

    def _settle(self, transfer: UnderWay, error: BaseException | None) -> None:
        """Note what the tensors hold now that a transfer is over, and let those know who wait for it."""
        if error is None:
            self._hold(self.holding.complete(transfer.version))
            self.waits.reach(transfer.version)
        elif transfer.moving_since:
            self._hold(self.holding.tear(self.registered.received, str(error)))
        self._end_waits()

    def _end_waits(self) -> None:
        refusal = None if self.transfer is not None else self.refusal("recv")
        if refusal is not None:
            self.waits.fail(refusal)

    def _hold(self, holding: Holding) -> None:
        self.holding = holding
        self.bus.hold(self.client_id, self.batch_id, holding)

    def _version_state(self) -> str:
        held, transfer = self.holding, self.transfer
        what = f"batch {self.batch_id!r} is torn ({held.why})" if held.torn else f"batch {self.batch_id!r} holds version {held.version}"
        if self.state is BatchState.REGISTERING:
            return f"{what}: the other side has not registered it"
        missing = silent_senders(self.registered, self.announced)
        if missing:
            return f"{what}: {missing} did not send a newer one"
        if transfer is None or transfer.command.transfer_type == "send":
            return f"{what}: a newer one was sent, call transfer('recv') for it" if self.registered.sources else what
        return f"{what}: {transfer.version} is being received"

    # ---------------------------------------------------------------------------------------- other side's messages

    def on_ready(self, message: DataReady) -> None:
        """A sender announces its data."""
        self.announced[message.source] = Announced(message.sequence, message.version, message.chosen)
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
        if transfer is not None and asked and self._is_announced(message.source, message.sequence):
            transfer.outstanding.discard(message.source)
            self._take_if_certain(transfer)

    def on_taken(self, message: DataTaken) -> None:
        """A receiver has read this side's data."""
        transfer = self.transfer
        if transfer is None or transfer.state is not TransferState.ANNOUNCED or message.sequence != self.sequence:
            return
        transfer.outstanding.discard(message.target)
        transfer.moved = max(transfer.moved, message.seconds)
        # Where numbers are counted on, receivers may have met others at a higher one.
        transfer.version = max(transfer.version, message.version)
        if not transfer.outstanding:
            self._finish(None)

    def on_refused(self, message: DataRefused) -> None:
        """A receiver will not read this side's data, so this send fails for all."""
        transfer = self.transfer
        if transfer is None or transfer.state is not TransferState.ANNOUNCED or message.sequence != self.sequence:
            return
        transfer.outstanding.discard(message.target)
        self.cancel(error_class(message.kind)(message.message))

    def on_revoked(self, message: DataRevoked) -> None:
        """A sender takes back what it announced."""
        if not self._is_announced(message.source, message.sequence):
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
        self._end_waits()
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

    def _is_announced(self, source: str, sequence: int) -> bool:
        known = self.announced.get(source)
        return known is not None and known.sequence == sequence

    def _tell(self, peer: Peer, what: type[DataMessage], source: str, target: str, sequence: int, **more: Any) -> None:
        message = what(batch_id=self.batch_id, source=source, target=target, sequence=sequence, **more)
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

    def waits_for(self, transfer: UnderWay) -> str:
        """Whom the transfer waits for, in words; empty while bytes move."""
        return transfer.waits_for(self.registered, self.announced)
