"""Whose turn it is to transfer a batch, where a transfer that was given up cannot be ended in its midst. Owned by the agent's loop."""

from __future__ import annotations

import time
from typing import Protocol

from etha_ray.errors import EthaRayError, TransferTimeoutError
from etha_ray.tensor_bus.agreement import Direction
from etha_ray.tensor_bus.bus import Member
from etha_ray.tensor_bus.commands import Transfer
from etha_ray.tensor_bus.semaphores import waited_for
from etha_ray.tensor_bus.transfer_state import UnderWay
from etha_ray.tensor_bus.waits import Waits


class Transferred(Member, Protocol):
    """What this needs of a batch beside what its two sides need."""

    def refusal(self, direction: Direction) -> EthaRayError | None:
        """Why a transfer cannot begin, or go on."""

    def want(self) -> None:
        """Its worker wants to go on."""

    def give_up(self, command_id: int) -> None:
        """The worker does not wait any more for this command."""

    def begin(self, command: Transfer, asked: float) -> None:
        """Begin a transfer that was asked for at ``asked``, by the monotonic clock."""


class TurnWaits(Waits[Transfer]):
    """Transfers that wait for their turn."""

    def pop(self) -> tuple[Transfer, float] | None:
        """The first that is still waited for, and when it was asked; None if there is none."""
        while self.waiting:
            command, asked = self.waiting.pop(0)
            if not command.blocking or waited_for(command.semaphore_name or ""):
                return command, asked
        return None

    def expire(self, now: float) -> None:
        """Answer those whose time is up."""
        for command in self._expired(now):
            what = "an earlier call, which was given up, or one that waits for it, was still under way"
            why = f"batch {command.batch_id!r}: {what}; that has not changed within {command.timeout:g} s"
            self.refuse(command, TransferTimeoutError(why))


class Turns:
    """The transfers of ``member``, one at a time. ``waits``: those that come later."""

    def __init__(self, member: Transferred) -> None:
        self._member = member
        self.waits = TurnWaits(member.bus.answer, member.bus.refuse)

    def start(self, command: Transfer) -> None:
        """Begin a transfer; in its turn, if one is under way that was given up and cannot be ended now, or others wait for that already.

        Raises TransferInProgressError if any other is under way, and what ``begin`` raises.
        """
        under_way, now = self._member.transfer, time.monotonic()
        if under_way is not None and not self._given_up(under_way):
            raise under_way.in_the_way_of(command)
        if self._member.transfer is not None or self.waits.waiting:
            self.waits.add(command, now)
        else:
            self._member.begin(command, now)

    def over(self) -> None:
        """The transfer under way is over: it is the next one's turn, once what its worker has said meanwhile is known."""
        if self.waits.waiting:
            self._member.bus.soon(self._next)

    def _next(self) -> None:
        self.waits.expire(time.monotonic())
        turn = self.waits.pop() if self._member.transfer is None else None
        if turn is not None:
            self._begin(*turn)

    def _begin(self, command: Transfer, asked: float) -> None:
        member = self._member
        try:
            refusal = member.refusal(command.transfer_type)
            if refusal is not None:
                member.want()
                raise refusal
            member.begin(command, asked)
        except Exception as error:  # the loop goes on, and the worker learns of it
            if member.transfer is not None:
                member.finish(error)
            else:
                member.bus.refuse(command, error)
                self.over()

    def _given_up(self, transfer: UnderWay) -> bool:
        """Whether the worker waits no more for what it did wait for: it may have been kept from saying so."""
        command = transfer.command
        if not transfer.given_up and command.blocking and not waited_for(command.semaphore_name or ""):
            self._member.give_up(command.command_id)
        return transfer.given_up
