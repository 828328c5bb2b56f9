"""A store on the key-value table of Ray's GCS: a Ray cluster needs nothing else.

The GCS offers ``put`` (overwriting), ``put`` if absent, ``get``, ``delete`` (which tells whether it deleted), a listing by prefix, and no
comparison of values. Each of them is atomic. Three kinds of entries make atomic updates from them, with no lock that could die with its
owner:

- **value** ``v/{key}`` = a random 16-byte mark, then the value as it is. `set` overwrites it: one round trip. It alone decides whether
  the key exists, so deleting it is one round trip as well.
- **slots** ``s/{namespace}/{mark}/{n}`` for n = 1, 2, ...: the updates (`add`, `append`, `compare_and_set`) of the value that has this
  mark, each holding the whole new value. A slot is only ever put if absent, so each number has one winner, and n + 1 is only tried by who
  has read n: the slots have no gaps, and the highest is the value.
- **flag** ``f/{key}`` = "this key has had slots", put before its first slot and never taken back. `get` asks for value and flag in one
  round trip; without a flag the value is what it says.

Why this is linearizable, whoever is killed wherever: each step is one atomic request, and between any two of them the entries describe a
valid state. Killed before the slot is put, an update has not happened; after, it has, and needs nothing more. An update read the mark m,
and put slot n + 1 of m. If `set` or `delete` replaced m meanwhile, the update counts as having come just before: all that read m did so
earlier, and nobody who starts later looks at m's slots. Marks are random, so an old one never comes back. A reader that found no flag,
but an update came between, returns a value that was current during its call. A put whose answer was lost is sent again by Ray's client and
then finds its own entry; the mark inside tells whose it is. (Only where the answer to an update of a missing key was lost, and a `set` or
`delete` came before the retry, is the update made once more, after that.)

The winner of slot n + 1 empties slot n down to its mark (it must stay: a late writer would win it again). So an update leaves about 150
bytes in the GCS until the namespace is cleaned up: right for rendezvous, wrong for a counter in an inner loop. `close` with cleanup
removes values first, then flags and slots; updates of that namespace made at this very moment are lost with it.
"""

from __future__ import annotations

import logging
import os
import random
import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from itertools import count
from typing import Protocol

from etha_ray.errors import OptionalDependencyError, StoreError, StoreUnavailableError
from etha_ray.kvstore.base import Change
from etha_ray.kvstore.lease_records import RecordLeases
from etha_ray.kvstore.patience import OUTAGE, Patience

logger = logging.getLogger(__name__)

_TABLE = b"etha_ray"
_MARK = 16
_VALUE, _FLAG, _SLOT = b"v/", b"f/", b"s/"
_BACK_OFF = 0.002
_LIST_CHUNK = 64
_TOO_LARGE = 8  # gRPC's RESOURCE_EXHAUSTED: together the values are more than one message holds
_FILLED, _EMPTIED = b"\x01", b"\x00"
# Slots looked at in one round trip: the next few, which is where the end is when others update too, then ever farther ones, which
# finds the end of a long row in a logarithmic number of trips.
_AHEAD = (*range(0, 8), *(2**i for i in range(3, 25)))


class _Kv(Protocol):
    """The part of Ray's GCS client used here."""

    def internal_kv_get(self, key: bytes, namespace: bytes, timeout: float) -> bytes | None: ...
    def internal_kv_multi_get(self, keys: list[bytes], namespace: bytes, timeout: float) -> dict[bytes, bytes]: ...
    def internal_kv_put(self, key: bytes, value: bytes, overwrite: bool, namespace: bytes, timeout: float) -> int: ...
    def internal_kv_del(self, key: bytes, del_by_prefix: bool, namespace: bytes, timeout: float) -> int: ...
    def internal_kv_keys(self, prefix: bytes, namespace: bytes, timeout: float) -> list[bytes]: ...


