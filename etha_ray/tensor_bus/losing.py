"""A batch and those that leave it: what it does when it loses members, and what it tells them when it goes. Owned by the agent's loop."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Protocol

from etha_ray.config import FAILURE_TIMEOUT, SUCCESSION_TIMEOUT
from etha_ray.errors import BatchClosedError, EthaRayError, PeerLostError
from etha_ray.tensor_bus.agreement import Direction
from etha_ray.tensor_bus.bus import BatchState, Member
from etha_ray.tensor_bus.losses import Loss, Losses, Returns
from etha_ray.tensor_bus.messages import RegistrationClosed
from etha_ray.tensor_bus.questions import Questions
from etha_ray.tensor_bus.receiving import Receiving
from etha_ray.tensor_bus.registered import Peer
from etha_ray.tensor_bus.registration import Registration
from etha_ray.tensor_bus.transfer_state import TransferState, UnderWay

_RENEW_AGAIN = 1.0
"""Seconds after which a batch that could not be registered again is tried once more."""


class Losable(Member, Protocol):
    """What this needs of a batch beside what its two sides need."""

    state: BatchState
    work: Registration
    completed: int
    receiving: Receiving
    questions: Questions

    def cancel(self, error: EthaRayError) -> None:
        """End the transfer under way."""


class Losing:
    """The ``losses`` of ``member`` since it was ready, and when it is to be registered again: at ``renew_at``, monotonic."""

    def __init__(self, member: Losable) -> None:
        self._member = member
        self.losses = Losses()
        self.renew_at: float | None = None
        self._early: dict[str, RegistrationClosed] = {}
        self._early_agents: dict[str, str] = {}

    # --------------------------------------------------------------------------------------- what can still be done

    def refusal(self, direction: Direction) -> EthaRayError | None:
        """Why a transfer cannot begin, or go on; None if it can, or waits until it can."""
        member = self._member
        if self.can_do_without(direction) or (member.state is BatchState.REGISTERING and member.work.has_agreed):
            return None  # in the latter case all are there again, and others may know that before this one
        return self.losses.final

    def can_do_without(self, direction: Direction) -> bool:
        """Whether members are gone, and a transfer needs none of them."""
        member = self._member
        needed = member.registered.targets if direction == "send" else member.registered.sources
        return member.state is BatchState.LOST and bool(needed) and self.losses.leaves_room_for(needed, member.completed)

    def begins(self, transfer: UnderWay) -> None:
        """A transfer begins: it waits for those that are gone, but not for ever."""
        if self.losses and not self.can_do_without(transfer.command.transfer_type):
            _wait_until(transfer, time.monotonic() + SUCCESSION_TIMEOUT)

    # ----------------------------------------------------------------------------------------------- others that go

    def lose(self, message: RegistrationClosed) -> None:
        """Another member is gone."""
        member, registration, now = self._member, message.closed, time.monotonic()
        name = member.name(registration)
        remedy = {
            "no": "close this batch, and register it again once that side is back",
            "perhaps": "transfers go on once that side has registered it again",
            "soon": "transfers go on once it is back",
        }[message.returns]
        text = f"batch {member.batch_id!r}: {name} is gone ({message.reason}): {remedy}"
        error: EthaRayError = PeerLostError(text) if message.lost else BatchClosedError(text)
        if member.state is BatchState.REGISTERING:
            self._early.setdefault(registration, message)
            member.work.confirm(message.agreed)
        if member.state is BatchState.READY:
            member.state = BatchState.LOST
        if member.state is not BatchState.LOST:
            return
        self.losses.add(registration, Loss(error, message.completed, message.returns, name), now)
        if message.returns != "no":
            # Who leaves in order may have come to the end, and so may this worker, in a moment.
            when = now if message.lost else now + FAILURE_TIMEOUT
            self.renew_at = when if self.renew_at is None else min(self.renew_at, when)
        transfer = member.transfer
        if transfer is None or transfer.state is not TransferState.ASKING:
            member.receiving.announced.pop(registration, None)
        member.questions.lost(error)
        if transfer is not None and (registration in member.registered.sources or registration in member.registered.targets):
            self._lose_needed(transfer, registration, f"{name} went away ({message.reason}) while its data was being read", error)
        member.receiving.lost(registration)

    def _lose_needed(self, transfer: UnderWay, registration: str, why: str, error: EthaRayError) -> None:
        if transfer.state is TransferState.LENDING:
            pass  # it has what it wanted
        elif transfer.runs or transfer.state is TransferState.ASKING:
            self._member.receiving.spoil(transfer, registration, why, error)
        elif transfer.state is TransferState.ANNOUNCED and registration not in transfer.outstanding:
            pass  # it has what it needs
        elif (final := self.losses.blamed(self._member.completed)) is not None:
            self._member.cancel(final)  # not for this one, which may have left for that
        else:
            # It waits until all are there again. Those that have taken what was announced then say so, and do not take it twice.
            transfer.state = TransferState.BLOCKED
            _wait_until(transfer, time.monotonic() + SUCCESSION_TIMEOUT)

    def lose_agent(self, incarnation: str, reason: str) -> None:
        """An agent is gone, or what it said may be."""
        member = self._member
        if member.state is BatchState.REGISTERING and member.work.has_agreed:
            self._early_agents[incarnation] = reason  # it may have taken this batch for ready, and spoken
        for registration, peer in list(member.registered.others.items()):
            agent = peer.member.agent
            if agent.incarnation == incarnation:
                message = self._closed(registration, member.registration, reason, lost=True)
                message.returns = "soon" if agent.restarts else "perhaps"
                self.lose(message)

    # -------------------------------------------------------------------------------------------- registering again

    def restored(self) -> None:
        """The batch was served by an agent that died, and all its members have to meet again."""
        error = PeerLostError(f"batch {self._member.batch_id!r}: its agent died, and the others have not met the one in its place yet")
        self.losses.add("", Loss(error, 0, "soon"), time.monotonic())

    def want(self) -> None:
        """Its worker wants to go on: those who closed the batch, or left, may be back."""
        if self._member.state is BatchState.LOST and not self.losses.trouble:
            self.renew_at = time.monotonic()

    def may_renew(self, now: float) -> bool:
        """Whether it is time to register the batch again: what can be done without those that are gone goes first, for a while."""
        if self.renew_at is None or now < self.renew_at:
            return False
        behind = self.can_do_without("send") or self.can_do_without("recv")
        return not behind or now > self.losses.since + SUCCESSION_TIMEOUT

    def renewing(self) -> None:
        """The batch is registered again: whoever is lost from now on may be of the new registration."""
        self.renew_at = None
        self._early.clear()
        self._early_agents.clear()

    def not_renewed(self, error: EthaRayError, now: float) -> None:
        """That failed."""
        self.losses.trouble, self.renew_at = error, now + _RENEW_AGAIN

    def all_there(self) -> None:
        """The batch is ready. A transfer that waited for that has its worker's time again, not that of those who were gone."""
        self.losses, self.renew_at = Losses(), None
        transfer = self._member.transfer
        if transfer is not None and transfer.state is TransferState.BLOCKED:
            transfer.deadline = transfer.latest

    def catch_up(self) -> None:
        """The batch has been registered: lose those that went meanwhile."""
        for registration, message in self._early.items():
            if registration in self._member.registered.others:
                self.lose(message)
        for incarnation, reason in self._early_agents.items():
            self.lose_agent(incarnation, reason)

    def split(self, transfer: UnderWay) -> EthaRayError | None:
        """Why a send that was announced before the registration cannot be announced again: another sender has lost its part of it.

        Some receivers may have taken all of it then, and others could only receive what that sender sends next together with this.
        """
        member = self._member
        if not transfer.announced:
            return None
        for registration in member.registered.side:
            standing = member.registered.standings[registration]
            if standing.pending != transfer.version and standing.last < transfer.version:
                return PeerLostError(
                    f"batch {member.batch_id!r}: {member.name(registration)} lost its part of version {transfer.version} when it, or its"
                    " agent, died, so not all receivers can get it any more: send again, on every rank of this side"
                )
        return None

    # ------------------------------------------------------------------------------------------------ going oneself

    def say_closed(self, others: Mapping[str, Peer], reason: str, lost: bool, returns: Returns, ready: bool = True) -> None:
        """Tell ``others`` that this member goes, or its registration; ``ready``: they may know how it agreed.

        Those that are lost, too: one whose agent only stood still would go on with a batch that all others have left.
        """
        member = self._member
        for registration, peer in others.items():
            message = self._closed(member.registration, registration, reason, lost=lost)
            message.returns, message.completed = returns, member.completed
            message.agreed = member.work.agreed if ready else ()
            say = member.bus.remind if registration in self.losses.members else member.bus.tell
            say(peer.member.agent, message)

    def _closed(self, closed: str, target: str, reason: str, *, lost: bool) -> RegistrationClosed:
        return RegistrationClosed(batch_id=self._member.batch_id, closed=closed, target=target, reason=reason, lost=lost)


def _wait_until(transfer: UnderWay, latest: float) -> None:
    transfer.deadline = latest if transfer.deadline is None else min(transfer.deadline, latest)
