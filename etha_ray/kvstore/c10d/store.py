"""Any `KVStore` as a `torch.distributed.Store`, with PyTorch's own semantics.

Torch's C++ calls a Python store through a class that looks up each method by name in the Python object. Four facts of it shape this file
(torch 2.13):

- It holds the C++ half of the object only. When the Python half is collected, C++ finds no methods any more. So every object made here
  is kept for as long as the process lives; what it costs is a small object, and the `KVStore` can be closed.
- It looks for ``deleteKey`` and ``getNumKeys``, not for the Python names of these methods. They are here under both.
- It does not look for `queue_push`, `queue_pop`, `queue_len` and `list_keys`: called through torch's ``PrefixStore`` they raise
  ``NotImplementedError``. With ``prefix=`` this class does what ``PrefixStore`` does, and has them.
- Keys reach Python as str: a key that is not UTF-8 raises ``UnicodeDecodeError`` there.

Whatever a method raises comes out of C++ as it went in; C++ code that catches torch's errors by their C++ class does not see it as one.
"""

from __future__ import annotations

import operator
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, TypeAlias, TypeVar

from torch.distributed import Store  # type: ignore[attr-defined]  # the stubs do not export it

from etha_ray.errors import StoreTimeoutError
from etha_ray.kvstore.base import KVStore
from etha_ray.kvstore.c10d.errors import C10dQueueEmptyError, C10dTimeoutError, torch_errors
from etha_ray.kvstore.c10d.names import Key, keys_of, queue_name, stored_name
from etha_ray.kvstore.c10d.queues import Queue
from etha_ray.kvstore.keys import as_bytes

T = TypeVar("T")
Value: TypeAlias = "str | bytes"

_KEPT: set[C10dStore] = set()
"""Every store that was made: C++ may hold any of them, and does not say so."""
_NAMES_SHOWN = 8


