"""What every member holds, in few bytes: the store keeps one full description a side, and digests of the rest.

Most ranks of a side register the same: their shards are equal, or DTensors of the same global shape. So a worker publishes
the digest of its manifest; only the first member of a side stores the manifest itself, and a worker whose own turns out to
be another one (uneven shards, explicit pieces) stores where it differs from that. Bodies are stored under their digest, so
ranks that differ alike store that once. Members without a mesh hold tensors of their own: each stores its manifest.

What all that takes in the store: one description a side, a record of fixed size a rank, and what ranks really hold besides.
With shards that `torch.chunk` leaves uneven, a tensor differs from the first rank's on the last of them and on empty ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import msgspec

from etha_ray.errors import StoreError
from etha_ray.kvstore import KVStore
from etha_ray.tensor_bus.records import BatchRecord, Differences, Manifest, decode, encode, fingerprint, manifest_key

T = TypeVar("T")

_INTRUDER = "another program writes to this namespace: give each its own"


class Manifests:
    """The manifests that one registration knows: its own, and those it has read. Used by one thread."""

    def __init__(self, store: KVStore) -> None:
        self._store = store
        self._known: dict[str, Manifest] = {}

    def add(self, manifest: Manifest) -> str:
        """Remember this worker's own; returns its digest."""
        digest = fingerprint(encode(manifest))
        self._known[digest] = manifest
        return digest

    def say(self, record: BatchRecord) -> BatchRecord:
        """Store the manifest of ``record``, whole; returns the record that says so."""
        self.store(record.manifest, self._known[record.manifest])
        return msgspec.structs.replace(record, base=record.manifest, differences="")

    def say_differences(self, record: BatchRecord, first: BatchRecord) -> BatchRecord:
        """Store where the manifest of ``record`` differs from that of its side's first member; returns the record that says so."""
        mine, other = self._known[record.manifest].tensors, self.read(first).tensors
        if len(mine) != len(other):
            return self.say(record)
        found = Differences({index: spec for index, (spec, base) in enumerate(zip(mine, other, strict=True)) if spec != base})
        differences = fingerprint(encode(found))
        self.store(differences, found)
        return msgspec.structs.replace(record, base=first.manifest, differences=differences)

    def read(self, record: BatchRecord) -> Manifest:
        """The manifest of a member; raises `StoreError` when the store does not have it."""
        if record.manifest not in self._known:
            base = record.base or record.manifest
            if base not in self._known:
                self._known[base] = self.load(base, Manifest)
            made = base
            if record.differences:
                changed = self.load(record.differences, Differences).tensors
                made = self.add(Manifest(tuple(changed.get(index, spec) for index, spec in enumerate(self._known[base].tensors))))
            if made != record.manifest:
                raise StoreError(
                    f"manifest {record.manifest} is not what {base} and {record.differences or 'no differences'} make; {_INTRUDER}"
                )
        return self._known[record.manifest]

    def store(self, digest: str, body: msgspec.Struct) -> None:
        """Store a body under its digest, unless somebody has."""
        if not self._store.exists(manifest_key(digest)):
            self._store.set_bytes(manifest_key(digest), encode(body))

    def find(self, digest: str, kind: type[T]) -> T | None:
        """The body with this digest, if the store has it."""
        return self.load(digest, kind) if self._store.exists(manifest_key(digest)) else None

    def load(self, digest: str, kind: type[T]) -> T:
        """The body with this digest; raises `StoreError` when the store does not have it."""
        data = self._store.get_bytes(manifest_key(digest))
        if data is None or fingerprint(data) != digest:
            raise StoreError(f"store key {manifest_key(digest)!r} does not hold what its name says; {_INTRUDER}")
        return decode(data, kind, manifest_key(digest))


def said(side: Sequence[BatchRecord]) -> bool:
    """Whether the manifests of all members of one side can be read."""
    return all(record.base or record.manifest == side[0].manifest for record in side)


def needs_saying(mine: BatchRecord, first: BatchRecord) -> bool:
    """Whether others cannot know this worker's manifest yet, given that of its side's first member."""
    return not mine.base and mine.manifest != first.manifest
