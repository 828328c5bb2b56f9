"""Registering a batch: a job that opens this worker's memory, finds the other members, and prepares the transfer.

The job publishes a `BatchRecord` for each pair of the batch and reads those of all other members. Once a pair is complete it
compares what everyone registered, opens the senders' memory and prepares the copies; then it publishes the digest of all
that as ``agreed``. The batch is ready when every member has published the same digest: each of them is then ready too.

A batch id is used again and again, by members that do not wait for one another, so what is read may be left over:

- A record that has agreed to something else belongs to a registration that is over, or is about to look again. What does not
  fit it is no error until the time is up.
- A record without memory behind it is being withdrawn, and is waited for to go away.
- A member that saw all agree may close at once, before the others have seen it. It has told their agents by then (`Registration.confirm`);
  a member whose set falls apart lets its loop read what came in (`settle`) before it takes up a new set.
- A worker that was replaced (other ``attempt``) makes the others read the pair again.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

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
from etha_ray.tensor_bus.members import is_gone, is_refused, raise_if_refused, refuse
from etha_ray.tensor_bus.pair import Match, Pair, PairState, rematch
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
    verdict_key,
)
from etha_ray.tensor_bus.state_file import StateFile, handles_key
from etha_ray.transport.base import Copy, CopyProgram, OneSidedTransport

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Peer:
    """Another member of the batch."""

    registration: str
    name: str
    member: MemberRecord
    bytes: int


@dataclass
class Registered:
    """What a registration came to: everything a transfer needs.

    ``targets`` get bytes from this rank and ``sources`` give it some; ``others`` are all other members, of both sides. By
    registration.
    """

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
    after: threading.Event | None
    """Set once this worker's earlier batch of the same id is withdrawn; None if there is none."""


_Records = tuple[list[BatchRecord | None], list[BatchRecord | None]]
_Set = tuple[list[BatchRecord], list[BatchRecord]]


