"""A store on etcd: survives the death of any process, and of etcd's servers as long as a majority is left. Tested with etcd 3.4.

- **small values** are stored as they are under ``{namespace}/{component}/{key}``: other clients of etcd can read and write them.
- **large values**, since etcd takes 1.5 MiB in a request: cut into chunks ``{namespace}/%chunk/{component}/{key}``, a 0xff that no key
  holds, 16 random bytes for this version of the value, the chunk's number. The key itself holds a *pointer*: a random mark, those 16
  bytes and the size. Chunks are written first; then one transaction writes the pointer if the first chunk is still there.
- **every write** of a key removes all other chunks of it in the same transaction. So there are no chunks but those of the value that
  stands, of a writer at work, and of one that was killed, until the next write. A writer at work whose chunks were removed misses the
  first of them, which it wrote first, and writes them anew.
- **reads** follow a pointer at the revision at which they read it: etcd keeps what was there then, so a reader never sees half of
  anything, nor waits for anybody. `list` is a snapshot, too. Only if etcd was compacted in between do they begin again.
- **updates** read, and write if the key still has the revision that was read; if not, they begin again.
"""

from __future__ import annotations

import itertools
import logging
import math
import os
import random
import struct
import time
import weakref
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

from etha_ray.errors import ConfigError, LeaseExpiredError, StoreError
from etha_ray.kvstore.base import Change, KVStore, Sleep
from etha_ray.kvstore.etcd_client import (
    DELETE_RANGE,
    KEEP_ALIVE,
    LEASE_GRANT,
    LEASE_REVOKE,
    RANGE,
    EtcdClient,
    Security,
    end_of,
    etcdrpc,
)
from etha_ray.kvstore.etcd_txn import Commit, Transactions, delete_op, exists, put_op, unchanged
from etha_ray.kvstore.etcd_watch import Watches
from etha_ray.kvstore.lease import Grant
from etha_ray.kvstore.patience import OUTAGE
from etha_ray.kvstore.url import host_and_port

logger = logging.getLogger(__name__)

CONNECT = 5.0
"""Seconds that the first request keeps trying while no endpoint answers: it is more likely to have a wrong address."""

_MARK = bytes.fromhex("a3c4f2d90b6e4e5c8f17d85b20619e74")
"""Random, once: no value begins with it by chance. One that does is cut into chunks, however small."""
_POINTER = struct.Struct(">16s16sQ")  # mark, version, size
_VERSION = 16
_CHUNK = 512 * 2**10
_BACK_OFF = 0.001
_BACK_OFF_LIMIT = 0.02
_MAX_TTL = 9_000_000_000  # etcd's own limit