class GcsStore(RecordLeases):
    """A `KVStore` on Ray's GCS, for drivers, tasks and actors of one cluster; the keys live as long as the cluster.

    `set`, `get` and `exists` are one round trip to the GCS (about 0.3 ms on one host), `delete` is two; a key that `add`, `append` or
    `compare_and_set` has updated takes two to read. A wait polls every 1 to 10 ms. Leases are kept by records, see `lease_records`.

    **Outages.** Survives the death of any process but the GCS's. A request that the GCS does not answer for ``timeout`` seconds raises
    `StoreUnavailableError`, and what it was to change was changed or not; a wait raises it when its own time ends meanwhile, or some
    seconds later. Once the GCS answers again, so does the store. Without one, Ray itself ends all processes of the cluster after 60 s.

    In Ray's local_mode, where all is one process, the keys are in its memory.
    """

    # The GCS's gRPC takes 512 MiB a message, and reading an updated key may bring its first and its last value in one.
    max_value_bytes = 250 * 2**20

    def __init__(self, namespace: str = "default", component: str = "tensorbus", timeout: float = OUTAGE) -> None:
        """``timeout`` bounds, in seconds, how long one request waits for a GCS that does not answer; `OUTAGE` at most.

        Raises `OptionalDependencyError` without Ray, `StoreUnavailableError` if Ray is not initialised in this process.
        """
        super().__init__(namespace, component)
        self._patience = Patience(timeout, self._closing)
        self._ends: dict[str, tuple[bytes, int]] = {}  # per updated key: the mark, and a slot known to be there
        with self._calls():
            pass

    def _where(self) -> str:
        return "gcs://"

    def _within(self, deadline: float) -> AbstractContextManager[None]:
        return self._patience.until(deadline)

    def _stored_get(self, full: str) -> bytes | None:
        read = self._read(full)
        return None if read is None else read.value

    def _set(self, full: str, data: bytes) -> None:
        with self._calls() as kv:
            kv.internal_kv_put(_value_key(full), os.urandom(_MARK) + data, True, _TABLE, self._patience.seconds)

    def _stored_delete(self, full: str) -> bool:
        with self._calls() as kv:
            return kv.internal_kv_del(_value_key(full), False, _TABLE, self._patience.seconds) == 1

    def _stored_update(self, full: str, change: Change) -> bytes | None:
        for losses in count():
            if losses:  # many that update one key at once would lose most of their tries to one another
                time.sleep(random.uniform(0, min(losses * _BACK_OFF, self.poll_to)))
            read = self._read(full)
            new = change(None if read is None else read.value)
            if new is None or (read is not None and new == read.value):
                return None if read is None else read.value
            if self._put_new(_value_key(full), new, b"") if read is None else self._put_slot(full, read, new):
                return new
        raise AssertionError("unreachable")

    def _put_slot(self, full: str, read: _Read, value: bytes) -> bool:
        """Puts the slot after the one that was read; whether this process won it."""
        with self._calls() as kv:
            if not read.flagged:
                kv.internal_kv_put(_flag_key(full), b"", True, _TABLE, self._patience.seconds)
            if not self._put_new(self._slot_key(read.mark, read.slot + 1), value, _FILLED):
                return False
            self._ends[full] = (read.mark, read.slot + 1)
            if read.slot:
                emptied = self._slot_key(read.mark, read.slot)
                kv.internal_kv_put(emptied, read.slot_mark + _EMPTIED, True, _TABLE, self._patience.seconds)
        return True

    def _put_new(self, key: bytes, value: bytes, kind: bytes) -> bool:
        mark = os.urandom(_MARK)
        with self._calls() as kv:
            if kv.internal_kv_put(key, mark + kind + value, False, _TABLE, self._patience.seconds) == 1:
                return True
            there = kv.internal_kv_get(key, _TABLE, self._patience.seconds)
        return there is not None and there.startswith(mark)

    def _read(self, full: str) -> _Read | None:
        """The value, in one round trip unless the key has slots whose end this process does not know."""
        mark, base = self._ends.get(full, (b"", 0))
        value_key, flag_key = _value_key(full), _flag_key(full)
        asked = self._ahead(mark, base)
        found = self._multi_get([value_key, flag_key, *asked])
        head = found.get(value_key)
        if head is None:
            self._ends.pop(full, None)
            return None
        if flag_key not in found:
            return _Read(head[:_MARK], head[_MARK:], False)
        if head[:_MARK] != mark:
            mark, base = head[:_MARK], 0
            asked = self._ahead(mark, base)
            found = self._multi_get([*asked])
        while True:
            top = max((number for key, number in asked.items() if key in found), default=0)
            entry = found.get(self._slot_key(mark, top))
            if top and top + 1 in asked.values() and entry is not None and entry[_MARK : _MARK + 1] == _FILLED:
                self._ends[full] = (mark, top)
                return _Read(mark, entry[_MARK + 1 :], True, top, entry[:_MARK])
            if top == base == 0:
                return _Read(mark, head[_MARK:], True)
            base = top
            asked = self._ahead(mark, base)
            found = self._multi_get([*asked])

    def _ahead(self, mark: bytes, base: int) -> dict[bytes, int]:
        return {self._slot_key(mark, base + step): base + step for step in _AHEAD if base + step > 0} if mark else {}

    def _multi_get(self, keys: list[bytes]) -> dict[bytes, bytes]:
        with self._calls() as kv:
            return kv.internal_kv_multi_get(keys, _TABLE, self._patience.seconds)

    def _slot_key(self, mark: bytes, number: int) -> bytes:
        return _SLOT + b"%s%s/%d" % (self._home.encode(), mark.hex().encode(), number)

    def _stored_list(self, prefix: str) -> dict[str, bytes]:
        with self._calls() as kv:
            keys = kv.internal_kv_keys(_value_key(prefix), _TABLE, self._patience.seconds)
        try:
            names = [key[len(_VALUE) :].decode() for key in keys]
        except UnicodeDecodeError as error:
            raise StoreError(f"a key below {prefix!r} in {self!r} is no text ({error}): another program writes there; remove it") from error
        values: dict[str, bytes | None] = {}
        for start in range(0, len(names), _LIST_CHUNK):
            values.update(self._values(names[start : start + _LIST_CHUNK]))
        return {name: value for name, value in values.items() if value is not None}

    def _values(self, names: list[str]) -> dict[str, bytes | None]:
        try:
            found = self._multi_get([key for name in names for key in (_value_key(name), _flag_key(name))])
        except StoreUnavailableError as error:
            if getattr(error.__cause__, "rpc_code", None) != _TOO_LARGE:
                raise  # a GCS that is silent is not asked again
            return {name: self._stored_get(name) for name in names}
        heads = {name: found.get(_value_key(name)) for name in names}
        return {
            name: self._stored_get(name) if head is not None and _flag_key(name) in found else head and head[_MARK:]
            for name, head in heads.items()
        }

    def _stored_delete_prefix(self, prefix: str) -> int:
        with self._calls() as kv:
            return kv.internal_kv_del(_value_key(prefix), True, _TABLE, self._patience.seconds)

    def _close(self, cleanup_prefix: str | None) -> None:
        self._ends.clear()
        if cleanup_prefix is None:
            return
        try:
            with self._calls() as kv:
                for kind in (_VALUE, _FLAG, _SLOT):
                    kv.internal_kv_del(kind + cleanup_prefix.encode(), True, _TABLE, self._patience.seconds)
        except StoreUnavailableError as error:
            logger.debug("nothing to clean in %r: %s", self, error)

    @contextmanager
    def _calls(self) -> Iterator[_Kv]:
        """The client, looked up on each use since ``ray.shutdown`` and a new ``ray.init`` change it; its errors become ours."""
        try:
            import ray
            from ray.experimental.internal_kv import internal_kv_get_gcs_client
        except ImportError as error:
            raise OptionalDependencyError('GcsStore needs Ray: pip install "ray[default]"') from error
        client: _Kv | None = _LOCAL if in_local_mode() else internal_kv_get_gcs_client()  # type: ignore[no-untyped-call]
        if client is None:
            raise StoreUnavailableError(
                "GcsStore cannot reach a GCS: Ray is not initialised in this process. Call ray.init() first (through Ray Client, "
                "ray://, there is no GCS to reach: run the program on the cluster)"
            )
        try:
            yield client
        except ray.exceptions.RayError as error:
            raise StoreUnavailableError(
                f"Ray's GCS did not answer ({error}): see that the cluster's head runs and that this host reaches it, then call again"
            ) from error


