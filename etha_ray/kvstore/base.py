"""The interface of every key-value store, and all of it that does not depend on the backend.

How keys are written is in `keys`. A backend implements the primitives at the end of `KVStore`, which take the whole key. Checking of
arguments, waiting, arithmetic and the order of closing are here, once; leases and watches in `lease` and `watch`.
"""

from __future__ import annotations

import math
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TypeAlias, TypeVar

from etha_ray.errors import ConfigError, StoreClosedError, StoreTimeoutError, ValueTooLargeError
from etha_ray.kvstore.keys import added, as_bytes, check_encodable, escape, matcher, short, text_as_bytes
from etha_ray.kvstore.lease import Grant, Lease
from etha_ray.kvstore.watch import Watch

T = TypeVar("T")
KeyNames: TypeAlias = list[str]
"""A sorted list of keys. Named here because inside the class `list` is the method."""
Change: TypeAlias = Callable[["bytes | None"], "bytes | None"]
"""Given the stored value (None if missing): the value to store, or None to leave everything as it is."""
Sleep: TypeAlias = Callable[[float], None]
"""Sleeps until a change, at the latest until the deadline it is given; see `KVStore._changes`."""

_POLL_SHARE = 1 / 32


class KVStore(ABC):
    """A small shared dictionary for rendezvous: str keys, bytes values.

    Ordering: every operation on one key takes effect at one moment between its call and its return, in every backend; a write that has
    returned is seen by every read that starts afterwards, in any process. `list` and `wait_for_keys` read key by key: two keys they
    return need not have had these values at the same moment.

    Threads: one store object may be used by any number of threads at once; a thread that waits never keeps the others from working.

    Every method except `close` raises `StoreClosedError` once the store is closed, also out of a wait that is under way, and
    `StoreUnavailableError` when the backend cannot be reached; the docstrings below name the rest. A key or value of the wrong type is a
    `TypeError`. A key that has no UTF-8 form (lone surrogates), or is longer than the backend takes, is a `ConfigError`.

    ``component=`` of a call replaces the store's own component for that call.
    """

    max_value_bytes: int | None = None
    """The largest value this backend takes; None if only memory bounds it."""
    max_key_bytes: int | None = None
    """The longest whole key, namespace and component included, in UTF-8."""
    poll_from: float = 0.001
    poll_to: float = 0.01
    """Seconds between two looks of a wait in a backend that has to poll: the first pause and the longest. In between a pause is a 32nd of
    the time waited so far, so that polling prolongs no wait by much; it has looked a hundred times when its pauses are longest."""

    def __init__(self, namespace: str = "default", component: str = "tensorbus") -> None:
        """Raises `ConfigError` for an empty namespace or component."""
        self.namespace = namespace
        self.component = component
        self._home = f"{escape('namespace', namespace)}/"
        escape("component", component)
        self._closing = threading.Event()
        self._bell = threading.Condition()
        self._close_lock = threading.Lock()
        self._leases: set[Lease] = set()

    def __repr__(self) -> str:
        state = "closed" if self._closing.is_set() else "open"
        return f"<{type(self).__name__} {self._where()} namespace={self.namespace!r} component={self.component!r} {state}>"

    def set(self, key: str, value: str, *, component: str | None = None) -> None:
        """Stores ``value`` as UTF-8, replacing what was there. Raises `ValueTooLargeError` above the backend's limit."""
        self.set_bytes(key, text_as_bytes(key, value), component=component)

    def set_bytes(self, key: str, data: bytes, *, component: str | None = None) -> None:
        """Stores ``data``, replacing what was there. Raises `ValueTooLargeError` above the backend's limit."""
        full = self._full(key, component)
        self._set(full, self._checked(key, data))

    def get(self, key: str, *, component: str | None = None) -> bytes | None:
        """The value, or None if the key is missing. Never waits for a key."""
        return self._get(self._full(key, component))

    def get_bytes(self, key: str, *, component: str | None = None) -> bytes | None:
        """The same as `get`; the partner of `set_bytes`."""
        return self.get(key, component=component)

    def exists(self, key: str, *, component: str | None = None) -> bool:
        """Whether the key is there, whatever its value."""
        return self._exists(self._full(key, component))

    def delete(self, key: str, *, component: str | None = None) -> bool:
        """Removes the key; whether it was there. Of many that delete one key at once exactly one gets True."""
        return self._delete(self._full(key, component))

    def add(self, key: str, n: int, *, component: str | None = None) -> int:
        """Adds ``n`` to the decimal number in ``key`` (a missing key counts as 0) and returns the sum, atomically.

        Raises `StoreError` if the value is not a number, or if it or the sum does not fit into a signed 64-bit integer.
        """
        return self._add(key, self._full(key, component), n)

    def append(self, key: str, data: bytes, *, component: str | None = None) -> None:
        """Appends ``data`` to the value (a missing key counts as empty, and exists afterwards), atomically.

        Raises `ValueTooLargeError` above the backend's limit.
        """
        full = self._full(key, component)
        self._append(key, full, self._checked(key, data))

    def compare_and_set(self, key: str, expected: bytes | None, desired: bytes, *, component: str | None = None) -> bytes | None:
        """Stores ``desired`` if the value is ``expected`` (None: if the key is missing), atomically; returns the value now stored.

        So it is ``desired`` for the one that won, and the current value for the others; None only where the key is missing and
        ``expected`` is not None. Raises `ValueTooLargeError` above the backend's limit.
        """
        full = self._full(key, component)
        wanted = None if expected is None else as_bytes(key, expected)
        target = self._checked(key, desired)
        return self._update(full, lambda stored: target if stored == wanted else None)

    def list(self, prefix: str = "", *, component: str | None = None) -> dict[str, bytes]:
        """Every key of the component that starts with ``prefix``, with its value, in the order of the keys."""
        full = self._full(prefix, component)
        start = len(full) - len(prefix)
        return {name[start:]: value for name, value in sorted(self._list(full).items())}

    def delete_prefix(self, prefix: str, *, component: str | None = None) -> int:
        """Removes every key of the component that starts with ``prefix``; how many there were."""
        return self._delete_prefix(self._full(prefix, component))

    def wait_for_key(self, key: str, timeout: float = 3600.0, *, component: str | None = None) -> bytes:
        """Waits until the key is there; its value. ``timeout`` is in seconds, and 0 looks once.

        Raises `StoreTimeoutError` (a `TimeoutError`) naming the key and the seconds.
        """
        full = self._full(key, component)
        return self._wait(full, lambda: self._get(full), timeout, lambda: f"key {key!r} did not appear")

    def wait_for_value(self, key: str, expected: str | bytes, timeout: float = 3600.0, *, component: str | None = None) -> bytes:
        """Waits until the key has the value ``expected``; that value. ``timeout`` is in seconds, and 0 looks once.

        A value that comes and goes between two looks may be missed in a backend that polls.
        Raises `StoreTimeoutError` (a `TimeoutError`) naming the key, the seconds and what was there instead.
        """
        full = self._full(key, component)
        wanted = as_bytes(key, expected)
        last: bytes | None = None

        def look() -> bytes | None:
            nonlocal last
            last = self._get(full)
            return last if last == wanted else None

        return self._wait(full, look, timeout, lambda: f"key {key!r} did not become {short(wanted)}, it is {short(last)}")

    def wait_for_keys(
        self,
        key_pattern: str,
        expected_count: int,
        value: str | None = "1",
        timeout: float = 3600.0,
        candidate_keys: Sequence[str] | None = None,
        *,
        component: str | None = None,
    ) -> KeyNames:
        """Waits until at least ``expected_count`` keys match ``key_pattern`` and have ``value``; all that do, sorted.

        In the pattern ``*`` stands for any text, the empty one too; every other character, ``?`` and ``[`` among them, is itself.
        ``value=None`` takes any value. With ``candidate_keys`` only these keys are looked at, without listing the store.
        ``timeout`` is in seconds, and 0 looks once.

        Raises `StoreTimeoutError` (a `TimeoutError`) naming the pattern, the seconds and the keys that were there; `ConfigError` if
        ``expected_count`` is negative, or more than the candidates that match the pattern.
        """
        matches = matcher(key_pattern)
        fixed = key_pattern.split("*", 1)[0]
        wanted = None if value is None else value.encode()
        candidates = None if candidate_keys is None else sorted({key for key in candidate_keys if matches(key)})
        if expected_count < 0 or (candidates is not None and len(candidates) < expected_count):
            raise ConfigError(
                f"wait_for_keys({key_pattern!r}) cannot meet expected_count={expected_count}: "
                + ("it is negative" if expected_count < 0 else f"only {len(candidates or ())} of candidate_keys match the pattern")
            )
        found: KeyNames = []

        def look() -> KeyNames | None:
            nonlocal found
            if candidates is None:
                stored: dict[str, bytes | None] = {**self.list(fixed, component=component)}
            else:
                stored = {key: self.get(key, component=component) for key in candidates}
            found = [k for k, v in stored.items() if v is not None and (wanted is None or v == wanted) and matches(k)]
            return found if len(found) >= expected_count else None

        def missing() -> str:
            asked = "" if value is None else f" with value {short(value.encode())}"
            return f"{len(found)} of {expected_count} keys {key_pattern!r}{asked} appeared ({', '.join(found[:8]) or 'none'})"

        return self._wait(self._full(fixed, component), look, timeout, missing)

    def watch(self, prefix: str = "", *, component: str | None = None) -> Watch:
        """The component's keys that start with ``prefix``, and every change of them from now on; see `Watch`."""
        return Watch(self, prefix, self.component if component is None else component)

    def lease(self, ttl: float, *, renew: bool = True) -> Lease:
        """A `Lease`: what is set under it vanishes ``ttl`` seconds after its last renewal, in every process.

        With ``renew`` a thread renews it until it is closed, this store is closed, or the process ends, and keeps trying while the store
        cannot be reached. Without, the caller calls `Lease.renew`. A backend may grant a longer time than asked for: `Lease.ttl`.

        Raises `ConfigError` unless ``ttl`` is above 0 and finite.
        """
        self._check_open()
        if not 0 < ttl < math.inf:
            raise ConfigError(f"ttl {ttl} of a lease must be above 0 seconds, and finite")
        lease = Lease(self, ttl, renew)
        with self._close_lock:
            self._leases.add(lease)
        if self._closing.is_set():
            lease.close()
            self._check_open()
        return lease

    def close(self, cleanup: bool = True) -> None:
        """Closes this store object; with ``cleanup`` the namespace's keys, of every component and every user, are removed first.

        Pass ``cleanup=False`` where others still use the namespace; the keys of this object's own leases are removed all the same. Waits
        under way in other threads raise `StoreClosedError`. Closing twice is fine, and a backend that is already gone is no error.
        """
        with self._close_lock:
            if self._closing.is_set():
                return
            self._closing.set()
            self._wake()
            for lease in tuple(self._leases):
                lease.close()
            self._close(self._home if cleanup else None)

    def _check_open(self) -> None:
        if self._closing.is_set():
            raise StoreClosedError(f"{type(self).__name__} of namespace {self.namespace!r} is closed; make a new one with create_store")

    def _full(self, key: str, component: str | None) -> str:
        self._check_open()
        if not isinstance(key, str):
            raise TypeError(f"a key must be str, not {type(key).__name__}: {key!r}")
        check_encodable("key", key)
        full = f"{self._home}{escape('component', self.component if component is None else component)}/{key}"
        if self.max_key_bytes is not None and len(full.encode()) > self.max_key_bytes:
            raise ConfigError(
                f"key {key[:60]!r}... has {len(full.encode())} bytes with its namespace and component; {type(self).__name__} takes at "
                f"most {self.max_key_bytes}. Use a hash of it"
            )
        return full

    def _checked(self, key: str, data: bytes) -> bytes:
        value = as_bytes(key, data)
        self._check_size(key, len(value))
        return value

    def _check_size(self, key: str, size: int) -> None:
        if self.max_value_bytes is not None and size > self.max_value_bytes:
            raise ValueTooLargeError(
                f"value of key {key!r} has {size} bytes; {type(self).__name__} takes at most {self.max_value_bytes}. "
                "Split it over several keys"
            )

    def _wait(self, prefix: str, look: Callable[[], T | None], timeout: float, missing: Callable[[], str]) -> T:
        """Calls ``look`` now and after every change under ``prefix`` until it returns something else than None."""
        deadline = time.monotonic() + timeout
        with self._within(deadline), self._changes(prefix) as wait_for_change:
            while True:
                found = look()
                if found is not None:
                    return found
                if time.monotonic() >= deadline:
                    raise StoreTimeoutError(f"{missing()} within {timeout:g} s in {self!r}")
                wait_for_change(deadline)
                self._check_open()

    def _within(self, deadline: float) -> AbstractContextManager[None]:
        """Has requests that this thread makes in the block give a silent backend up about at the deadline (of `time.monotonic`).

        What can be silent overrides it, with `patience.Patience`; without a wait a request has at most `patience.OUTAGE`.
        """
        return nullcontext()

    def _changes(self, prefix: str) -> AbstractContextManager[Sleep]:
        """What a wait sleeps on; a backend that can tell of changes overrides it.

        Entering begins to watch the keys under ``prefix``. The callable inside returns at the latest at the deadline it is given (of
        `time.monotonic`), or when a key has changed or run out, `_wake` was called, or the store was closed since it last returned (or
        since entering): a change between a look and the sleep must not be lost. Returning too early is allowed.
        """
        return self._polling()

    def _wake(self) -> None:
        """Has every wait of this store object look again, as if something had changed; called from any thread.

        A backend that overrides `_changes` overrides it, too.
        """
        with self._bell:
            self._bell.notify_all()

    @contextmanager
    def _polling(self) -> Iterator[Sleep]:
        start = time.monotonic()

        def sleep(deadline: float) -> None:
            now = time.monotonic()
            pause = min(max(self.poll_from, (now - start) * _POLL_SHARE), self.poll_to)
            with self._bell:
                if not self._closing.is_set():
                    self._bell.wait(max(0.0, min(pause, deadline - now)))

        yield sleep

    def _add(self, key: str, full: str, n: int) -> int:
        total = self._update(full, lambda stored: b"%d" % added(key, stored, n))
        assert total is not None  # the change above always stores something
        return int(total)

    def _append(self, key: str, full: str, data: bytes) -> None:
        def extended(stored: bytes | None) -> bytes:
            value = (stored or b"") + data
            self._check_size(key, len(value))
            return value

        self._update(full, extended)

    @abstractmethod
    def _where(self) -> str:
        """The backend's address, for messages."""

    @abstractmethod
    def _get(self, full: str) -> bytes | None: ...

    @abstractmethod
    def _set(self, full: str, data: bytes) -> None: ...

    @abstractmethod
    def _exists(self, full: str) -> bool: ...

    @abstractmethod
    def _delete(self, full: str) -> bool: ...

    @abstractmethod
    def _update(self, full: str, change: Change) -> bytes | None:
        """Replaces the value by ``change(value)`` atomically, and returns the value now stored (None: the key is missing).

        ``change`` is pure and may be called again when another writer came in between; what it raises is passed on.
        """

    @abstractmethod
    def _list(self, prefix: str) -> dict[str, bytes]:
        """Every whole key that starts with ``prefix``, with its value, in any order."""

    @abstractmethod
    def _delete_prefix(self, prefix: str) -> int: ...

    @abstractmethod
    def _grant(self, ttl: float) -> Grant:
        """A new lease whose keys stay ``ttl`` seconds, or somewhat longer, after its last renewal."""

    @abstractmethod
    def _close(self, cleanup_prefix: str | None) -> None:
        """Removes everything under ``cleanup_prefix`` unless it is None, and lets go of the backend."""