class EtcdStore(KVStore):
    """A `KVStore` on an etcd cluster; the keys live as long as the cluster's data.

    **Outages.** A request that gets no answer is sent again, to the next endpoint if there are several, for ``timeout`` seconds, at most
    `OUTAGE`; then it raises `StoreUnavailableError`. So a restart of etcd, or of a majority of its members, that is over by then shows
    as a delay, in waits and in single calls. A change whose answer was lost is made once, not twice; one that raised
    `StoreUnavailableError` was made or not. A wait raises it when an outage is longer, or when the wait's own time ends in one.

    **Costs.** Every operation is one round trip; `add`, `append` and `compare_and_set` are two, and more where several update one key at
    once. Waits wake by etcd's watches, without polling. A value over 512 KiB takes a round trip for each 512 KiB. etcd keeps all versions
    of all values until it is compacted, and takes 2 GiB unless told otherwise: this is for rendezvous, not for tensors.

    **Leases** are etcd's own, in whole seconds; etcd makes very short ones longer (2 s by default).

    **Users** need readwrite permission on the prefix ``{namespace}/``.

    ``host`` and ``port`` are attributes, of the first endpoint.
    """

    # A few dozen of these fit into an etcd of the default size.
    max_value_bytes = 64 * 2**20
    # A request holds the key several times, beside a chunk.
    max_key_bytes = 64 * 2**10

    def __init__(
        self,
        host: str = "localhost",
        port: int = 2379,
        timeout: float = 3600.0,
        namespace: str = "default",
        component: str = "tensorbus",
        *,
        endpoints: Sequence[str] = (),
        user: str | None = None,
        password: str | None = None,
        tls: bool = False,
        ca: str | None = None,
        cert: str | None = None,
        key: str | None = None,
    ) -> None:
        """Connects. ``endpoints``, each ``HOST:PORT`` or ``HOST``, stand for ``host`` where a cluster has several.

        ``user`` and ``password`` for a cluster with authentication. With ``tls``, or any of the three files, the connection is
        encrypted: ``ca`` is the PEM file of the authorities to trust (None: those that gRPC brings along), ``cert`` and ``key`` are
        those of the client's own certificate.

        Raises `StoreUnavailableError` naming the endpoints and the cause if none answers within ``timeout`` seconds, at most `CONNECT`;
        `ConfigError` for an argument out of range, a file that cannot be used, a wrong password.
        """
        super().__init__(namespace, component)
        if timeout <= 0:
            raise ConfigError(f"timeout {timeout} of an EtcdStore must be above 0 seconds")
        if (user is None) != (password is None):
            raise ConfigError("an EtcdStore takes user and password together, or neither")
        if (cert is None) != (key is None):
            raise ConfigError(f"an EtcdStore takes cert and key together, or neither (cert={cert!r}, key={key!r})")
        places = [_place(text, port) for text in endpoints or [f"[{host}]" if ":" in host else host]]
        addresses = [f"[{name}]:{number}" if ":" in name else f"{name}:{number}" for name, number in places]
        self.host, self.port = places[0]
        security = Security(user, password, tls or ca is not None or cert is not None, ca, cert, key)
        self._client = EtcdClient(addresses, security, self._home, min(timeout, OUTAGE), self._closing)
        self._transactions = Transactions(self._client, self._home)
        self._watches = Watches(self._client)
        # A store that nobody holds any more leaves no thread and no connection. The interpreter's end is left to gRPC, which comes
        # through it, while a closed store would have threads of the caller print errors.
        weakref.finalize(self, self._client.close).atexit = False
        try:
            self._client.connect(self._full("", None).encode(), min(timeout, CONNECT))
        except BaseException:
            self._client.close()
            raise

    def _where(self) -> str:
        return self._client.where

    def _within(self, deadline: float) -> AbstractContextManager[None]:
        return self._client.deadline.until(deadline)

    def _get(self, full: str) -> bytes | None:
        return self._followed(full, *self._entry(full))[0]

    def _exists(self, full: str) -> bool:
        return bool(self._client.call(RANGE, etcdrpc.RangeRequest(key=full.encode(), count_only=True)).count)

    def _set(self, full: str, data: bytes) -> None:
        self._write(full, data)

    def _delete(self, full: str) -> bool:
        key, chunks = full.encode(), self._chunks(full)
        return self._commit([exists(key)], [delete_op(key), delete_op(chunks, end_of(chunks))]).done

    def _update(self, full: str, change: Change) -> bytes | None:
        entry, revision = self._entry(full)
        for losses in itertools.count(1):
            stored, seen = self._followed(full, entry, revision)
            value = change(stored)
            if value is None:
                return stored
            commit = self._write(full, value, [unchanged(full.encode(), seen)])
            if commit is not None and commit.done:
                return value
            # Many that update one key at once would lose most of their tries to one another.
            time.sleep(random.uniform(0, min(losses * _BACK_OFF, _BACK_OFF_LIMIT)))
            entry, revision = self._entry(full)
        raise AssertionError("unreachable")

    def _list(self, prefix: str) -> dict[str, bytes]:
        start = prefix.encode()
        while (found := self._client.read(start, end_of(start))) is None:
            pass
        entries, revision = found
        try:
            names = [entry.key.decode() for entry in entries]
        except UnicodeDecodeError as error:
            raise StoreError(f"a key below {prefix!r} in {self!r} is no text ({error}): another program writes there; remove it") from error
        values = {name: self._followed(name, entry, revision)[0] for name, entry in zip(names, entries, strict=True)}
        return {name: value for name, value in values.items() if value is not None}

    def _delete_prefix(self, prefix: str) -> int:
        start, chunks = prefix.encode(), self._chunk_home(prefix)
        commit = self._commit([], [delete_op(start, end_of(start)), delete_op(chunks, end_of(chunks))])
        if commit.answers is not None:
            return int(commit.answers[0].response_delete_range.deleted)
        before = self._client.read(start, end_of(start), commit.revision - 1)
        return 0 if before is None else len(before[0])

    def _changes(self, prefix: str) -> AbstractContextManager[Sleep]:
        start = prefix.encode()
        return self._watches.changes(start, end_of(start))

    def _wake(self) -> None:
        self._watches.wake()

    def _grant(self, ttl: float) -> Grant:
        return _EtcdGrant(self, ttl)

    def _close(self, cleanup_prefix: str | None) -> None:
        try:
            if cleanup_prefix is not None:
                start = cleanup_prefix.encode()
                self._client.call(DELETE_RANGE, etcdrpc.DeleteRangeRequest(key=start, range_end=end_of(start)))
            else:
                self._transactions.forget()
        except StoreError as error:
            logger.debug("nothing to clean in %r: %s", self, error)
        self._client.close()

    def _entry(self, full: str) -> tuple[Any, int]:
        """What etcd has under the key (None: nothing), and the revision at which it was so."""
        answer = self._client.call(RANGE, etcdrpc.RangeRequest(key=full.encode()))
        return next(iter(answer.kvs), None), answer.header.revision

    def _followed(self, full: str, entry: Any, revision: int) -> tuple[bytes | None, int]:
        """The value of an entry that was read at ``revision``, and the revision that wrote it; (None, 0) for no entry."""
        while entry is not None:
            if not entry.value.startswith(_MARK):
                return entry.value, entry.mod_revision
            try:
                _, version, size = _POINTER.unpack(entry.value)
            except struct.error as error:
                raise StoreError(
                    f"value of {full!r} in {self!r} is damaged ({error}): another program writes there; set it again"
                ) from error
            start = self._chunks(full, version)
            found = self._client.read(start, end_of(start), revision)
            if found is not None:
                value = b"".join(chunk.value for chunk in found[0])
                if len(value) != size:
                    raise StoreError(f"value of {full!r} in {self!r} is damaged: somebody has removed chunks of it; set it again")
                return value, entry.mod_revision
            entry, revision = self._entry(full)
        return None, 0

    def _write(self, full: str, data: bytes, compare: Sequence[Any] = (), lease: int = 0) -> Commit | None:
        """Puts the value if ``compare`` holds; None if the lease is over."""
        key, chunks = full.encode(), self._chunks(full)
        if len(data) <= _CHUNK and not data.startswith(_MARK):
            success = [put_op(key, data, lease), delete_op(chunks, end_of(chunks))]
            return self._transactions.commit(compare, success, tolerated="NOT_FOUND")
        while True:
            version = os.urandom(_VERSION)
            own = self._chunks(full, version)
            for number, start in enumerate(range(0, len(data), _CHUNK)):
                put = put_op(own + number.to_bytes(4, "big"), data[start : start + _CHUNK], lease)
                if self._transactions.commit([], [put], tolerated="NOT_FOUND") is None:
                    return None
            success = [put_op(key, _POINTER.pack(_MARK, version, len(data)), lease)]
            success += [delete_op(chunks, own), delete_op(end_of(own), end_of(chunks))]
            commit = self._transactions.commit([*compare, exists(own + bytes(4))], success, tolerated="NOT_FOUND")
            if commit is None or commit.done:
                return commit
            self._client.call(DELETE_RANGE, etcdrpc.DeleteRangeRequest(key=own, range_end=end_of(own)))
            if compare:
                return commit

    def _commit(self, compare: Sequence[Any], success: Sequence[Any]) -> Commit:
        commit = self._transactions.commit(compare, success)
        assert commit is not None  # no refusal is tolerated
        return commit

    def _chunk_home(self, prefix: str) -> bytes:
        """What the keys of the chunks of all keys that begin with ``prefix`` begin with."""
        return f"{self._home}%chunk/{prefix[len(self._home) :]}".encode()

    def _chunks(self, full: str, version: bytes = b"") -> bytes:
        """What the keys of the chunks of one key, or of one version of its value, begin with."""
        return self._chunk_home(full) + b"\xff" + version