@dataclass(frozen=True)
class _Read:
    """A value and where it was found: in the value entry (slot 0) with this mark, or in one of its slots."""

    mark: bytes
    value: bytes
    flagged: bool
    slot: int = 0
    slot_mark: bytes = b""


class _LocalKv:
    """`_Kv` in this process's memory."""

    def __init__(self) -> None:
        self._entries: dict[bytes, bytes] = {}
        self._lock = threading.Lock()

    def internal_kv_get(self, key: bytes, namespace: bytes, timeout: float) -> bytes | None:
        return self._entries.get(key)

    def internal_kv_multi_get(self, keys: list[bytes], namespace: bytes, timeout: float) -> dict[bytes, bytes]:
        with self._lock:
            return {key: self._entries[key] for key in keys if key in self._entries}

    def internal_kv_put(self, key: bytes, value: bytes, overwrite: bool, namespace: bytes, timeout: float) -> int:
        with self._lock:
            is_new = key not in self._entries
            if is_new or overwrite:
                self._entries[key] = value
            return int(is_new)

    def internal_kv_del(self, key: bytes, del_by_prefix: bool, namespace: bytes, timeout: float) -> int:
        with self._lock:
            gone = [name for name in self._entries if (name.startswith(key) if del_by_prefix else name == key)]
            for name in gone:
                del self._entries[name]
            return len(gone)

    def internal_kv_keys(self, prefix: bytes, namespace: bytes, timeout: float) -> list[bytes]:
        with self._lock:
            return [name for name in self._entries if name.startswith(prefix)]


_LOCAL = _LocalKv()


def in_local_mode() -> bool:
    """Whether Ray runs everything in this process, which newer Rays do not do any more (and have no constant for)."""
    from ray._private import worker

    mode = getattr(worker, "LOCAL_MODE", None)
    return mode is not None and getattr(worker.global_worker, "mode", None) == mode


def _value_key(full: str) -> bytes:
    return _VALUE + full.encode()


def _flag_key(full: str) -> bytes:
    return _FLAG + full.encode()