class Registration:
    """One registration under way. Runs on a job's thread; `close` afterwards withdraws what it published.

    Args:
        store, state, transport: the agent's.
        request: what to register.
        settle: returns once the agent's loop has handled all messages that have come in.
    """

    def __init__(
        self, store: KVStore, state: StateFile, transport: OneSidedTransport, request: Request, settle: Callable[[Cancellation], None]
    ) -> None:
        self._store = store
        self._state = state
        self._transport = transport
        self._request = request
        self._settle = settle
        self._keys: dict[str, str] = {}
        self._mine: dict[str, BatchRecord] = {}
        self._manifests: dict[str, Manifest] = {}
        self._confirmed: set[str] = set()

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
            while request.after is not None and not request.after.is_set():
                if not backoff.wait():
                    raise BatchUnmatchedError(f"batch {request.batch_id!r}: this worker's earlier batch of that id is still being closed")
            matches = self._matches(grouped, backoff)
            own = self._open_own(grouped, result)
            for name in grouped:
                self._publish(name, matches[name], grouped[name], own[name])
            self._meet(matches, own, result, backoff, cancellation)
        except BaseException:
            result.close()
            try:
                self.close()
            except EthaRayError as error:
                logger.warning("batch %r could not be withdrawn: %s", request.batch_id, error)
            raise
        return result

    def confirm(self, registration: str) -> None:
        """The member with this registration saw that all agreed, this one included. From any thread."""
        self._confirmed.add(registration)

    def close(self) -> None:
        """Withdraw what was published. May be called more than once."""
        # The record before the memory: who still finds it finds its memory too, unless at this very moment.
        while self._keys:
            self._store.delete(self._keys.popitem()[1])
        self._state.delete([handles_key(self._request.registration)])
        self._store.delete(verdict_key(self._request.registration))

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

    def _publish(self, pair_name: str, match: Match, entries: Sequence[RegisteredTensor], tensors: Sequence[torch.Tensor]) -> None:
        specs = tuple(
            TensorSpec(str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape), entry.global_shape)
            for entry, tensor in zip(entries, tensors, strict=True)
        )
        data = encode(Manifest(specs))
        digest = fingerprint(data)
        if not self._store.exists(manifest_key(digest)):
            self._store.set_bytes(manifest_key(digest), data)
        self._manifests[digest] = Manifest(specs)
        member = match.local[match.index]
        self._mine[pair_name] = BatchRecord(registration=self._request.registration, attempt=member.attempt, manifest=digest)
        self._keys[pair_name] = batch_prefix(self._request.batch_id, pair_name, member.peer) + member.attempt
        self._store.set_bytes(self._keys[pair_name], encode(self._mine[pair_name]))

    def _publish_agreed(self, digests: dict[str, str]) -> None:
        for name, record in self._mine.items():
            agreed = digests.get(name, "")
            if record.agreed != agreed:
                self._mine[name] = msgspec.structs.replace(record, agreed=agreed)
                self._store.set_bytes(self._keys[name], encode(self._mine[name]))

    # --------------------------------------------------------------------------------------------- all members

    def _meet(
        self,
        matches: dict[str, Match],
        own: dict[str, list[torch.Tensor]],
        result: Registered,
        backoff: Backoff,
        cancellation: Cancellation,
    ) -> None:
        prepared: dict[str, str] = {}
        known: set[str] = set()
        problem: EthaRayError | None = None
        while True:
            raise_if_refused(self._store, self._request.registration, known)
            found = {name: self._records(name, matches) for name in matches}
            known = {record.registration for sides in found.values() for side in sides for record in side if record is not None}
            sets = _complete_sets(found)
            digests = {name: set_digest(self._request.batch_id, name, matches[name], *sets[name]) for name in sets}
            if prepared and digests != prepared:
                self._settle(cancellation)
            if prepared and not self._confirmed.isdisjoint(result.others):
                return
            if digests != prepared:
                prepared, problem = {}, None
            if digests and not prepared:
                try:
                    self._prepare(matches, own, sets, result)
                except EthaRayError as error:
                    self._publish_agreed({})
                    if not isinstance(error, HandleExpiredError) and self._is_final(matches, sets):
                        mine = self._request.registration
                        # This one first: who is told and registers again at once must see that this record is to go.
                        refuse(self._store, [mine], error, known)
                        refuse(self._store, known - {mine}, error, [mine])
                        raise
                    problem = error
                else:
                    prepared = digests
                    self._publish_agreed(digests)
                    backoff.reset()
                    continue
            elif digests and all(record.agreed == digests[name] for name in sets for side in sets[name] for record in side):
                return
            if not backoff.wait():
                raise problem or BatchUnmatchedError(self._missing(matches, found))

    def _records(self, pair_name: str, matches: dict[str, Match]) -> _Records:
        """Everyone's record, in the order of both sides; the match is read again if members were replaced."""
        match = matches[pair_name]
        sides = match.local, match.remote
        by_attempt: dict[str, BatchRecord] = {}
        keys: dict[str, str] = {}
        for members in sides:
            prefix = batch_prefix(self._request.batch_id, pair_name, members[0].peer)
            for key, value in self._store.list(prefix).items():
                record = decode(value, BatchRecord, key)
                by_attempt[record.attempt], keys[record.attempt] = record, key
        gone = {member.attempt for members in sides for member in members if is_gone(member)}
        strangers = by_attempt.keys() - {member.attempt for members in sides for member in members}
        if gone or strangers:
            fresh, attempts = rematch(self._store, pair_name, match)
            for attempt in strangers - attempts:
                self._store.delete(keys[attempt])  # of a worker that died with its agent: nobody else removes it
            if fresh is not None:
                matches[pair_name] = fresh
                sides = fresh.local, fresh.remote
        local, remote = ([None if m.attempt in gone else by_attempt.get(m.attempt) for m in members] for members in sides)
        return local, remote

    def _is_final(self, matches: dict[str, Match], sets: dict[str, _Set]) -> bool:
        """Whether everyone else is looking at the same set right now, so that what does not fit will not fit later either."""
        mine = self._request.registration
        others = [record for sides in sets.values() for side in sides for record in side if record.registration != mine]
        if any(record.agreed or is_refused(self._store, record.registration) for record in others):
            return False
        # One that was refused removes its record first, then the refusal: it may have done both since the set was read.
        again = _complete_sets({name: self._records(name, matches) for name in matches})
        return again.keys() == sets.keys() and all(_registrations(again[name]) == _registrations(sets[name]) for name in sets)

    def _prepare(self, matches: dict[str, Match], own: dict[str, list[torch.Tensor]], sets: dict[str, _Set], result: Registered) -> None:
        """Compare, plan, open the senders' memory and prepare the copies."""
        copies: list[Copy] = []
        fresh = Registered()
        try:
            for name, match in matches.items():
                local, remote = sets[name]
                shapes = agreed_shapes(self._request.batch_id, name, match, self._read(local), self._read(remote))
                part = Part(self._request.batch_id, name, match, own[name], shapes)
                copies.extend(self._connect(part, local, remote, fresh))
            fresh.program = self._transport.prepare(copies)
        except BaseException:
            fresh.close()
            raise
        del result.opened[1:]
        result.opened.extend(fresh.opened)
        result.targets, result.sources, result.others, result.program = fresh.targets, fresh.sources, fresh.others, fresh.program

    def _read(self, records: Sequence[BatchRecord]) -> list[Manifest]:
        for record in records:
            if record.manifest not in self._manifests:
                key = manifest_key(record.manifest)
                self._manifests[record.manifest] = decode(self._store.get_bytes(key) or b"", Manifest, key)
        return [self._manifests[record.manifest] for record in records]

    def _connect(self, part: Part, local: Sequence[BatchRecord], remote: Sequence[BatchRecord], fresh: Registered) -> list[Copy]:
        """Open what this rank receives of one pair, and note the other members."""
        match = part.match
        for index, record in enumerate(local):
            if index != match.index:
                member = match.local[index]
                fresh.others[record.registration] = Peer(record.registration, f"{member.peer}[{index}]", member, 0)

        def open_remote(index: int, positions: Sequence[int]) -> Sequence[torch.Tensor]:
            opened = _open_remote(match.remote[index], remote[index].registration, part, positions)
            fresh.opened.append(opened)
            return opened.tensors

        copies, bytes_from = copies_in(part, open_remote)
        bytes_to = bytes_out(part)
        for index, record in enumerate(remote):
            member = match.remote[index]
            name = f"{member.peer}[{index}]"
            known = fresh.others.get(record.registration)
            if known is not None and known.name != name:
                name = f"{known.name}+{name}"  # in several pairs of this batch
            fresh.others[record.registration] = Peer(record.registration, name, member, 0)
            for table, counts in ((fresh.sources, bytes_from), (fresh.targets, bytes_to)):
                before = table[record.registration].bytes if record.registration in table else None
                if index in counts or before is not None:
                    table[record.registration] = Peer(record.registration, name, member, (before or 0) + counts.get(index, 0))
                if index in counts and not shares_memory(member.agent):
                    raise NoTransportError(_no_transport(part, member))
        return copies

    def _missing(self, matches: dict[str, Match], found: dict[str, _Records]) -> str:
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


def _complete_sets(found: dict[str, _Records]) -> dict[str, _Set]:
    """The records of all pairs; nothing unless everyone's is there."""
    if any(record is None for sides in found.values() for side in sides for record in side):
        return {}
    return {name: (_present(local), _present(remote)) for name, (local, remote) in found.items()}


def _registrations(sides: _Set) -> list[str]:
    return [record.registration for side in sides for record in side]


def _present(records: list[BatchRecord | None]) -> list[BatchRecord]:
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
    try:
        state = StateFile(member.agent.state_path)
    except FileNotFoundError:
        data = None
    else:
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
