"""A registered batch, and the transfer of it that is under way. Owned by the agent's loop.

States of a batch::

    REGISTERING ──► READY ──► LOST      other members closed or died; `losing` says who
         ▲     │             │
         │     └─────────────┴──► CLOSED, from any state
         └── renewed ── LOST        by `batches`, once all is done that can be done without them

Members do not wait for one another: one that has done its part of a transfer may close before another one begins its own. So in a
batch that is LOST a transfer still begins where the lost member had completed it and is not needed for it. Any other transfer is
refused until the batch is READY again; where all that are gone come back by themselves, it waits for that (`losses.Returns`).

What states a transfer has is drawn in `transfer_state`; which version the tensors hold is kept in `versions`.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

from etha_ray.errors import (
    AgentFailedError,
    EthaRayError,
    PeerLostError,
    TransferCancelledError,
    TransferTimeoutError,
)
from etha_ray.tensor_bus.agreement import Direction
from etha_ray.tensor_bus.bus import BatchState, Bus
from etha_ray.tensor_bus.commands import BaseCommand, Transfer
from etha_ray.tensor_bus.jobs import Job
from etha_ray.tensor_bus.losing import Losing
from etha_ray.tensor_bus.losses import Returns
from etha_ray.tensor_bus.messages import (
    DataMessage,
    DataRead,
    DataReady,
    DataRefused,
    DataRevoked,
    DataStands,
    DataTaken,
    DigestPart,
    RegistrationClosed,
    RelayAnswer,
)
from etha_ray.tensor_bus.questions import Questions
from etha_ray.tensor_bus.receiving import Receiving
from etha_ray.tensor_bus.records import Standing
from etha_ray.tensor_bus.registered import Registered
from etha_ray.tensor_bus.registration import Registration
from etha_ray.tensor_bus.sending import Sending
from etha_ray.tensor_bus.transfer_state import TransferState, UnderWay
from etha_ray.tensor_bus.turns import Turns
from etha_ray.tensor_bus.versions import Holding


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
    closed: EthaRayError | None = None
    closed_as: tuple[bool, Returns] = (False, "no")
    is_renewal: bool = False
    completed: int = 0
    used: int = 0
    transfer: UnderWay | None = None
    holding: Holding = field(default_factory=Holding)
    mark: bytes = b""
    closing: list[Callable[[], None]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.sending, self.receiving, self.questions, self.losing = Sending(self), Receiving(self), Questions(self), Losing(self)
        self.turns = Turns(self)

    # ------------------------------------------------------------------------------------------- worker's calls

    def refusal(self, direction: Direction) -> EthaRayError | None:
        """Why a transfer cannot begin, or go on; None if it can, or waits until it can."""
        return self.closed or self.losing.refusal(direction)

    @property
    def loss(self) -> EthaRayError | None:
        """What to say of the members that are gone."""
        return self.losing.losses.first

    def begin(self, command: Transfer, asked: float) -> None:
        """Begin a transfer that was asked for at ``asked``, by the monotonic clock; `turns` says when.

        Raises ConfigError or BatchTornError for a version that cannot be sent.
        """
        transfer = UnderWay.of(command, asked)
        self.losing.begins(transfer)
        if command.transfer_type == "send":
            transfer.version = self.holding.next_send(self.batch_id, command.version, self.used)
        self.transfer = transfer
        if command.mark:
            self.mark = command.mark
            transfer.held = self.bus.when_passed(command.mark, partial(self._passed, transfer))
        self.advance()

    def _passed(self, transfer: UnderWay, job: Job[None]) -> None:
        """Its worker's GPU has come to where the transfer was asked for."""
        if transfer.held is not job:
            return  # it is over
        transfer.held = None
        if job.error is None:
            self.advance()
        else:
            self.finish(job.error)

    def number(self, transfer: UnderWay) -> None:
        """A send is announced for the first time: its number, if it is counted, is settled now, and never counted again."""
        if transfer.command.version is None:
            transfer.version = max(transfer.version, self.used + 1)
        self.used = max(self.used, transfer.version)

    def standing(self) -> Standing:
        """What it says of itself when it registers again."""
        pending = self.transfer.version if self.transfer is not None and self.transfer.announced else 0
        return Standing(self.holding.last, self.used, pending)

    def want(self) -> None:
        """Its worker wants to go on."""
        self.losing.want()

    def signal(self) -> bool:
        """Whether the sender's data is ready, or sent, and not yet received."""
        transfer = self.transfer
        if transfer is not None and transfer.state is TransferState.ANNOUNCED:
            return True
        return bool(self.registered.sources) and self.receiving.announced.complete

    def cancel(self, error: EthaRayError) -> None:
        """End the transfer under way with ``error``; one that is MOVING or SWAPPING ends by itself, with its own outcome."""
        transfer = self.transfer
        if transfer is None or transfer.runs:
            return
        if transfer.state is TransferState.ANNOUNCED or (transfer.state is TransferState.BLOCKED and transfer.announced):
            self.sending.revoke(transfer)
        elif transfer.state is TransferState.LENDING:
            self.finish(None)  # it has what it wanted
            return
        elif transfer.state is TransferState.ASKING and not transfer.command.atomic:
            self.hold(self.holding.tear(self.registered.received, str(error)))
        self.finish(error)

    def give_up(self, command_id: int) -> None:
        """The worker does not wait any more for this command."""
        self.questions.give_up(command_id)
        self.turns.waits.drop(command_id)
        if self.transfer is not None and self.transfer.command.command_id == command_id:
            self.transfer.given_up = True
            self.cancel(TransferCancelledError(f"batch {self.batch_id!r}: its worker gave up waiting"))

    def hurry(self, only_if_lost: bool = False) -> None:
        """The time of what is under way is up; ``only_if_lost``: if it waits for members that are gone."""
        transfer = self.transfer
        if transfer is None:
            return
        waits = transfer.state is TransferState.BLOCKED and not self.losing.can_do_without(transfer.command.transfer_type)
        if not only_if_lost or (waits and self.loss is not None):
            transfer.deadline = time.monotonic()

    def close(self, error: EthaRayError, *, lost: bool, returns: Returns = "no", then: Callable[[], None]) -> None:
        """Release everything and tell the other members; ``then`` runs once no byte moves and no job runs any more.

        ``error`` ends what is under way. ``lost``: the worker or its agent goes away, rather than closing the batch.
        """
        self.closing.append(then)
        if self.state is BatchState.CLOSED:
            return
        if self.job is not None:
            self.job.cancellation.cancel(str(error))
        self.cancel(error)
        self.state, self.closed, self.closed_as = BatchState.CLOSED, error, (lost, returns)
        self.losing.say_closed(self.registered.others, str(error), lost, returns)
        self.questions.fail(error)
        self.turns.waits.fail(error)
        self._release_if_idle()

    def registration_over(self, job: Job[Registered], now: float) -> BaseException | None:
        """Take the end of the registration's job; returns why the batch cannot be used, if so."""
        self.job = None
        if job.value is not None:
            self.registered = job.value
        if job.value is None or self.closed is not None:
            lost, returns = self.closed_as if self.closed is not None else (True, "perhaps")
            self.losing.say_closed(self.work.agreed_with, str(self.closed or job.error), lost, returns, ready=job.value is not None)
        if self.closed is not None:
            self._release_if_idle()
            return self.closed
        if job.value is None:
            error = job.error if isinstance(job.error, EthaRayError) else AgentFailedError(f"the registration failed: {job.error}")
            self.cancel(error)
            self.questions.not_registered(error, tries_again=self.is_renewal)
            if self.is_renewal:
                self.state = BatchState.LOST
                self.losing.not_renewed(error, now)
            return job.error
        self.state = BatchState.READY
        self.losing.all_there()
        standings = self.registered.standings.values()
        self.used = max([self.used, *(max(each.last, each.used) for each in standings)])
        return None

    def restored(self) -> None:
        """This batch was served by an agent that died, and all its members have to meet again."""
        self.is_renewal = True
        self.losing.restored()

    def may_renew(self, now: float) -> bool:
        """Whether it is time to register the batch again."""
        if self.state is not BatchState.LOST or self.job is not None:
            return False
        if self.transfer is not None and self.transfer.state is not TransferState.BLOCKED:
            return False
        return self.losing.may_renew(now)

    def renew(self, registration: str, work: Registration) -> None:
        """Register again under a new name, without any member that is known now. The caller starts the work."""
        self.losing.say_closed(self.registered.others, "it registers again, as others are gone", lost=True, returns="soon")
        self.registered.close()
        self.registration, self.work = registration, work
        self.registered = Registered(memberships=self.registered.memberships)  # it may be listed as a replica
        self.state, self.is_renewal = BatchState.REGISTERING, True
        self.completed = 0
        self.sending, self.receiving = Sending(self), Receiving(self)
        self.questions.renewed()
        self.losing.renewing()

    def catch_up(self) -> None:
        """Do what had to wait for the registration; after its caller has been answered."""
        self.losing.catch_up()
        refusal = None if self.transfer is None else self.refusal(self.transfer.command.transfer_type) or self.losing.split(self.transfer)
        if refusal is not None:
            self.cancel(refusal)
        self.receiving.announced.pass_over_taken()
        if self.state is BatchState.READY:
            self.questions.ready()
        if self.is_renewal and self.holding.version and self.holding.taken:  # its agent may be another one now
            self.bus.received(self, self.holding.version)
        self.advance()

    @property
    def waiting(self) -> bool:
        """Whether anything waits that may have a `deadline`."""
        return self.transfer is not None or self.questions.waiting or bool(self.turns.waits.waiting)

    @property
    def deadline(self) -> float | None:
        """When `expire` has something to do, by the monotonic clock."""
        deadlines = self._transfer_deadline, self.questions.deadline, self.turns.waits.deadline
        return min((deadline for deadline in deadlines if deadline is not None), default=None)

    @property
    def _transfer_deadline(self) -> float | None:
        transfer = self.transfer
        if transfer is None or transfer.runs:
            return None
        deadlines = transfer.deadline, self.receiving.relays_deadline(transfer)
        return min((deadline for deadline in deadlines if deadline is not None), default=None)

    def expire(self, now: float) -> None:
        """End what waits and whose time is up; a transfer that is MOVING or SWAPPING ends by itself."""
        self.questions.expire(now)
        self.turns.waits.expire(now)
        transfer, deadline = self.transfer, self._transfer_deadline
        if transfer is None or deadline is None or now < deadline:
            return
        if transfer.deadline is None or now < transfer.deadline:
            self.receiving.relays_expired(transfer)
        elif transfer.state is TransferState.LENDING:
            self.finish(None)
        elif transfer.state is TransferState.ASKING:
            self.receiving.not_answered(transfer)
        elif transfer.state is TransferState.BLOCKED and self.loss is not None:
            self.cancel(
                PeerLostError(f"{self.loss}; they were not back within {now - max(transfer.started, self.losing.losses.since):.0f} s")
            )
        else:
            self.cancel(TransferTimeoutError(transfer.who_is_missing(self.registered, self.receiving.announced)))

    # ------------------------------------------------------------------------------------------------- progress

    def advance(self) -> None:
        """Take the transfer under way as far as it goes now."""
        transfer = self.transfer
        if transfer is None or transfer.held is not None or self.state not in (BatchState.READY, BatchState.LOST):
            return  # LOST: a transfer that does not need the lost member goes on
        if transfer.state is TransferState.BLOCKED:
            if self.state is BatchState.LOST and not self.losing.can_do_without(transfer.command.transfer_type):
                return  # until all are there again
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
        transfer = self.transfer
        assert transfer is not None
        if transfer.held is not None:
            transfer.held.cancellation.cancel("the transfer is over")
            transfer.held = None
        self.receiving.over(received=error is None and transfer.command.transfer_type == "recv")
        self.transfer = None
        transfer.state, transfer.seconds = TransferState.OVER, time.monotonic() - transfer.started
        report = None if error is not None else transfer.report(self.registered)
        if error is None:
            self.hold(self.holding.complete(transfer.version, transfer.taken))
            if transfer.command.transfer_type == "recv":
                self.bus.received(self, transfer.version)
            self.completed += 1
            self.questions.reached(transfer.version)
            self.bus.answer(transfer.command, report)
        else:
            self.bus.refuse(transfer.command, error)
        self.questions.end_versions()
        self.bus.note(transfer.past(report, error))
        self.turns.over()
        self._release_if_idle()

    def hold(self, holding: Holding) -> None:
        """Note what the tensors hold from now on, where their worker can read it."""
        self.holding = holding
        self.bus.hold(self.client_id, self.batch_id, holding)

    # ---------------------------------------------------------------------------------------- other side's messages

    def hear(self, message: DataMessage) -> None:
        """Another member says something of a transfer."""
        if isinstance(message, DataReady):
            self.receiving.announced.add(message)
            self.advance()
        elif isinstance(message, DataRead):
            self.sending.on_read(message)
        elif isinstance(message, DataStands):
            self.receiving.on_stands(message)
        elif isinstance(message, DataTaken):
            self.sending.on_taken(message)
        elif isinstance(message, DataRefused):
            self.sending.on_refused(message)
        elif isinstance(message, DataRevoked):
            self.receiving.on_revoked(message)
        elif isinstance(message, RelayAnswer):
            self.receiving.on_relay(message)
        elif isinstance(message, DigestPart):
            self.questions.on_part(message)
        else:
            self.receiving.on_taker(message)

    def lose(self, message: RegistrationClosed) -> None:
        """Another member is gone."""
        self.losing.lose(message)

    def lose_agent(self, incarnation: str, reason: str) -> None:
        """An agent is gone, or what it said may be."""
        self.losing.lose_agent(incarnation, reason)

    # -------------------------------------------------------------------------------------------------- helpers

    def name(self, registration: str) -> str:
        """Another member, for messages."""
        peer = self.registered.others.get(registration)
        return peer.name if peer is not None else "a peer"

    def _release_if_idle(self) -> None:
        if self.state is not BatchState.CLOSED or self.transfer is not None or self.job is not None:
            return
        self.registered.close()
        if self.mark:
            self.bus.forget_mark(self.mark)
        callbacks, self.closing = self.closing, []
        for callback in callbacks:
            callback()

    def waits_for(self, transfer: UnderWay) -> str:
        """Whom the transfer waits for, in words; empty while bytes move."""
        return transfer.waits_for(self.registered, self.receiving.announced)