class _EtcdGrant:
    """A `Grant` that is a lease of etcd."""

    def __init__(self, store: EtcdStore, ttl: float) -> None:
        if ttl > _MAX_TTL:
            raise ConfigError(f"ttl {ttl} of a lease must be at most {_MAX_TTL} seconds in etcd")
        self._store = store
        # Where the answer is lost, a lease that nobody knows of runs out.
        answer = store._client.call(LEASE_GRANT, etcdrpc.LeaseGrantRequest(TTL=math.ceil(ttl)))
        self._id, self._ttl = answer.ID, float(answer.TTL)

    @property
    def ttl(self) -> float:
        return self._ttl

    def put(self, full: str, data: bytes) -> None:
        if self._store._write(full, data, lease=self._id) is None:
            raise self._ended()

    def renew(self) -> None:
        if self._store._client.call(KEEP_ALIVE, etcdrpc.LeaseKeepAliveRequest(ID=self._id)).TTL <= 0:
            raise self._ended()

    def revoke(self) -> None:
        self._store._client.call(LEASE_REVOKE, etcdrpc.LeaseRevokeRequest(ID=self._id), "NOT_FOUND")

    def _ended(self) -> LeaseExpiredError:
        return LeaseExpiredError(
            f"a lease of {self._ttl:g} s in {self._store!r} was not renewed in time; its keys are gone, take a new one"
        )


def _place(text: str, default_port: int) -> tuple[str, int]:
    host, port = host_and_port(text) or ("", 0)
    port = default_port if port is None else port
    if not 0 < port < 2**16:
        raise ConfigError(f"endpoint {text!r} of an EtcdStore must be HOST:PORT or HOST, with a port from 1 to 65535")
    return host, port