class C10dStore(Store):
    """A `torch.distributed.Store` on ``store``: for `init_process_group(store=...)`, ``PrefixStore``, and everything else of torch.

    Keys and values are str or bytes; text is stored as UTF-8, and values come back as bytes. A key ``k`` is the key ``k`` of ``store``, or
    ``prefix/k`` with a prefix, which is what ``PrefixStore(prefix, ...)`` makes of it (see `names` for ``%`` and for bytes).
    `set_timeout`, the ``timeout`` property and `barrier` (which counts with `add` and waits with `wait`) are torch's own.

    Every method behaves as those of torch's TCPStore and HashStore do where these two agree, and otherwise so:

    - `num_keys` counts the keys that were set; a TCPStore with a world size counts one of its own as well.
    - A timeout of 0 looks once, as in TCPStore; in HashStore it means for ever.
    - `add` takes a decimal number of 64 bits and raises `StoreError` for any other value, and for a sum that does not fit. HashStore
      raises ValueError, unless the value begins with digits; TCPStore closes the connection; both overflow silently.
    - `multi_set` with lists of different lengths is a ValueError, before anything is set.
    - `get` of a key that is only a queue waits until it is set, as in HashStore; TCPStore returns ``b""``.
    - `queue_pop` waits until it has an element, as in HashStore; TCPStore says that the queue is empty when another consumer was faster,
      or when a value of the same name was set.

    Errors: `C10dTimeoutError` (a ``DistStoreError``) names the key and the seconds, `C10dUnavailableError` (a ``DistNetworkError``) the
    backend; a key or value of another type is a `TypeError`; the rest is what `KVStore` raises. Safe for any number of threads.
    """

    _timeout_error: type[C10dTimeoutError] = C10dTimeoutError

    if TYPE_CHECKING:  # torch has it, its stubs do not

        @property
        def timeout(self) -> timedelta: ...

    def __init__(self, store: KVStore, prefix: str = "", timeout: timedelta = timedelta(seconds=300)) -> None:
        """``timeout`` is how long `get`, `wait`, `multi_get`, `queue_pop` and `barrier` wait unless told otherwise."""
        super().__init__()
        self.store = store
        self.prefix = prefix
        self._home = f"{stored_name(prefix)}/" if prefix else ""
        self.set_timeout(timeout)
        _KEPT.add(self)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} prefix={self.prefix!r} on {self.store!r}>"

    def clone(self) -> C10dStore:
        """Another object on the same keys, with a timeout of its own."""
        return type(self)(self.store, self.prefix, self.timeout)

    def set(self, key: Key, value: Value) -> None:
        """Stores the value, replacing what was there."""
        with torch_errors():
            self.store.set_bytes(self._name(key), _data(key, value))

    def get(self, key: Key) -> bytes:
        """The value; waits for a missing key until `timeout`, then raises `C10dTimeoutError`."""
        return self._get(key, _Limit(self.timeout))

    def add(self, key: Key, amount: int) -> int:
        """Adds to the decimal number in ``key``, which counts as 0 while it is missing; the sum. Atomic."""
        with torch_errors():
            return self.store.add(self._name(key), operator.index(amount))

    def compare_set(self, key: Key, expected: Value, desired: Value) -> bytes:
        """Stores ``desired`` if the value is ``expected``; the value now stored. Atomic.

        An empty ``expected`` also stands for a missing key. If the key is missing and ``expected`` is not empty, nothing is stored and
        ``expected`` is what is returned.
        """
        name, wanted, target = self._name(key), _data(key, expected), _data(key, desired)
        with torch_errors():
            while True:
                stored = self.store.compare_and_set(name, wanted, target)
                if stored is not None:
                    return stored
                if wanted:
                    return wanted
                stored = self.store.compare_and_set(name, None, target)
                if stored:
                    return stored
                if stored == target:
                    return target
                # Somebody has set it to the empty value in between.

    def append(self, key: Key, value: Value) -> None:
        """Appends to the value; a missing key counts as empty, and exists afterwards. Atomic."""
        with torch_errors():
            self.store.append(self._name(key), _data(key, value))

    def delete_key(self, key: Key) -> bool:
        """Removes the key; whether it was there. A queue of this name stays."""
        with torch_errors():
            return self.store.delete(self._name(key))

    def check(self, keys: Sequence[Key]) -> bool:
        """Whether all the keys are there now; a queue with elements counts as a key."""
        with torch_errors():
            return all(self._seen(key) for key in _listed("keys", keys))

    def wait(self, keys: Sequence[Key], timeout: timedelta | float | None = None) -> None:
        """Waits until all the keys are there, as `check` has it; ``timeout`` (seconds, if a number) instead of the store's.

        Raises `C10dTimeoutError` naming the keys that are missing and the seconds.
        """
        limit = _Limit(self.timeout if timeout is None else timeout)
        pending = _listed("keys", keys)
        while pending:
            self._wait(pending[0], lambda: self._seen(pending[0]) or None, limit, lambda: self._missing(pending))
            del pending[0]

    def multi_get(self, keys: Sequence[Key]) -> list[bytes]:
        """The values of all the keys; waits for missing ones until `timeout`, for all of them together."""
        limit = _Limit(self.timeout)
        return [self._get(key, limit) for key in _listed("keys", keys)]

    def multi_set(self, keys: Sequence[Key], values: Sequence[Value]) -> None:
        """Sets each key to the value at its place, in this order."""
        names = [self._name(key) for key in _listed("keys", keys)]
        data = [as_bytes(repr(value), value) for value in _listed("values", values)]
        if len(names) != len(data):
            raise ValueError(f"multi_set got {len(names)} keys and {len(data)} values; it takes one value for each key")
        with torch_errors():
            for name, value in zip(names, data, strict=True):
                self.store.set_bytes(name, value)

    def num_keys(self) -> int:
        """How many keys have been set. Reads all of them, with their values."""
        return len(self._keys())

    def list_keys(self) -> list[str]:
        """The keys that have been set, sorted. Reads all of them, with their values.

        Raises ``UnicodeDecodeError`` if one was set as bytes that are not UTF-8, as torch's own stores do.
        """
        return sorted(key.decode() for key in self._keys())

    def has_extended_api(self) -> bool:
        """True: `append`, `multi_get` and `multi_set` are there."""
        return True

    def queue_push(self, key: Key, value: Value) -> None:
        """Puts the value at the end of the queue ``key``; a queue and a value of the same name do not touch."""
        with torch_errors():
            self._queue(key).push(_data(key, value))

    def queue_pop(self, key: Key, block: bool = True) -> bytes:
        """Takes the first element of the queue, which nobody else gets then.

        On an empty queue it waits until `timeout` and then raises `C10dTimeoutError`; with ``block=False`` it raises
        `C10dQueueEmptyError` (a ``torch.distributed.QueueEmptyError``) at once.
        """
        queue = self._queue(key)
        if block:
            return self._wait(key, queue.pop, _Limit(self.timeout), lambda: f"queue {key!r} had no element")
        with torch_errors():
            value = queue.pop()
        if value is None:
            raise C10dQueueEmptyError(f"queue {key!r} is empty in {self!r}; block=True waits for an element")
        return value

    def queue_len(self, key: Key) -> int:
        """How many elements the queue has; 0 if there is none of this name."""
        with torch_errors():
            return len(self._queue(key))

    deleteKey = delete_key
    getNumKeys = num_keys

    def _name(self, key: Key) -> str:
        return self._home + stored_name(key)

    def _queue(self, key: Key) -> Queue:
        return Queue(self.store, self._home + queue_name(key))

    def _keys(self) -> list[bytes]:
        with torch_errors():
            stored = self.store.list(self._home)
        return keys_of(name[len(self._home) :] for name in stored)

    def _seen(self, key: Key) -> bool:
        return self.store.exists(self._name(key)) or len(self._queue(key)) > 0

    def _missing(self, keys: list[Key]) -> str:
        missing = [repr(key) for key in keys if not self._seen(key)] or [repr(keys[0])]
        more = f" and {len(missing) - _NAMES_SHOWN} more" if len(missing) > _NAMES_SHOWN else ""
        return f"{'key' if len(missing) == 1 else 'keys'} {', '.join(missing[:_NAMES_SHOWN])}{more} did not appear"

    def _get(self, key: Key, limit: _Limit) -> bytes:
        name = self._name(key)
        return self._wait(key, lambda: self.store.get(name), limit, lambda: f"key {key!r} did not appear")

    def _wait(self, key: Key, look: Callable[[], T | None], limit: _Limit, missing: Callable[[], str]) -> T:
        """Calls ``look`` now and whenever the key or its queue has changed, until it returns something else than None."""
        with torch_errors():
            try:
                return self.store._wait(self.store._full(self._name(key), None), look, limit.left(), lambda: "")
            except StoreTimeoutError:
                raise self._timeout_error(f"{missing()} within {limit.seconds:g} s in {self!r}") from None


class _Limit:
    """A timeout of a call that waits for several things one after the other."""

    def __init__(self, timeout: timedelta | float) -> None:
        self.seconds = timeout.total_seconds() if isinstance(timeout, timedelta) else float(timeout)
        self._deadline = time.monotonic() + self.seconds

    def left(self) -> float:
        return max(0.0, self._deadline - time.monotonic())


def _data(key: Key, value: Value) -> bytes:
    return as_bytes(key if isinstance(key, str) else repr(key), value)


def _listed(what: str, items: Sequence[T]) -> list[T]:
    if isinstance(items, (str, bytes)):
        raise TypeError(f"{what} must be a list, not {type(items).__name__}: {items!r}")
    return list(items)
