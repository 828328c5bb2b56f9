"""One end of a session's communicator: made and warmed on a thread of its own, which then runs one transfer after the other on it.

A communicator lives and dies with its session. Its thread is the only one that uses it, and never waits for the device but by looking, so
that whatever ends the session, or a communicator that fails or stands still, ends the wait: then it is aborted, which frees the device.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import Generic, TypeVar

from etha_ray.accelerator import Lane
from etha_ray.config import nccl_interface
from etha_ray.errors import CommunicatorError, EthaRayError, TransferError
from etha_ray.transport.nccl import Communicator
from etha_ray.transport.nccl.communicator import SENDER
from etha_ray.transport.network.device import Device
from etha_ray.transport.network.rounds import Loaded
from etha_ray.transport.network.slots import DEPTH, Slot

logger = logging.getLogger(__name__)

JOIN_TIMEOUT = 60.0
"""Seconds in which both ends must have joined a communicator."""

STALLED = 120.0
"""Seconds after which a round that both ends have handed over, and that is not done, shows that the communicator stands still."""

_FIRST_PAUSE, _LONGEST_PAUSE = 2e-5, 2e-4
_WARM_BYTES = 256
_GRACE = 1.0

T = TypeVar("T")


class Flight:
    """The rounds that one run has handed over and not waited for yet, `DEPTH` at the most, and the checksums of those that are done.

    ``settle`` waits until a lane is done.
    """

    def __init__(self, settle: Callable[[Lane], None]) -> None:
        self._settle = settle
        self._rounds: deque[tuple[Lane, Loaded]] = deque()
        self._sums: list[int] = []

    @property
    def last(self) -> Lane | None:
        """The lane of the round that was handed over last, if it is not done."""
        return self._rounds[-1][0] if self._rounds else None

    def make_room(self) -> None:
        """Wait until one more may be handed over."""
        if len(self._rounds) == DEPTH:
            self._land()

    def add(self, lane: Lane, loaded: Loaded) -> None:
        """A round was handed over."""
        self._rounds.append((lane, loaded))

    def landed(self) -> list[int]:
        """Wait until all are done; the checksums of all of the run's messages, in their order."""
        while self._rounds:
            self._land()
        return self._sums

    def _land(self) -> None:
        lane, loaded = self._rounds.popleft()
        self._settle(lane)
        if loaded.sums is not None:
            self._sums.extend(loaded.sums.values())


