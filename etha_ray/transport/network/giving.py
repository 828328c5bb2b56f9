"""The owner's end of a communicator: it sends the rounds of what a reader asked for, one run after the other."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Protocol

from etha_ray.errors import EthaRayError, HandleExpiredError, TransferCancelledError
from etha_ray.transport.nccl.communicator import SENDER
from etha_ray.transport.network import wire
from etha_ray.transport.network.device import Device
from etha_ray.transport.network.joining import End, Flight
from etha_ray.transport.network.rounds import Rounds
from etha_ray.transport.network.slots import DEPTH, Slot

CLOSED = "what it reads was closed by its owner; register it again on both sides"


STOPPED = "the run was stopped by its reader"


class _Stopped(Exception):
    """A run was stopped before it had its turn."""


class Readable(Protocol):
    """A program whose tensors are kept from closing for now."""

    @property
    def rounds(self) -> Rounds:
        """What is to be sent."""

    @property
    def closing(self) -> bool:
        """Whether somebody waits for the tensors to be let go."""


class Giver(End[wire.Pull]):
    """One session's.

    Args:
        say: sends a message to the reader.
        reading: keeps the tensors of a program, by its number, from closing; None where they are closed.
    """

    def __init__(
        self,
        device: Device,
        peer: str,
        say: Callable[[wire.FromOwner], None],
        reading: Callable[[int], AbstractContextManager[Readable | None]],
    ) -> None:
        super().__init__(
            device, SENDER, peer, lambda error: say(wire.Broken(type(error).__name__, str(error)[: wire.MAX_REASON])), lambda _: None
        )
        self._say = say
        self._reading = reading
        self._stopped = 0

    def pull(self, asked: wire.Pull) -> None:
        """A run that is to be sent after those before it. On the channel's thread; does not wait."""
        with self._changed:
            self._waiting.append(asked)
            self._changed.notify_all()

    def stop(self, run: int) -> None:
        """Send no more of this run, if it is not over already."""
        self._stopped = max(self._stopped, run)

    def _identify(self) -> bytes:
        assert self._device.communicators is not None
        unique_id = self._device.communicators.unique_id()
        self._say(wire.Join(unique_id))
        return unique_id

    def _drop(self, job: wire.Pull, error: EthaRayError) -> None:
        """The reader hears of it by `Broken`, or has lost the session too."""

    def _serve(self, job: wire.Pull) -> None:
        def wanted() -> None:
            self._check()
            if self._stopped >= job.run:
                raise _Stopped

        try:
            with self._device.sending.take(wanted) as slot, self._reading(job.program) as given:
                if given is None:
                    ended = wire.Ended(job.run, HandleExpiredError.__name__, CLOSED, [])
                else:
                    try:
                        ended = self._give(job, given, slot)
                    except BaseException as error:
                        self._quiet(slot, error)
                        raise
        except _Stopped:  # its reader waits for that, and not for other readers' runs
            ended = wire.Ended(job.run, TransferCancelledError.__name__, STOPPED, [])
        self._say(ended)

    def _give(self, job: wire.Pull, given: Readable, slot: Slot) -> wire.Ended:
        flight = Flight(self._settle)
        kind = message = ""
        for number in range(len(given.rounds)):
            flight.make_room()
            if given.closing:
                kind, message = HandleExpiredError.__name__, CLOSED
            elif self._stopped >= job.run:
                kind, message = TransferCancelledError.__name__, STOPPED
            if kind:
                break
            lane, loaded = slot.lanes[number % DEPTH], given.rounds.load(number, slot)
            if loaded.copies is not None:
                loaded.copies.enqueue(lane)
            if loaded.sums is not None:
                loaded.sums.enqueue(lane)
            if flight.last is not None:
                lane.after(flight.last)  # it is packed while the one before is on the wire, and sent after that
            self._say(wire.Launched(job.run))
            self._hand_over(lambda communicator, loaded=loaded, lane=lane: communicator.send(loaded.messages, lane))  # type: ignore[misc]
            flight.add(lane, loaded)
        sums = flight.landed()
        return wire.Ended(job.run, kind, message, [] if kind else sums)
