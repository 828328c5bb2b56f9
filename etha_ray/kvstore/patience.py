"""For how long a store may be silent before a request to it is given up."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

OUTAGE = 30.0
"""Seconds that a request may take, or keeps trying, while nobody answers. Ray ends its own processes after 60 s without a GCS: who
waits for that store hears of it before."""
ATTEMPT = 5.0
"""Seconds that one request has at least, also in a wait whose own time is up: a slow answer is better than none."""
LEAVE = 2.0
"""Seconds that it may take once the store is being closed."""


class OwnDeadline:
    """When each thread's requests are to be over, where it has said so. For any number of threads."""

    def __init__(self) -> None:
        self._thread = threading.local()

    @contextmanager
    def until(self, deadline: float) -> Iterator[None]:
        """Within the block this thread's is ``deadline`` (of `time.monotonic`)."""
        self._thread.deadline = deadline
        try:
            yield
        finally:
            del self._thread.deadline

    @property
    def moment(self) -> float:
        """This thread's; infinity where it has none."""
        return float(getattr(self._thread, "deadline", math.inf))


class Patience(OwnDeadline):
    """How long a request may take now.

    Args:
        timeout: seconds that a store's maker gives a request; `OUTAGE` at most.
        closing: set once the store is being closed.
    """

    def __init__(self, timeout: float, closing: threading.Event) -> None:
        super().__init__()
        self._most = min(timeout, OUTAGE)
        self._closing = closing

    @property
    def seconds(self) -> float:
        """For a request that this thread makes now."""
        if self._closing.is_set():
            return min(self._most, LEAVE)
        return min(self._most, max(ATTEMPT, self.moment - time.monotonic()))