class End(ABC, Generic[T]):
    """What both ends have in common. The thread starts with `start`, and ends with `end`.

    Args:
        device: whose memory the messages lie in.
        rank: `SENDER` or `RECEIVER`.
        peer: how errors call the other end.
        tell: has the other end hear that the communicator cannot be used any more: called once, on the end's thread, unless the session's
            end is why.
        broken: called after `tell`, with why, once that is certain.
    """

    def __init__(
        self, device: Device, rank: int, peer: str, tell: Callable[[EthaRayError], None], broken: Callable[[EthaRayError], None]
    ) -> None:
        self.joined: Future[None] = Future()
        """Done when the communicator can be used; or why it cannot."""
        self._device = device
        self._rank = rank
        self._peer = peer
        self._tell = tell
        self._broken = broken
        self._changed = threading.Condition()
        self._waiting: deque[T] = deque()
        self._error: EthaRayError | None = None
        self._certain = False  # what failed did so here first
        self._told = False
        self._communicator: Communicator | None = None
        self._thread = threading.Thread(target=self._main, name=f"etha-ray-nccl {peer}", daemon=True)

    def start(self) -> None:
        """Begin to join."""
        self._thread.start()

    def end(self, error: EthaRayError) -> None:
        """The session is over: all that runs, or waits to, fails with ``error``. From any thread; does not wait."""
        with self._changed:
            self._error = self._error or error
            self._changed.notify_all()

    def wait(self) -> None:
        """Return once its thread has ended; after `end`."""
        if threading.current_thread() is not self._thread and self._thread.ident is not None:
            self._thread.join()

    # -------------------------------------------------------------------------------------------- for who inherits

    @abstractmethod
    def _identify(self) -> bytes:
        """The communicator's unique id. On the end's thread."""

    @abstractmethod
    def _serve(self, job: T) -> None:
        """Do what was asked for. What it raises ends the communicator."""

    @abstractmethod
    def _drop(self, job: T, error: EthaRayError) -> None:
        """What was asked for was not begun, or not ended by `_serve`; ``error`` is why. Nothing of it touches the tensors any more."""

    def _check(self) -> None:
        """Raise if the session is over, or the communicator failed."""
        if self._error is not None:
            raise self._error
        if self._communicator is not None:
            try:
                self._communicator.ready()
            except CommunicatorError as error:
                raise self._failure(str(error)) from error

    def _until(self, done: Callable[[], bool], limit: float, what: str) -> None:
        """Wait until ``done``, while nothing fails; raise `CommunicatorError` that it was not within ``limit`` seconds ``what``."""
        pause, began = _FIRST_PAUSE, time.monotonic()
        while not done():
            self._check()
            if time.monotonic() - began > limit:
                self._certain = True
                raise self._failure(f"was not {what} within {limit:g} s")
            time.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE)

    def _hand_over(self, call: Callable[[Communicator], None]) -> None:
        """Give the communicator a group, and wait until its lane has it: only then may the lane be given more."""
        self._give_group(call)
        self._until(self._ready, STALLED, "taking messages")

    def _give_group(self, call: Callable[[Communicator], None]) -> None:
        assert self._communicator is not None
        communicator = self._communicator
        try:
            call(communicator)
        except CommunicatorError as error:
            raise self._failure(str(error)) from error

    def _ready(self) -> bool:
        assert self._communicator is not None
        try:
            return self._communicator.ready()
        except CommunicatorError as error:
            raise self._failure(str(error)) from error

    def _settle(self, lane: Lane) -> None:
        """Wait until all that ``lane`` was given is done: a round that both ends have handed over."""
        self._until(lane.done, STALLED, "done with what both ends had handed over")

    def _quiet(self, slot: Slot, error: BaseException) -> None:
        """Make sure that nothing on the slot's lanes touches memory any more, after a failure."""
        if self._error is None and isinstance(error, EthaRayError) and not isinstance(error, CommunicatorError):
            # NCCL is not why: the other end hears it before the abort lets it fail, too, and takes that for the cause.
            self._certain = True
            self._accuse(error)
        self._abort()
        for lane in slot.lanes:
            with contextlib.suppress(TransferError):  # what failed on the device has been said
                lane.wait()

    def _failure(self, said: str) -> CommunicatorError:
        interface = nccl_interface() or "not set, so NCCL chooses"
        return CommunicatorError(
            f"NCCL between this agent and {self._peer}: {said}. Both live and hear one another by TCP: see what NCCL says with"
            f" NCCL_DEBUG=INFO. Both hosts must reach one another on the interface that it takes (NCCL_SOCKET_IFNAME is {interface}), and"
            " have the same NCCL"
        )

    # ----------------------------------------------------------------------------------------------- the thread's

    def _main(self) -> None:
        job: T | None = None
        try:
            self._join()
            self.joined.set_result(None)
            while True:
                job = None
                job = self._next()
                self._serve(job)
        except Exception as error:
            if not isinstance(error, EthaRayError):
                logger.exception("the communicator with %s failed", self._peer)
                error = TransferError(f"NCCL between this agent and {self._peer} failed: {error}")
            _let_go(error)
            self._finish(self._cause(error), job)
            job = None  # the error refers to this frame

    def _next(self) -> T:
        """The next job; raises why there is none any more."""
        with self._changed:
            while True:
                if self._error is not None:
                    raise self._error
                if self._waiting:
                    return self._waiting.popleft()
                self._changed.wait()

    def _cause(self, error: EthaRayError) -> EthaRayError:
        """Why what failed with ``error`` did. A communicator fails, too, when its other end dies or gives up: the channel says so then."""
        if self._error is None:
            self._abort()
            self._accuse(error)
            if isinstance(error, CommunicatorError):
                with self._changed:
                    self._changed.wait_for(lambda: self._error is not None, _GRACE)
        if self._error is None or (self._certain and isinstance(self._error, CommunicatorError)):
            return error
        return self._error

    def _accuse(self, error: EthaRayError) -> None:
        if not self._told:
            self._told = True
            self._tell(error)

    def _finish(self, error: EthaRayError, job: T | None) -> None:
        with self._changed:
            ours = self._error is None
            self._error = self._error or error
            left = [*([] if job is None else [job]), *self._waiting]
            self._waiting.clear()
        self._abort()
        if not self.joined.done():
            self.joined.set_exception(error)
        if ours:
            self._broken(error)
        for each in left:
            self._drop(each, error)

    def _abort(self) -> None:
        if self._communicator is not None:
            try:
                self._communicator.abort()
            except Exception:
                logger.exception("the communicator with %s could not be aborted", self._peer)

    def _join(self) -> None:
        """Join, and send a first message, which has NCCL connect the two devices: no transfer waits for that."""
        assert self._device.communicators is not None
        accelerator = self._device.accelerator
        self._device.warm()
        try:
            self._communicator = self._device.communicators.join(self._identify(), self._rank)
        except CommunicatorError as error:
            raise self._failure(str(error)) from error
        self._until(self._ready, JOIN_TIMEOUT, "joined by both")
        lane, memory = accelerator.lane(alone=True), accelerator.empty(_WARM_BYTES)
        message = [(memory.data_ptr(), memory.nbytes)]
        sends = self._rank == SENDER
        try:
            self._give_group(lambda communicator: communicator.send(message, lane) if sends else communicator.receive(message, lane))
            self._until(lambda: self._ready() and lane.done(), JOIN_TIMEOUT, "connected")
        except EthaRayError:
            self._abort()
            with contextlib.suppress(TransferError):  # what failed on the device has been said
                lane.wait()  # its memory is given back after
            raise


def _let_go(error: BaseException | None) -> None:
    """Have ``error`` not refer to the calls that it went through: whoever keeps it would keep their tensors."""
    while error is not None:
        error.__traceback__ = None
        error = error.__cause__ or error.__context__
