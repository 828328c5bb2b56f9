"""A store for the threads of one process: tests, notebooks, Ray's local mode."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from etha_ray.kvstore.base import Change, KVStore


class _Table:
    def __init__(self) -> None:
        self.values: dict[str, bytes] = {}
        self.changed = threading.Condition()
        self.version = 0

    def touch(self) -> None:
        """Marks a change and wakes the waits; called with ``changed`` held."""
        self.version += 1
        self.changed.notify_all()


_TABLE = _Table()
"""One for the process, so that two stores of one namespace meet without handing anything to one another."""


class MemoryStore(KVStore):
    """A `KVStore` in this process's memory. All objects of one namespace share their keys; waits wake at once.

    The keys live as long as the process unless they are deleted, or a store of their namespace is closed with ``cleanup``. Any size of
    value is taken. Never raises `StoreUnavailableError`.
    """

    def _where(self) -> str:
        return "memory://"

    def _get(self, full: str) -> bytes | None:
        with _TABLE.changed:
            return _TABLE.values.get(full)

    def _set(self, full: str, data: bytes) -> None:
        with _TABLE.changed:
            _TABLE.values[full] = data
            _TABLE.touch()

    def _exists(self, full: str) -> bool:
        with _TABLE.changed:
            return full in _TABLE.values

    def _delete(self, full: str) -> bool:
        with _TABLE.changed:
            was_there = _TABLE.values.pop(full, None) is not None
            _TABLE.touch()
            return was_there

    def _update(self, full: str, change: Change) -> bytes | None:
        with _TABLE.changed:
            value = change(_TABLE.values.get(full))
            if value is not None:
                _TABLE.values[full] = value
                _TABLE.touch()
            return _TABLE.values.get(full)

    def _list(self, prefix: str) -> dict[str, bytes]:
        with _TABLE.changed:
            return {key: value for key, value in _TABLE.values.items() if key.startswith(prefix)}

    def _delete_prefix(self, prefix: str) -> int:
        with _TABLE.changed:
            gone = [key for key in _TABLE.values if key.startswith(prefix)]
            for key in gone:
                del _TABLE.values[key]
            _TABLE.touch()
            return len(gone)

    def _close(self, cleanup_prefix: str | None) -> None:
        if cleanup_prefix is not None:
            self._delete_prefix(cleanup_prefix)
        with _TABLE.changed:
            _TABLE.touch()

    @contextmanager
    def _changes(self, prefix: str) -> Iterator[Callable[[float], None]]:
        seen = _TABLE.version

        def sleep(deadline: float) -> None:
            nonlocal seen
            with _TABLE.changed:
                _TABLE.changed.wait_for(lambda: _TABLE.version != seen or self._closing.is_set(), max(0.0, deadline - time.monotonic()))
                seen = _TABLE.version

        yield sleep
