"""Leases for a backend that has none: the keys say whose they are, and their owner says in a record that it is still there.

- **value** = `_MARK`, 16 bytes that name the lease, then the value as it is. Whoever writes the key otherwise writes no mark, and with that
  the key is the lease's no more.
- **record** ``{namespace}/%lease/{lease}``: when it was written, and for how long it holds. The owner writes it again to renew.
- **verdict** ``{namespace}/%over/{lease}``: the lease has ended. Whoever finds that it has puts it there, and nobody takes it back.

A lease is over when its verdict is there. So all agree, an end is final, and an owner that was stopped for too long hears of it: it looks
for the verdict after each renewal and before each put. Closing a lease puts the verdict.

When may a reader give that verdict? Hosts' clocks may differ, so it goes by its own: a record that has not changed for the time to live
since this reader first saw it, on the monotonic clock, is a dead owner's. Only a reader that comes new to a record, or has not looked at it
for the time to live, also goes by the wall clock: it *disbelieves* a record that is older than the time to live, reads its keys as missing,
and believes it again when it changes. That spares it the wait for what died long ago. Where its clock is ahead of the owner's by more than
half the time to live, it may so miss the keys of a living owner until the next renewal, but gives no verdict; where it is behind, it sees
the end of a lease up to one time to live later.

Every read of a leased value asks for verdict and record: three requests instead of one. Values without the mark cost what they did, but
for `delete`, which looks before.

What is over stays in the store, as bytes that nobody reads, until its key is written again or removed by `delete_prefix`, or the
namespace is cleaned up. Neither torch's TCPStore nor Ray's GCS can delete a key only if it still has a certain value, so removing it could
remove what somebody has just put there. Nor can they compare and ask a third key at once: an update (`add`, `append`, `compare_and_set`,
`delete`) of a key whose lease ends at this very moment may count as made just before.
"""

from __future__ import annotations

import math
import os
import time
from abc import abstractmethod
from dataclasses import dataclass

import msgspec

from etha_ray.decoding import Decoder
from etha_ray.errors import LeaseExpiredError, StoreError
from etha_ray.kvstore.base import Change, KVStore
from etha_ray.kvstore.lease import Grant

_MARK = bytes.fromhex("9e1f5bd37a0c46f28bd0e84173c65a2f")
"""Random, once: no value begins with it by chance."""
_ID = 16
LEASE_OVERHEAD = len(_MARK) + _ID
"""Bytes that a value takes more in the backend when it is under a lease."""


class _Record(msgspec.Struct, frozen=True, array_like=True):
    ttl: float
    written: float
    """By the owner's wall clock."""


_records = Decoder(_Record)  # made at import: threads that do so at once crash in msgspec


@dataclass(frozen=True)
class _Sight:
    """A record as a reader saw it. Unless it changes it is believed, and given no verdict, until these moments (monotonic)."""

    record: bytes
    believed_until: float
    verdict_at: float


