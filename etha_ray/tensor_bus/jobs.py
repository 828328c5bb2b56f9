"""Work that runs beside the agent's loop.

The loop never waits: whatever reads a store, opens memory, waits for others or moves bytes is a job on a thread of its own.
A job touches nothing that the loop owns; its result comes back as a callback that the loop runs between two commands.
"""

from __future__ import annotations

import logging
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable
from typing import Generic, TypeVar

from etha_ray.errors import TransferCancelledError

logger = logging.getLogger(__name__)

T = TypeVar("T")

_FIRST_PAUSE = 0.001
_LONGEST_PAUSE = 0.05


class Cancellation:
    """Tells a job to stop. The job looks at it between its steps, and says there whom it waits for, for anyone to read."""

    def __init__(self) -> None:
        self._event = threading.Event()
        self.reason = ""
        self.waits_for = ""

    def cancel(self, reason: str) -> None:
        """Ask the job to stop; ``reason`` becomes its error's message."""
        self.reason = reason
        self._event.set()

    def check(self) -> None:
        """Raise `TransferCancelledError` once cancelled."""
        if self._event.is_set():
            raise TransferCancelledError(self.reason)

    def pause(self, seconds: float) -> None:
        """Sleep, shorter if cancelled meanwhile, and raise then."""
        self._event.wait(seconds)
        self.check()


class Backoff:
    """Pauses that grow from 1 ms to 50 ms, until ``deadline`` on the monotonic clock (None: for ever)."""

    def __init__(self, cancellation: Cancellation, deadline: float | None) -> None:
        self._cancellation = cancellation
        self._deadline = deadline
        self._pause = _FIRST_PAUSE

    def wait(self) -> bool:
        """Pause once; False when the deadline has passed. Raises `TransferCancelledError`."""
        remaining = _LONGEST_PAUSE if self._deadline is None else self._deadline - time.monotonic()
        if remaining <= 0:
            return False
        self._cancellation.pause(min(self._pause, remaining))
        self._pause = min(self._pause * 1.5, _LONGEST_PAUSE)
        return True

    def reset(self) -> None:
        """Something moved: look often again."""
        self._pause = _FIRST_PAUSE


class Job(Generic[T]):
    """One function on a thread, and what it came to."""

    def __init__(self) -> None:
        self.cancellation = Cancellation()
        self.value: T | None = None
        self.error: BaseException | None = None


class Jobs:
    """Starts jobs and keeps their results until the loop runs them."""

    def __init__(self, wake: Callable[[], None]) -> None:
        self._wake = wake
        self._results: deque[Callable[[], None]] = deque()
        self._threads: set[threading.Thread] = set()
        self._lock = threading.Lock()
        self._closed = False

    def start(self, name: str, function: Callable[[Cancellation], T], done: Callable[[Job[T]], None]) -> Job[T]:
        """Run ``function`` on a new thread; the loop then runs ``done`` with the job. From any thread."""
        job: Job[T] = Job()

        def run() -> None:
            try:
                job.value = function(job.cancellation)
            except BaseException as error:  # whatever it is, the loop answers whoever waits with it
                job.error = error
                # Its traceback refers to the job, and would keep what the job had opened until Python collects both.
                traceback.clear_frames(error.__traceback__)
            self.post(lambda: done(job))  # before the thread counts as ended: `close` looks for results after that
            self._threads.discard(threading.current_thread())

        thread = threading.Thread(target=run, name=f"etha-ray {name}", daemon=True)
        self._threads.add(thread)
        thread.start()
        return job

    def post(self, callback: Callable[[], None]) -> None:
        """Have the loop run ``callback``. From any thread."""
        self._results.append(callback)
        self.wake()

    def wake(self) -> None:
        """Have the loop look at once. From any thread; does nothing after `close`."""
        with self._lock:
            if not self._closed:
                self._wake()

    def close(self, timeout: float = 5.0) -> None:
        """Wait up to ``timeout`` seconds for the jobs under way (cancel them first) and run their results; on the loop only.

        A job that still hangs then, in a store that does not answer, is left to end with the process.
        """
        deadline = time.monotonic() + timeout
        while True:
            self.run(self.take())
            threads = list(self._threads)
            if not (threads or self._results) or time.monotonic() >= deadline:  # in this order: who ends has left its result by then
                break
            if threads:
                threads[0].join(0.02)
        with self._lock:
            self._closed = True
        self.run(self.take())

    def count(self) -> int:
        """How many callbacks have come in."""
        return len(self._results)

    def take(self, count: int | None = None) -> list[Callable[[], None]]:
        """The callbacks that have come in, in order, or the first ``count``; hand them to `run`. On the loop only."""
        return [self._results.popleft() for _ in range(len(self._results) if count is None else count)]

    def run(self, callbacks: list[Callable[[], None]]) -> None:
        """Run callbacks; on the loop only."""
        for callback in callbacks:
            try:
                callback()
            except Exception:  # one that fails must not take the loop, and everybody's transfers, with it
                logger.exception("the end of a job failed")
