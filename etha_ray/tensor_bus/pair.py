"""A pair as one worker's agent sees it.

States::

    MATCHING ──► MATCHED     both sides are complete and describe the pair alike
        └──────► FAILED      refused, timed out or cancelled; `error` says which

`match` runs as a job; the loop moves the state when it is over.
"""

from __future__ import annotations

import enum
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import msgspec

from etha_ray.decoding import Decoder
from etha_ray.errors import EthaRayError, LayoutError, PairMismatchError, PairTimeoutError
from etha_ray.kvstore import KVStore
from etha_ray.layout import Layout, MeshSpec
from etha_ray.tensor_bus.commands import InitPair
from etha_ray.tensor_bus.jobs import Backoff, Cancellation, Job
from etha_ray.tensor_bus.members import claim, give_back, is_refused, members_and_absent, members_of, place_of, raise_if_refused, refuse
from etha_ray.tensor_bus.records import MemberRecord

_numbers: Decoder[tuple[int, ...]] = Decoder(tuple[int, ...])
_texts: Decoder[tuple[str, ...]] = Decoder(tuple[str, ...])


class PairState(enum.Enum):
    """See the top of this file."""

    MATCHING = "matching"
    MATCHED = "matched"
    FAILED = "failed"


@dataclass(frozen=True)
class Match:
    """Both complete sides of a pair, each in the order of mesh indices, and which local index is this worker's."""

    local: tuple[MemberRecord, ...]
    remote: tuple[MemberRecord, ...]
    index: int

    @classmethod
    def of(cls, member: MemberRecord, local: list[MemberRecord], remote: list[MemberRecord]) -> Match:
        """The match of ``member``, which is one of ``local``."""
        index = [other.attempt for other in local].index(member.attempt)
        return cls(local=tuple(local), remote=tuple(remote), index=index)

    @property
    def paired(self) -> bool:
        """Neither side has a mesh: rank i exchanges whole tensors with rank i."""
        return self.local[0].layout is None and self.remote[0].layout is None


@dataclass
class Pair:
    """One worker's place in a pair. Owned by the loop."""

    name: str
    local_name: str
    remote_name: str
    member: MemberRecord
    slot: str
    state: PairState = PairState.MATCHING
    match: Match | None = None
    error: BaseException | None = None
    job: Job[Match] | None = None
    waiting: list[InitPair] = field(default_factory=list)
    leaving: list[Callable[[], None]] = field(default_factory=list)
    left: threading.Event | None = None
    """Set once its place is free, where it is given back."""


def layout_of(command: InitPair) -> tuple[Layout | None, int | None]:
    """The layout and mesh index in a command; raises `LayoutError` when they do not fit together."""
    name = command.pair_name
    if command.mesh_shape_payload is None or command.placements_payload is None or command.coordinate_payload is None:
        return None, None
    try:
        shape = _numbers.decode(command.mesh_shape_payload)
        tokens = _texts.decode(command.placements_payload)
        coordinate = _numbers.decode(command.coordinate_payload)
    except msgspec.DecodeError as error:
        raise LayoutError(f"pair {name!r}: the layout in the command cannot be read ({error})") from error
    spec = MeshSpec(shape, coordinate)
    if spec.size != command.expected_world_size:
        raise LayoutError(
            f"pair {name!r}: mesh {shape} has {spec.size} coordinates and expected_world_size is {command.expected_world_size}"
        )
    return Layout.of(shape, tokens), spec.index


def match(
    store: KVStore,
    pair_name: str,
    member: MemberRecord,
    slot: str,
    timeout: float | None,
    leaving: Sequence[threading.Event],
    cancellation: Cancellation,
) -> Match:
    """Take this worker's place, once those before it have left, and wait until both sides are complete.

    Raises:
        CoordinateTakenError, PairMismatchError, PairTimeoutError, TransferCancelledError, StoreError.
    """
    deadline = None if timeout is None else time.monotonic() + timeout
    backoff = Backoff(cancellation, deadline)
    try:
        while not all(left.is_set() for left in leaving):
            store.exists(place_of(pair_name, member, slot))  # if it is away, they cannot leave, and this is why
            if not backoff.wait():
                raise PairTimeoutError(f"pair {pair_name!r}: a client that leaves it had not given its place back within {timeout:g} s")
        claim(store, pair_name, member, slot)
        seen = 0
        while True:
            raise_if_refused(store, member.attempt)
            local, remote = members_of(store, pair_name, member.peer), members_of(store, pair_name, member.remote)
            if member.attempt not in [other.attempt for other in local]:
                claim(store, pair_name, member, slot)  # removed by one who meant the dead worker that was here before
            elif _find_misfit(store, pair_name, member, local, remote):
                pass  # that one has been told, and is about to leave
            elif _complete(local, remote):
                return Match.of(member, local, remote)
            if len(local) + len(remote) != seen:
                seen = len(local) + len(remote)
                cancellation.waits_for = _absent(member, local, remote)
                backoff.reset()
            if not backoff.wait():
                raise PairTimeoutError(_missing(pair_name, member, local, remote, timeout))
    except BaseException:
        give_back(store, pair_name, member, slot)
        raise


