"""The reader's end of a communicator: it receives the rounds that the owner says it sends, one run after the other."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable

from etha_ray.errors import EthaRayError, HandleExpiredError, IntegrityError, PeerLostError, error_class
from etha_ray.transport.nccl.communicator import RECEIVER
from etha_ray.transport.network import wire
from etha_ray.transport.network.device import Device
from etha_ray.transport.network.fetching import DataPath, Job
from etha_ray.transport.network.joining import End, Flight
from etha_ray.transport.network.rounds import Rounds
from etha_ray.transport.network.slots import DEPTH, Slot

_LOOK_EVERY = 0.02
"""Seconds between two looks at what is not said on the channel: whether the communicator failed."""


class Taking(Job):
    """A run by communicator.

    Args:
        finished, describe: see `Job`.
    """

    def __init__(self, program: int, rounds: Rounds, finished: Callable[[Job], None], describe: Callable[[int], str]) -> None:
        super().__init__(program, finished, describe)
        self.rounds = rounds
        self.over = False


class _Withdrawn(Exception):
    """A run was cancelled before the owner was asked for it."""


class Taker(End[Taking], DataPath[Taking]):
    """One session's. Its runs take turns.

    Args:
        say: sends a message to the owner.
        forget: called with a program that the owner has no more.
        failure_timeout: seconds that the owner has to end a run that was cancelled.
    """

    def __init__(
        self,
        device: Device,
        peer: str,
        unique_id: bytes,
        say: Callable[[wire.FromReader], None],
        forget: Callable[[int], None],
        broken: Callable[[EthaRayError], None],
        failure_timeout: float,
    ) -> None:
        super().__init__(
            device, RECEIVER, peer, lambda error: say(wire.Broken(type(error).__name__, str(error)[: wire.MAX_REASON])), broken
        )
        self._unique_id = unique_id
        self._say = say
        self._forget = forget
        self._failure_timeout = failure_timeout
        self._runs = itertools.count(1)
        self._run = 0
        self._launched = 0
        self._ended: wire.Ended | None = None

    def submit(self, job: Taking) -> None:
        """As in the interface."""
        with self._changed:
            error = self._error
            if error is None:
                self._waiting.append(job)
                self._changed.notify_all()
                return
        self._drop(job, error)

    def cancel(self, job: Taking, error: EthaRayError) -> None:
        """As in the interface."""
        with self._changed:
            if job.over:
                return
            job.error = job.error or error
            waits = job in self._waiting
            if waits:
                self._waiting.remove(job)
            self._changed.notify_all()
        if waits:
            self._drop(job, error)

    def hear(self, said: wire.Launched | wire.Ended) -> None:
        """What the owner says of the run. On the channel's thread."""
        with self._changed:
            if said.run != self._run or self._ended is not None:
                raise PeerLostError(f"{self._peer} spoke of a run that is not under way; run the same etha_ray on both sides")
            if isinstance(said, wire.Launched):
                self._launched += 1
            else:
                self._ended = said
            self._changed.notify_all()

    def _identify(self) -> bytes:
        return self._unique_id

    def _drop(self, job: Taking, error: EthaRayError | None) -> None:
        with self._changed:
            job.error, job.over = job.error or error, True
        job.finished(job)

    def _serve(self, job: Taking) -> None:
        def wanted() -> None:
            self._check()
            if job.error is not None:
                raise _Withdrawn

        try:
            with self._device.receiving.take(wanted) as slot:
                try:
                    wanted()
                    error = self._take(job, slot)
                except _Withdrawn:
                    raise
                except BaseException as failure:
                    self._quiet(slot, failure)
                    raise
        except _Withdrawn:
            error = None
        self._drop(job, error)

    def _take(self, job: Taking, slot: Slot) -> EthaRayError | None:
        """Receive what comes; why that is not all, or not right."""
        with self._changed:
            self._run, self._launched, self._ended = next(self._runs), 0, None
        self._say(wire.Pull(job.program, self._run))
        flight = Flight(self._settle)
        taken = 0
        while (ended := self._next_round(job, taken)) is None:
            if taken == len(job.rounds):
                raise PeerLostError(f"{self._peer} sends more rounds than the {taken} that there are; run the same etha_ray on both sides")
            flight.make_room()
            lane, loaded = slot.lanes[taken % DEPTH], job.rounds.load(taken, slot)
            self._hand_over(lambda communicator, loaded=loaded, lane=lane: communicator.receive(loaded.messages, lane))  # type: ignore[misc]
            # The next round arrives after this one, and while this one is unpacked.
            slot.lanes[(taken + 1) % DEPTH].after(lane)
            if loaded.sums is not None:
                loaded.sums.enqueue(lane)
            if loaded.copies is not None:
                loaded.copies.enqueue(lane)
            flight.add(lane, loaded)
            taken += 1
        return self._judge(job, ended, taken, flight.landed())

    def _next_round(self, job: Taking, taken: int) -> wire.Ended | None:
        """Return once the owner sends another round, or with why it does not. Tells it of a cancellation meanwhile."""
        told: float | None = None
        with self._changed:
            while True:
                self._check()
                if self._launched > taken:
                    return None
                if self._ended is not None:
                    return self._ended
                if job.error is not None and told is None:
                    told = time.monotonic()
                    self._say(wire.Stop(self._run))
                if told is not None and time.monotonic() - told > self._failure_timeout:
                    raise self._failure(f"a run that was cancelled was not ended by its owner within {self._failure_timeout:g} s")
                self._changed.wait(_LOOK_EVERY)

    def _judge(self, job: Taking, ended: wire.Ended, taken: int, sums: list[int]) -> EthaRayError | None:
        if ended.kind:
            if ended.kind == HandleExpiredError.__name__:
                self._forget(job.program)
            return error_class(ended.kind)(f"{self._peer}: {ended.message}")
        if taken != len(job.rounds) or len(ended.checksums) != len(sums):
            raise PeerLostError(f"{self._peer} sent {taken} of {len(job.rounds)} rounds; run the same etha_ray on both sides")
        for number, (sent, arrived) in enumerate(zip(ended.checksums, sums, strict=True)):
            if sent != arrived:
                return IntegrityError(
                    f"{job.describe(number)}: what arrived from {self._peer} by NCCL has not the checksum that it was sent with"
                    " (bytes changed on the way, or their sender wrote to them meanwhile)"
                )
        return None
