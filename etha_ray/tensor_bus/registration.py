"""Registering a batch: a job that opens this worker's memory, finds the other members, and prepares the transfer.

The job publishes a `BatchRecord` for each pair of the batch and reads those of all other members. Once a pair is complete it
compares what everyone registered, opens the senders' memory and prepares the copies; then it publishes the digest of all
that as ``agreed``. The batch is ready when every member has published the same digest: each of them is then ready too.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import msgspec
import torch

from etha_ray.errors import BatchUnmatchedError, EthaRayError, HandleExpiredError, NoTransportError
from etha_ray.kvstore import KVStore
from etha_ray.memory import OpenedTensors, decode_handle, open_tensors
from etha_ray.tensor_bus.agreement import agreed_shapes, set_digest
from etha_ray.tensor_bus.commands import RegisteredTensor
from etha_ray.tensor_bus.executor import Part, bytes_out, copies_in
from etha_ray.tensor_bus.host import shares_memory
from etha_ray.tensor_bus.jobs import Backoff, Cancellation
from etha_ray.tensor_bus.members import is_gone, raise_if_refused, refuse
from etha_ray.tensor_bus.pair import Match, Pair, PairState
from etha_ray.tensor_bus.records import (
    BatchRecord,
    Manifest,
    MemberRecord,
    TensorSpec,
    batch_prefix,
    decode,
    encode,
    fingerprint,
    manifest_key,
)
from etha_ray.tensor_bus.state_file import StateFile, handles_key
from etha_ray.transport.base import Copy, CopyProgram, OneSidedTransport


@dataclass(frozen=True)
class Peer:
    """A member of the other side that this rank exchanges bytes with."""

    registration: str
    name: str
    member: MemberRecord
    bytes: int


@dataclass
class Registered:
    """What a registration came to: everything a transfer needs."""

    targets: dict[str, Peer] = field(default_factory=dict)
    sources: dict[str, Peer] = field(default_factory=dict)
    others: dict[str, Peer] = field(default_factory=dict)
    program: CopyProgram | None = None
    opened: list[OpenedTensors] = field(default_factory=list)

    def close(self) -> None:
        """Let go of all memory; no program runs any more."""
        self.program = None
        for opened in self.opened:
            opened.close()
        self.opened.clear()


@dataclass(frozen=True)
class Request:
    """What a registration job works from."""

    batch_id: str
    registration: str
    pairs: dict[str, Pair]
    tensors: Sequence[tuple[str, RegisteredTensor]]
    timeout: float | None


class Registration:
    """One registration under way. Runs on a job's thread; `close` afterwards withdraws what it published."""

    def __init__(self, store: KVStore, state: StateFile, transport: OneSidedTransport, request: Request) -> None:
        self._store = store
        self._state = state
        self._transport = transport
        self._request = request
        self._keys: dict[str, str] = {}
        self._manifests: dict[str, Manifest] = {}

    def run(self, cancellation: Cancellation) -> Registered:
        """Register, and wait until every member is ready.

        Raises:
            BatchUnmatchedError, TensorMismatchError, LayoutError, NoTransportError, MemoryHandleError, StoreError,
            TransferCancelledError; and whatever made a pair of the batch fail.
        """
        request = self._request
        deadline = None if request.timeout is None else time.monotonic() + request.timeout
        backoff = Backoff(cancellation, deadline)
        grouped: dict[str, list[RegisteredTensor]] = {}
        for pair_name, tensor in request.tensors:
            grouped.setdefault(pair_name, []).append(tensor)
        result = Registered()
        try:
            matches = self._matches(grouped, backoff)
            own = self._open_own(grouped, result)
            records = {name: self._publish(name, matches[name], grouped[name], own[name]) for name in grouped}
            self._meet(matches, own, records, result, backoff)
        except BaseException:
            result.close()
            self.close()
            raise
        return result

    def close(self) -> None:
        """Withdraw what was published. May be called more than once."""
        self._state.delete([handles_key(self._request.registration)])
        while self._keys:
            self._store.delete(self._keys.popitem()[1])

    # ------------------------------------------------------------------------------------------------ own side

    def _matches(self, names: dict[str, list[RegisteredTensor]], backoff: Backoff) -> dict[str, Match]:
        matches = {}
        for name in names:
            pair = self._request.pairs[name]
            while pair.state is PairState.MATCHING:
                if not backoff.wait():
                    raise BatchUnmatchedError(
                        f"batch {self._request.batch_id!r}: pair {name!r} is not complete yet after {self._request.timeout:g} s:"
                        f" wait until {pair.remote_name!r} has called init_pair"
                    )
            if pair.match is None:
                assert pair.error is not None
                raise pair.error
            matches[name] = pair.match
            backoff.reset()
        return matches

    def _open_own(self, grouped: dict[str, list[RegisteredTensor]], result: Registered) -> dict[str, list[torch.Tensor]]:
        labels = [f"tensor {position} of batch {self._request.batch_id!r}" for position in range(len(self._request.tensors))]
        handles = [decode_handle(tensor.handle) for tensors in grouped.values() for tensor in tensors]
        opened = open_tensors(handles, labels=labels)
        result.opened.append(opened)
        tensors = iter(opened.tensors)
        own = {name: [next(tensors) for _ in entries] for name, entries in grouped.items()}
        table = {name: [tensor.handle for tensor in entries] for name, entries in grouped.items()}
        self._state.put(handles_key(self._request.registration), msgspec.msgpack.encode(table))
        return own

    def _publish(self, pair_name: str, match: Match, entries: Sequence[RegisteredTensor], tensors: Sequence[torch.Tensor]) -> BatchRecord:
        specs = tuple(
            TensorSpec(
                dtype=str(tensor.dtype).removeprefix("torch."),
                shape=tuple(tensor.shape) if entry.global_shape is None else entry.global_shape,
                is_global=entry.global_shape is not None,
            )
            for entry, tensor in zip(entries, tensors, strict=True)
        )
        data = encode(Manifest(specs))
        digest = fingerprint(data)
        if not self._store.exists(manifest_key(digest)):
            self._store.set_bytes(manifest_key(digest), data)
        self._manifests[digest] = Manifest(specs)
        record = BatchRecord(registration=self._request.registration, index=match.index, manifest=digest)
        key = f"{batch_prefix(self._request.batch_id, pair_name, match.local[match.index].peer)}{match.index:08d}"
        self._keys[pair_name] = key
        self._store.set_bytes(key, encode(record))
        return record

    # --------------------------------------------------------------------------------------------- all members

    def _meet(
        self,
        matches: dict[str, Match],
        own: dict[str, list[torch.Tensor]],
        mine: dict[str, BatchRecord],
        result: Registered,
        backoff: Backoff,
    ) -> None:
        prepared: dict[str, str] = {}
        while True:
            raise_if_refused(self._store, self._request.registration)
            found = {name: self._records(name, match) for name, match in matches.items()}
            complete = [name for name, (local, remote) in found.items() if None not in local and None not in remote]
            if len(complete) == len(matches):
                sets = {name: (_all(found[name][0]), _all(found[name][1])) for name in complete}
                digests = {name: set_digest(self._request.batch_id, name, matches[name], *sets[name]) for name in complete}
                if digests != prepared:
                    self._prepare(matches, own, sets, result)
                    prepared = digests
                    for name, digest in digests.items():
                        self._store.set_bytes(self._keys[name], encode(msgspec.structs.replace(mine[name], agreed=digest)))
                    backoff.reset()
                    continue
                if all(record.agreed == digests[name] for name in sets for side in sets[name] for record in side):
                    return
            if not backoff.wait():
                raise BatchUnmatchedError(self._missing(matches, found))

    def _records(self, pair_name: str, match: Match) -> tuple[list[BatchRecord | None], list[BatchRecord | None]]:
        sides = []
        for members in (match.local, match.remote):
            prefix = batch_prefix(self._request.batch_id, pair_name, members[0].peer)
            side: list[BatchRecord | None] = [None] * len(members)
            for key, value in self._store.list(prefix).items():
                record = decode(value, BatchRecord, key)
                if 0 <= record.index < len(side) and not is_gone(members[record.index]):
                    side[record.index] = record
            sides.append(side)
        return sides[0], sides[1]

    def _prepare(
        self,
        matches: dict[str, Match],
        own: dict[str, list[torch.Tensor]],
        sets: dict[str, tuple[list[BatchRecord], list[BatchRecord]]],
        result: Registered,
    ) -> None:
        """Compare, plan, open and prepare. Whoever finds an error tells all members of that pair."""
        copies: list[Copy] = []
        fresh = Registered()
        for name, match in matches.items():
            local, remote = sets[name]
            try:
                shapes = agreed_shapes(self._request.batch_id, name, match, self._read(local), self._read(remote))
                part = Part(self._request.batch_id, name, match, own[name], shapes)
                copies.extend(self._connect(part, remote, fresh))
            except EthaRayError as error:
                fresh.close()
                refuse(self._store, [record.registration for record in (*local, *remote)], error)
                raise
        del result.opened[1:]
        result.opened.extend(fresh.opened)
        result.targets, result.sources, result.others = fresh.targets, fresh.sources, fresh.others
        result.program = self._transport.prepare(copies)

    def _read(self, records: Sequence[BatchRecord]) -> list[Manifest]:
        for record in records:
            if record.manifest not in self._manifests:
                key = manifest_key(record.manifest)
                data = self._store.get_bytes(key)
                self._manifests[record.manifest] = decode(data or b"", Manifest, key)
        return [self._manifests[record.manifest] for record in records]

    def _connect(self, part: Part, remote: Sequence[BatchRecord], fresh: Registered) -> list[Copy]:
        """Open what this rank receives of one pair, and note its peers."""
        match = part.match

        def open_remote(index: int, positions: Sequence[int]) -> Sequence[torch.Tensor]:
            opened = _open_remote(match.remote[index], remote[index].registration, part, positions)
            fresh.opened.append(opened)
            return opened.tensors

        copies, bytes_from = copies_in(part, open_remote)
        bytes_to = bytes_out(part)
        for index, record in enumerate(remote):
            member = match.remote[index]
            peer = Peer(record.registration, f"{member.peer}[{index}]", member, 0)
            for table, counts in ((fresh.sources, bytes_from), (fresh.targets, bytes_to)):
                if index in counts:
                    if not shares_memory(member.agent):
                        raise NoTransportError(_no_transport(part, member))
                    before = table[record.registration].bytes if record.registration in table else 0
                    table[record.registration] = replace(peer, bytes=before + counts[index])
            fresh.others[record.registration] = peer
        return copies

    def _missing(self, matches: dict[str, Match], found: dict[str, tuple[list[BatchRecord | None], list[BatchRecord | None]]]) -> str:
        parts = []
        for name, match in matches.items():
            for members, records in zip((match.local, match.remote), found[name], strict=True):
                missing = [index for index, record in enumerate(records) if record is None]
                if missing:
                    parts.append(f"{members[0].peer!r} lacks index {missing} of {len(records)} (pair {name!r})")
        what = "; ".join(parts) or "all have registered, and not all of them are ready"
        return (
            f"batch {self._request.batch_id!r} was not registered by everyone within {self._request.timeout:g} s: {what}."
            " Call register_tensors with this batch id on every rank of both sides"
        )


