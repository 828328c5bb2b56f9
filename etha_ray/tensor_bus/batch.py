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
from typing import Literal

from etha_ray.errors import (
    AgentFailedError,
    BatchClosedError,
    EthaRayError,
    PeerLostError,
    TransferTimeoutError,
)
from etha_ray.tensor_bus.bus import Bus
from etha_ray.tensor_bus.commands import (
    BaseCommand,
    DataMessage,
    DataRead,
    DataReady,
    DataRefused,
    DataStands,
    DataTaken,
    RegistrationClosed,
    Transfer,
    WaitVersion,
)
from etha_ray.tensor_bus.jobs import Job
from etha_ray.tensor_bus.receiving import Receiving
from etha_ray.tensor_bus.registration import Registered, Registration
from etha_ray.tensor_bus.sending import Sending
from etha_ray.tensor_bus.transfer_state import TransferState, UnderWay, silent_senders
from etha_ray.tensor_bus.versions import Holding, VersionWaits


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
    completed: int = 0
    gone: dict[str, int] = field(default_factory=dict)
    transfer: UnderWay | None = None
    holding: Holding = field(default_factory=Holding)
    early: dict[str, tuple[str, bool, int]] = field(default_factory=dict)
    early_agents: dict[str, str] = field(default_factory=dict)
    closing: list[Callable[[], None]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.sending, self.receiving = Sending(self), Receiving(self)
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
        return bool(self.registered.sources) and self.receiving.all_announced

    def cancel(self, error: EthaRayError) -> None:
        """End the transfer under way with ``error``; one that is MOVING or SWAPPING ends by itself, with its own outcome."""
        transfer = self.transfer
        if transfer is None or transfer.runs:
            return
        if transfer.state is TransferState.ANNOUNCED:
            self.sending.revoke(transfer)
        elif transfer.state is TransferState.ASKING and not transfer.command.atomic:
            self.hold(self.holding.tear(self.registered.received, str(error)))
        self.finish(error)

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
        return None if transfer is None or transfer.runs else transfer.deadline

    def expire(self, now: float) -> None:
        """End what waits and whose time is up; a transfer that is MOVING or SWAPPING ends by itself."""
        if self.waits.waiting:
            self.waits.expire(now, self._version_state())
        transfer, deadline = self.transfer, self._transfer_deadline
        if transfer is None or deadline is None or now < deadline:
            return
        if transfer.state is TransferState.ASKING:
            self.receiving.not_answered(transfer)
        else:
            self.cancel(TransferTimeoutError(transfer.who_is_missing(self.registered, self.receiving.announced)))

    # ------------------------------------------------------------------------------------------------- progress

    def advance(self) -> None:
        """Take the transfer under way as far as it goes now."""
        transfer = self.transfer
        if transfer is None or self.state not in (BatchState.READY, BatchState.LOST):
            return  # LOST: a transfer that does not need the lost member goes on
        if transfer.state is TransferState.BLOCKED:
            refused = self.registered.refused.get(transfer.command.transfer_type)
            if refused is not None:
                self.finish(refused)
                return
            if transfer.command.transfer_type == "send":
                self.sending.announce(transfer)
                return
            transfer.state = TransferState.WAITING
        self.receiving.advance(transfer)

    def finish(self, error: BaseException | None) -> None:
        """The transfer under way is over: its worker is answered. From this class and the two sides of the batch only."""
        transfer, self.transfer = self.transfer, None
        assert transfer is not None
        transfer.state, transfer.seconds = TransferState.OVER, time.monotonic() - transfer.started
        report = None if error is not None else transfer.report(self.registered)
        if error is None:
            self.hold(self.holding.complete(transfer.version))
            if transfer.command.transfer_type == "recv":
                self.bus.received(self, transfer.version)
            self.completed += 1
            self.waits.reach(transfer.version)
            self.bus.answer(transfer.command, report)
        else:
            self.bus.refuse(transfer.command, error)
        self._end_waits()
        self.bus.note(transfer.past(report, error))
        self._release_if_idle()

    def _end_waits(self) -> None:
        refusal = None if self.transfer is not None else self.refusal("recv")
        if refusal is not None:
            self.waits.fail(refusal)

    def hold(self, holding: Holding) -> None:
        """Note what the tensors hold from now on, where their worker can read it."""
        self.holding = holding
        self.bus.hold(self.client_id, self.batch_id, holding)

    def _version_state(self) -> str:
        held, transfer = self.holding, self.transfer
        what = f"batch {self.batch_id!r} is torn ({held.why})" if held.torn else f"batch {self.batch_id!r} holds version {held.version}"
        if self.state is BatchState.REGISTERING:
            return f"{what}: the other side has not registered it"
        missing = silent_senders(self.registered, self.receiving.announced)
        if missing:
            return f"{what}: {missing} did not send a newer one"
        if transfer is None or transfer.command.transfer_type == "send":
            return f"{what}: a newer one was sent, call transfer('recv') for it" if self.registered.sources else what
        return f"{what}: {transfer.version} is being received"

    # ---------------------------------------------------------------------------------------- other side's messages

    def hear(self, message: DataMessage) -> None:
        """Another member says something of a transfer."""
        if isinstance(message, DataReady):
            self.receiving.on_ready(message)
            self.advance()
        elif isinstance(message, DataRead):
            self.sending.on_read(message)
        elif isinstance(message, DataStands):
            self.receiving.on_stands(message)
        elif isinstance(message, DataTaken):
            self.sending.on_taken(message)
        elif isinstance(message, DataRefused):
            self.sending.on_refused(message)
        else:
            self.receiving.on_revoked(message)

    def lose(self, registration: str, reason: str, *, lost: bool, completed: int = 0) -> None:
        """Another member is gone, after it had completed so many transfers."""
        name = self.name(registration)
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
            self.receiving.announced.pop(registration, None)
        self._end_waits()
        if transfer is None or not needed:
            return
        if transfer.runs or transfer.state is TransferState.ASKING:
            self.receiving.spoil(transfer, registration, f"{name} went away ({reason}) while its data was being read", error)
        elif transfer.state is not TransferState.ANNOUNCED or registration in transfer.outstanding:
            self.cancel(error)

    def lose_agent(self, incarnation: str, reason: str) -> None:
        """An agent is gone, or what it said may be."""
        if self.state is BatchState.REGISTERING and self.work.has_agreed:
            self.early_agents[incarnation] = reason  # it may have taken this batch for ready, and spoken
        for registration, peer in self.registered.others.items():
            if peer.member.agent.incarnation == incarnation:
                self.lose(registration, reason, lost=True)

    # -------------------------------------------------------------------------------------------------- helpers

    def name(self, registration: str) -> str:
        """Another member, for messages."""
        peer = self.registered.others.get(registration)
        return peer.name if peer is not None else "a peer"

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
        return transfer.waits_for(self.registered, self.receiving.announced)