class RecordLeases(KVStore):
    """A `KVStore` whose backend has no leases: implements `KVStore`'s primitives on some of its own, which know nothing of leases."""

    def __init__(self, namespace: str = "default", component: str = "tensorbus") -> None:
        super().__init__(namespace, component)
        self._seen: dict[bytes, _Sight] = {}
        self._over: set[bytes] = set()

    def _get(self, full: str) -> bytes | None:
        raw = self._stored_get(full)
        while True:
            value, lease = split(raw)
            known = lease in self._over
            if self._lives(lease):
                return value
            # If it ended after the value was read, somebody may have written the key in between.
            again = raw if known else self._stored_get(full)
            if again == raw:
                return None
            raw = again

    def _exists(self, full: str) -> bool:
        return self._get(full) is not None

    def _delete(self, full: str) -> bool:
        return self._exists(full) and self._stored_delete(full)

    def _update(self, full: str, change: Change) -> bytes | None:
        lives: dict[bytes | None, bool] = {None: True}  # by lease; None is no lease
        asked: bytes | None = None

        def on_stored(raw: bytes | None) -> bytes | None:
            nonlocal asked
            value, asked = split(raw)
            return change(value if lives[asked] else None) if asked in lives else None

        while True:
            value, lease = split(self._stored_update(full, on_stored))
            if asked in lives:
                return value if lives[lease] else None
            lives[asked] = self._lives(asked)

    def _list(self, prefix: str) -> dict[str, bytes]:
        stored = {name: split(raw) for name, raw in self._stored_list(prefix).items()}
        leases = {lease for _, lease in stored.values()}
        known = leases & self._over
        lives = {lease: self._lives(lease) for lease in leases - known}
        values = {}
        for name, (value, lease) in stored.items():
            if lease not in known:
                # Where the lease has ended since, somebody may have written the key.
                value = value if lives[lease] else self._get(name)
                if value is not None:
                    values[name] = value
        return values

    def _delete_prefix(self, prefix: str) -> int:
        leases = [split(raw)[1] for raw in self._stored_list(prefix).values()]
        over = {lease for lease in set(leases) if not self._lives(lease)}
        return max(0, self._stored_delete_prefix(prefix) - sum(lease in over for lease in leases))

    def _grant(self, ttl: float) -> Grant:
        return _RecordGrant(self, ttl)

    def _lives(self, lease: bytes | None) -> bool:
        """Whether a value is there as far as its lease goes, see above; gives the verdict where it is due. True without a lease."""
        if lease is None:
            return True
        if lease in self._over or self._has_verdict(lease):
            return self._give_up(lease)
        data = self._stored_get(self._record_key(lease))
        now, sight = time.monotonic(), self._seen.get(lease)
        if data is None:  # the namespace was cleaned up
            return self._judge(lease)
        if sight is None or sight.record != data:
            record = self._record_of(lease, data)
            is_new = sight is None or now >= sight.verdict_at
            left = min(record.ttl, record.written + record.ttl - time.time()) if is_new else record.ttl
            self._seen[lease] = sight = _Sight(data, now + left, now + record.ttl)
        elif now >= sight.verdict_at:
            return self._judge(lease)
        return now < sight.believed_until

    def _record_of(self, lease: bytes, data: bytes) -> _Record:
        try:
            record = _records.decode(data)
            if not (0 < record.ttl < math.inf and math.isfinite(record.written)):
                raise msgspec.ValidationError(f"{record} has times that are none")
        except msgspec.DecodeError as error:
            raise StoreError(
                f"store key {self._record_key(lease)!r} does not hold the record of a lease ({error}): another program, or another version"
                " of etha_ray, writes to this namespace; give each its own namespace"
            ) from error
        return record

    def _judge(self, lease: bytes) -> bool:
        self._set(self._verdict_key(lease), b"")
        return self._give_up(lease)

    def _give_up(self, lease: bytes) -> bool:
        self._over.add(lease)
        self._seen.pop(lease, None)
        return False

    def _has_verdict(self, lease: bytes) -> bool:
        return self._stored_get(self._verdict_key(lease)) is not None

    def _verdict_key(self, lease: bytes) -> str:
        return f"{self._home}%over/{lease.hex()}"

    def _record_key(self, lease: bytes) -> str:
        return f"{self._home}%lease/{lease.hex()}"

    @abstractmethod
    def _stored_get(self, full: str) -> bytes | None: ...

    @abstractmethod
    def _stored_delete(self, full: str) -> bool: ...

    @abstractmethod
    def _stored_update(self, full: str, change: Change) -> bytes | None:
        """As `KVStore._update`; what ``change`` is given, and what is returned, is the value as it is stored."""

    @abstractmethod
    def _stored_list(self, prefix: str) -> dict[str, bytes]: ...

    @abstractmethod
    def _stored_delete_prefix(self, prefix: str) -> int: ...


class _RecordGrant:
    """A `Grant` by record and verdict."""

    def __init__(self, store: RecordLeases, ttl: float) -> None:
        self._store, self._ttl = store, ttl
        self._lease = os.urandom(_ID)
        self._write()

    @property
    def ttl(self) -> float:
        return self._ttl

    def put(self, full: str, data: bytes) -> None:
        self._check()
        self._store._set(full, _MARK + self._lease + data)

    def renew(self) -> None:
        if self._store._stored_get(self._store._record_key(self._lease)) is None:
            raise self._ended("the namespace was cleaned up")
        self._write()
        self._check()

    def revoke(self) -> None:
        self._store._judge(self._lease)
        self._store._stored_delete(self._store._record_key(self._lease))

    def _write(self) -> None:
        self._store._set(self._store._record_key(self._lease), msgspec.msgpack.encode(_Record(self._ttl, time.time())))

    def _check(self) -> None:
        if self._store._has_verdict(self._lease):
            raise self._ended("a reader has not seen it renewed in time")

    def _ended(self, why: str) -> LeaseExpiredError:
        return LeaseExpiredError(f"a lease of {self._ttl:g} s in {self._store!r} has ended: {why}. Its keys are gone; take a new lease")


def split(raw: bytes | None) -> tuple[bytes | None, bytes | None]:
    """The value in what is stored, and the lease that it is under, if it is."""
    if raw is not None and raw.startswith(_MARK):
        return raw[LEASE_OVERHEAD:], raw[len(_MARK) : LEASE_OVERHEAD]
    return raw, None
