"""A watch: the keys under a prefix, and every change of them, as events.

Built once for all backends, on looks at the whole prefix and the differences between them; the backend only says when to look again. So
what an event means is the same everywhere: the key's value is now this, and was something else when the watch last looked.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from contextlib import ExitStack
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING

from etha_ray.errors import StoreClosedError, StoreTimeoutError

if TYPE_CHECKING:
    from etha_ray.kvstore.base import KVStore


@dataclass(frozen=True)
class KeyEvent:
    """``key`` has become ``value``; None: it is gone, deleted or run out with its lease."""

    key: str
    value: bytes | None


class Watch:
    """The changes of the keys under a prefix since it was made; made by `KVStore.watch`.

    Several changes of one key between two looks come as one event, with the last value; a key that ended as it was comes as none. The
    last change is never lost: whoever puts all events on top of `initial` has what `KVStore.list` returns once nobody writes any more.

    A context manager that closes itself, and an iterator that waits for each event for as long as it takes and ends when the watch is
    closed; when the store is, it raises `StoreClosedError`. One thread takes the events; any may `close`.
    """

    def __init__(self, store: KVStore, prefix: str, component: str) -> None:
        self._store, self._prefix, self._component = store, prefix, component
        self._closed = False
        self._taking = threading.Lock()
        self._events: deque[KeyEvent] = deque()
        with ExitStack() as stack:
            self._sleep = stack.enter_context(store._changes(store._full(prefix, component)))
            self._known = store.list(prefix, component=component)
            self._stack = stack.pop_all()
        self.initial: dict[str, bytes] = dict(self._known)
        """The keys and their values when the watch was made, in the order of the keys."""

    def next(self, timeout: float = 3600.0) -> KeyEvent:
        """The next event; ``timeout`` is in seconds, and 0 looks once.

        Raises `StoreTimeoutError` (a `TimeoutError`) naming the prefix and the seconds, `StoreUnavailableError` when the backend cannot be
        reached, and `StoreClosedError` when the watch or the store is closed, also while it waits.
        """
        deadline = time.monotonic() + timeout
        with self._taking, self._store._within(deadline):
            while True:
                if self._closed:
                    raise StoreClosedError(f"{self!r} was closed; make a new one with KVStore.watch")
                if not self._events:
                    self._look()
                if self._events:
                    return self._events.popleft()
                if time.monotonic() >= deadline:
                    raise StoreTimeoutError(f"no key {self._prefix + '*'!r} changed within {timeout:g} s in {self._store!r}")
                self._sleep(deadline)

    def close(self) -> None:
        """Ends the watch, and a `next` that another thread is in. Closing twice is fine, before or after the store."""
        self._closed = True
        self._store._wake()
        with self._taking:
            self._stack.close()

    def __iter__(self) -> Watch:
        return self

    def __next__(self) -> KeyEvent:
        while True:
            try:
                return self.next()
            except StoreTimeoutError:
                continue
            except StoreClosedError:
                if not self._closed:
                    raise
                raise StopIteration from None

    def __enter__(self) -> Watch:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def __repr__(self) -> str:
        state = "closed" if self._closed else "open"
        return f"<Watch of {self._prefix + '*'!r} in component {self._component!r} of {self._store!r} {state}>"

    def _look(self) -> None:
        before, now = self._known, self._store.list(self._prefix, component=self._component)
        for key in sorted(before.keys() | now.keys()):
            if before.get(key) != now.get(key):
                self._events.append(KeyEvent(key, now.get(key)))
        self._known = now
