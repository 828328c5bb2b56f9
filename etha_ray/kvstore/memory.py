"""A store for the threads of one process: tests, notebooks, Ray's local mode."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from etha_ray.errors import LeaseExpiredError
from etha_ray.kvstore.base import Change, KVStore, Sleep
from etha_ray.kvstore.lease import Grant


class _Table:
    """Keys, values and leases. Everything is done with ``changed`` held, which first drops what has run out."""

    def __init__(self) -> None:
        self.values: dict[str, bytes] = {}
        self.owners: dict[str, _MemoryGrant] = {}
        """The lease of each key that is under one."""
        self.leases: set[_MemoryGrant] = set()
        self.changed = threading.Condition()
        self.version = 0

    @contextmanager
    def current(self) -> Iterator[dict[str, bytes]]:
        """Within the block the values are those of now, and nobody changes them."""
        with self.changed:
            now = time.monotonic()
            for lease in [lease for lease in self.leases if lease.until <= now]:
                self.end(lease)
            yield self.values

    def put(self, full: str, data: bytes, owner: _MemoryGrant | None = None) -> None:
        self.values[full] = data
        self.owners.pop(full, None)
        if owner is not None:
            self.owners[full] = owner
        self.touch()

    def remove(self, full: str) -> bool:
        self.owners.pop(full, None)
        self.touch()
        return self.values.pop(full, None) is not None

    def end(self, lease: _MemoryGrant) -> None:
        self.leases.discard(lease)
        for full in [full for full, owner in self.owners.items() if owner is lease]:
            self.remove(full)

    def touch(self) -> None:
        """Marks a change and wakes the waits."""
        self.version += 1
        self.changed.notify_all()

    def wait(self, seen: int, deadline: float) -> int:
        """Sleeps until a version other than ``seen``, the deadline, or until a lease runs out; the version then."""
        with self.changed:
            if self.version == seen:
                until = min((lease.until for lease in self.leases), default=deadline)
                self.changed.wait(max(0.0, min(deadline, until) - time.monotonic()))
            return self.version


_TABLE = _Table()
"""One for the process, so that two stores of one namespace meet without handing anything to one another."""


class MemoryStore(KVStore):
    """A `KVStore` in this process's memory. All objects of one namespace share their keys; waits wake at once.

    The keys live as long as the process unless they are deleted, their lease ends, or a store of their namespace is closed with
    ``cleanup``. Any size of value is taken. Never raises `StoreUnavailableError`.
    """

    def _where(self) -> str:
        return "memory://"

    def _get(self, full: str) -> bytes | None:
        with _TABLE.current() as values:
            return values.get(full)

    def _set(self, full: str, data: bytes) -> None:
        with _TABLE.current():
            _TABLE.put(full, data)

    def _exists(self, full: str) -> bool:
        with _TABLE.current() as values:
            return full in values

    def _delete(self, full: str) -> bool:
        with _TABLE.current():
            return _TABLE.remove(full)

    def _update(self, full: str, change: Change) -> bytes | None:
        with _TABLE.current() as values:
            value = change(values.get(full))
            if value is not None:
                _TABLE.put(full, value)
            return values.get(full)

    def _list(self, prefix: str) -> dict[str, bytes]:
        with _TABLE.current() as values:
            return {key: value for key, value in values.items() if key.startswith(prefix)}

    def _delete_prefix(self, prefix: str) -> int:
        with _TABLE.current() as values:
            return sum([_TABLE.remove(key) for key in [*values] if key.startswith(prefix)])

    def _grant(self, ttl: float) -> Grant:
        return _MemoryGrant(ttl)

    def _close(self, cleanup_prefix: str | None) -> None:
        if cleanup_prefix is not None:
            self._delete_prefix(cleanup_prefix)

    def _wake(self) -> None:
        with _TABLE.changed:
            _TABLE.touch()

    @contextmanager
    def _changes(self, prefix: str) -> Iterator[Sleep]:
        seen = _TABLE.version

        def sleep(deadline: float) -> None:
            nonlocal seen
            seen = _TABLE.wait(seen, deadline)

        yield sleep


class _MemoryGrant:
    """A `Grant` of the process's table."""

    def __init__(self, ttl: float) -> None:
        self._ttl = ttl
        with _TABLE.current():
            self.until = time.monotonic() + ttl
            _TABLE.leases.add(self)

    @property
    def ttl(self) -> float:
        return self._ttl

    def put(self, full: str, data: bytes) -> None:
        with _TABLE.current():
            self._check()
            _TABLE.put(full, data, self)

    def renew(self) -> None:
        with _TABLE.current():
            self._check()
            self.until = time.monotonic() + self._ttl

    def revoke(self) -> None:
        with _TABLE.current():
            _TABLE.end(self)

    def _check(self) -> None:
        if self not in _TABLE.leases:
            raise LeaseExpiredError(f"a lease of {self._ttl:g} s in memory:// was not renewed in time; its keys are gone, take a new one")