def _all(records: list[BatchRecord | None]) -> list[BatchRecord]:
    return [record for record in records if record is not None]


def _no_transport(part: Part, member: MemberRecord) -> str:
    mine = part.match.local[part.match.index].agent
    return (
        f"batch {part.batch_id!r}, pair {part.pair_name!r}: agent {mine.rank} ({mine.hostname}) and agent {member.agent.rank}"
        f" ({member.agent.hostname}) do not share memory: different hosts, or containers with a /dev/shm of their own."
        " Run both on one host with one /dev/shm (for containers: --ipc=host --pid=host)"
    )


def _open_remote(member: MemberRecord, registration: str, part: Part, positions: Sequence[int]) -> OpenedTensors:
    if not shares_memory(member.agent):
        raise NoTransportError(_no_transport(part, member))
    state = StateFile(member.agent.state_path)
    try:
        data = state.get(handles_key(registration))
    finally:
        state.close()
    if data is None:
        raise HandleExpiredError(
            f"batch {part.batch_id!r}: agent {member.agent.rank} has no handles of {member.peer!r} (pid {member.worker_pid})"
            " any more: that side has closed the batch; register it again on both sides"
        )
    table = msgspec.msgpack.decode(data, type=dict[str, list[bytes]])[part.pair_name]
    labels = [f"tensor {position} of batch {part.batch_id!r} from {member.peer!r}" for position in positions]
    return open_tensors([decode_handle(table[position]) for position in positions], labels=labels)