def rematch(store: KVStore, pair_name: str, match: Match) -> tuple[Match | None, set[str]]:
    """The pair as it is now, after members were replaced; None while it is not complete. Also the attempts that are in it, or may be
    again."""
    member = match.local[match.index]
    local, absent = members_and_absent(store, pair_name, member.peer)
    remote, absent_there = members_and_absent(store, pair_name, member.remote)
    attempts = {other.attempt for other in (*local, *remote)} | absent | absent_there
    if member.attempt not in attempts or not _complete(local, remote):
        return None, attempts
    _check_alike(pair_name, local, remote)
    return Match.of(member, local, remote), attempts


def _complete(local: list[MemberRecord], remote: list[MemberRecord]) -> bool:
    return bool(local and remote) and len(local) == local[0].world_size and len(remote) == remote[0].world_size


def _find_misfit(store: KVStore, pair_name: str, member: MemberRecord, local: list[MemberRecord], remote: list[MemberRecord]) -> bool:
    """Raise if members describe the pair differently, and tell them; True if it is one that was told so before."""
    try:
        _check_alike(pair_name, local, remote)
    except EthaRayError as error:
        others = [other for other in (*local, *remote) if other.attempt != member.attempt]
        told = any(is_refused(store, other.attempt) for other in others)
        # One that was told gives its place back first, then removes what it was told: it may have done both by now.
        again = {other.attempt for name in (member.peer, member.remote) for other in members_of(store, pair_name, name)}
        if told or not again.issuperset(other.attempt for other in others):
            raise_if_refused(store, member.attempt)
            return True
        if not _fits_without(pair_name, member, local, remote):
            # This one first: who is told, leaves and comes back at once must see that this place is about to be given back.
            refuse(store, [member.attempt], error, [other.attempt for other in others])
            refuse(store, [other.attempt for other in others], error, [member.attempt])
        raise
    return False


def _fits_without(pair_name: str, member: MemberRecord, local: list[MemberRecord], remote: list[MemberRecord]) -> bool:
    """Whether the others are a complete pair, into which ``member`` does not belong."""
    rest = [other for other in local if other.attempt != member.attempt]
    try:
        _check_alike(pair_name, rest, remote)
    except EthaRayError:
        return False
    return _complete(rest, remote)


def _who(member: MemberRecord) -> str:
    place = f"index {member.index}" if member.index is not None else "no mesh"
    return f"{member.peer!r} on agent {member.agent.rank} (pid {member.worker_pid}, {place})"


def _check_alike(pair_name: str, local: list[MemberRecord], remote: list[MemberRecord]) -> None:
    for side in (local, remote):
        for member in side[1:]:
            first = side[0]
            for what, mine, others in (
                ("expected_world_size", member.world_size, first.world_size),
                ("mesh and placements", member.layout, first.layout),
                ("remote name", member.remote, first.remote),
            ):
                if mine != others:
                    raise PairMismatchError(
                        f"pair {pair_name!r}: {_who(member)} says {what} {mine!r} and {_who(first)} says {others!r}:"
                        " all workers of one side must give the same"
                    )
        if side and len(side) > side[0].world_size:
            raise PairMismatchError(
                f"pair {pair_name!r}: {len(side)} workers call themselves {side[0].peer!r} and expected_world_size is"
                f" {side[0].world_size}: {', '.join(_who(member) for member in side)}. Give the right size, or another name"
            )
    if local and remote:
        _check_sides(pair_name, local[0], remote[0])


def _check_sides(pair_name: str, one: MemberRecord, other: MemberRecord) -> None:
    if one.remote != other.peer or other.remote != one.peer:
        raise PairMismatchError(
            f"pair {pair_name!r}: {_who(one)} expects {one.remote!r} and {_who(other)} expects {other.remote!r}:"
            " each side's remote_name must be the other's local_name"
        )
    if (one.layout is None) == (other.layout is None):
        if one.layout is None and one.world_size != other.world_size:
            raise PairMismatchError(
                f"pair {pair_name!r}: without a mesh ranks are paired in order, and {one.peer!r} has {one.world_size} of them"
                f" and {other.peer!r} {other.world_size}: give both sides a device_mesh and placements"
            )
        return
    bare, meshed = (one, other) if one.layout is None else (other, one)
    if bare.world_size > 1:
        raise PairMismatchError(
            f"pair {pair_name!r}: {bare.peer!r} has {bare.world_size} ranks and no mesh, {meshed.peer!r} has {meshed.layout}:"
            f" give {bare.peer!r} a device_mesh and placements too"
        )


def _absent(member: MemberRecord, local: list[MemberRecord], remote: list[MemberRecord]) -> str:
    parts = []
    for name, side in ((member.peer, local), (member.remote, remote)):
        if not side:
            parts.append(f"nobody of {name!r} has come")
        elif len(side) < side[0].world_size:
            size = side[0].world_size
            if side[0].index is None:
                who = f"{size - len(side)} of {size}"
            else:
                who = f"index {sorted(set(range(size)) - {found.index for found in side})} of {size}"
            parts.append(f"{name!r} lacks {who}")
    return "; ".join(parts)


def _missing(pair_name: str, member: MemberRecord, local: list[MemberRecord], remote: list[MemberRecord], timeout: float | None) -> str:
    return (
        f"pair {pair_name!r} was not complete within {timeout:g} s: {_absent(member, local, remote)}."
        " Check that those workers run, and use the same pair name, names and store"
    )
