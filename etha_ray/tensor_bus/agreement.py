"""Do both sides of a batch mean the same tensors? Decided by every member from the same records, without talking.

The plan is a pure function of what is compared here, so members that publish the same digest have the same plan.

A batch may be sent either way. Where only one way is impossible (a Partial cannot be received, an integer tensor does not
keep floats), that direction is refused when it is asked for; where both are, or where the sides do not mean the same tensors
at all, the registration is.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Literal

import torch

from etha_ray.dtypes import DTYPES
from etha_ray.errors import EthaRayError, LayoutError, TensorMismatchError
from etha_ray.layout import Layout, Pieces
from etha_ray.plan import Side, digest_inputs
from etha_ray.tensor_bus.directions import direction_problem
from etha_ray.tensor_bus.pair import Match
from etha_ray.tensor_bus.records import BatchRecord, Manifest, MemberRecord, PlanInputs, TensorSpec, fingerprint

Direction = Literal["send", "recv"]


@dataclass(frozen=True)
class Held:
    """One tensor as one side of a pair holds it.

    ``shape`` is the global shape; between ranks that are paired without meshes, where there is no ``side``, it is the local
    one. ``lossy``: whether a cast into it may lose what values are.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    side: Side | None
    lossy: bool


@dataclass(frozen=True)
class AgreedTensor:
    """One tensor as both sides of a pair hold it."""

    local: Held
    remote: Held

    @property
    def shape(self) -> tuple[int, ...]:
        """The global shape, of both sides; between ranks that are paired without meshes, the local one."""
        return self.local.shape


@dataclass(frozen=True)
class Agreement:
    """What the members of a pair mean by a batch.

    Attributes:
        tensors: of this rank, in order.
        inputs: what the plan is made from, the same for all members.
        refused: why a direction is impossible, from where this rank is.
    """

    tensors: list[AgreedTensor]
    inputs: PlanInputs
    refused: dict[Direction, EthaRayError] = field(default_factory=dict)


def set_digest(batch_id: str, pair_name: str, match: Match, local: Sequence[BatchRecord], remote: Sequence[BatchRecord]) -> str:
    """One digest of who has registered what; the same on both sides."""
    sides = sorted((_registered(match.local, local), _registered(match.remote, remote)))
    return fingerprint(batch_id, pair_name, *sides)


def _registered(members: Sequence[MemberRecord], records: Sequence[BatchRecord]) -> tuple[object, ...]:
    return (
        members[0].peer,
        members[0].layout or "",
        tuple((member.agent.rank, member.agent.host) for member in members),
        tuple((record.registration, record.manifest) for record in records),
    )


def agree(batch_id: str, pair_name: str, match: Match, local: Sequence[Manifest], remote: Sequence[Manifest]) -> Agreement:
    """Compare what all members registered.

    Args:
        local, remote: manifests in the order of mesh indices.

    Raises:
        TensorMismatchError: the sides, or the members of one side, disagree on count, dtype or shape, or neither side can
            take what the other holds.
        LayoutError: a member's local shape does not fit its layout, or neither side can receive.
    """
    where = f"batch {batch_id!r}, pair {pair_name!r}"
    names = match.local[0].peer, match.remote[0].peer
    flipped = names[0] > names[1]  # every member says the same, whichever side it is on
    members, manifests = (match.local, match.remote), (local, remote)
    if flipped:
        members, manifests, names = members[::-1], manifests[::-1], names[::-1]
    if match.paired and not any(spec.offsets is not None for side in manifests for m in side for spec in m.tensors):
        columns = _paired(where, names, manifests)
        mine = columns[match.index]
        every = [tensor for column in columns for tensor in column]
    else:
        sides = [_held(where, m, found) for m, found in zip(members, manifests, strict=True)]
        mine = every = _matched(where, names, sides[0], sides[1])
    problems = [_first_problem(where, names[::step], every, step) for step in (1, -1)]
    if problems[0] is not None and problems[1] is not None:
        raise problems[0]
    order: tuple[Direction, Direction] = ("recv", "send") if flipped else ("send", "recv")
    tensors = [AgreedTensor(two, one) if flipped else AgreedTensor(one, two) for one, two in mine]
    refused = {direction: problem for direction, problem in zip(order, problems, strict=True) if problem is not None}
    return Agreement(tensors, _inputs(names, members, every), refused)


_Both = tuple[Held, Held]


def _paired(where: str, names: tuple[str, str], manifests: tuple[Sequence[Manifest], Sequence[Manifest]]) -> list[list[_Both]]:
    """For each index what the two ranks there hold; ranks without meshes exchange whole tensors."""
    found = []
    for index, pair in enumerate(zip(*manifests, strict=True)):
        one, two = ([Held(_dtype(where, spec), spec.local or (), None, spec.lossy) for spec in manifest.tensors] for manifest in pair)
        found.append(_matched(where, (f"{names[0]}[{index}]", f"{names[1]}[{index}]"), one, two))
    return found


def _matched(where: str, names: tuple[str, str], one: Sequence[Held], two: Sequence[Held]) -> list[_Both]:
    if len(one) != len(two):
        raise TensorMismatchError(
            f"{where}: {names[0]} registered {len(one)} tensors and {names[1]} {len(two)}:"
            " register the same tensors, in the same order, on both sides"
        )
    for position, (left, right) in enumerate(zip(one, two, strict=True)):
        if left.shape != right.shape:
            raise TensorMismatchError(
                f"{where}, tensor {position}: {names[0]} holds it{_as(left)} with shape {list(left.shape)}, {names[1]}{_as(right)}"
                f" with shape {list(right.shape)}: register the same tensors, in the same order, on both sides"
            )
    return list(zip(one, two, strict=True))


def _first_problem(where: str, names: Sequence[str], tensors: Iterable[_Both], step: int) -> EthaRayError | None:
    """Why the first of two peers cannot send to the second; ``step`` -1 turns the tensors around."""
    for position, both in enumerate(tensors):
        source, target = both[::step]
        problem = direction_problem(source.dtype, target.dtype, target.lossy, source.side, target.side, source.shape)
        if problem is not None:
            kind, why = problem
            return kind(
                f"{where}, tensor {position}: {names[0]} holds it{_as(source)} in {_name(source.dtype)}, {names[1]}{_as(target)} in"
                f" {_name(target.dtype)}, and it cannot be sent from {names[0]!r} to {names[1]!r}: {why}"
            )
    return None


def _inputs(names: tuple[str, str], members: tuple[Sequence[MemberRecord], ...], tensors: Iterable[_Both]) -> PlanInputs:
    """As text, for the plan's digest."""
    seats = (" ".join(f"{member.agent.rank}@{member.agent.host}" for member in side) for side in members)
    common = (digest_inputs(()), *(f"{name} on agents {where}" for name, where in zip(names, seats, strict=True)))
    return PlanInputs(common, tuple(f"{_input(names[0], one)}, {_input(names[1], two)}" for one, two in tensors))


def _input(name: str, held: Held) -> str:
    layout = "whole" if held.side is None else held.side.layout.encode()
    return f"{name} {list(held.shape)} {_name(held.dtype)} {layout}"


def difference(inputs: PlanInputs, other: PlanInputs) -> tuple[int | None, str, str]:
    """Where the inputs of two plans differ first: a tensor's position or None, and what both say."""
    for position, (one, two) in enumerate(zip(inputs.tensors, other.tensors, strict=False)):
        if one != two:
            return position, one, two
    if len(inputs.tensors) != len(other.tensors):
        return None, f"{len(inputs.tensors)} tensors", f"{len(other.tensors)} tensors"
    return None, *next(((one, two) for one, two in zip(inputs.common, other.common, strict=False) if one != two), ("", ""))


# --- one side ---------------------------------------------------------------------------------------------------------


def _held(where: str, members: Sequence[MemberRecord], manifests: Sequence[Manifest]) -> list[Held]:
    """One side's tensors with their global shapes and layouts."""
    peer, first = members[0].peer, manifests[0].tensors
    text, ranks = members[0].layout, len(members)
    layout = Layout.decode(text) if text is not None else Layout.whole(1) if ranks == 1 else None
    seats = tuple(member.agent.rank for member in members), tuple(member.agent.host for member in members)
    sides: dict[Layout | Pieces, Side] = {}
    for index, manifest in enumerate(manifests):
        if len(manifest.tensors) != len(first):
            raise TensorMismatchError(
                f"{where}: {peer}[{index}] registered {len(manifest.tensors)} tensors and {peer}[0] {len(first)}:"
                " register the same tensors, in the same order, on every rank"
            )
    found = []
    for position, specs in enumerate(zip(*(manifest.tensors for manifest in manifests), strict=True)):
        label = f"{where}, tensor {position}"
        _check_alike(label, peer, specs)
        shape, here = _placed(label, peer, layout, specs)
        if here not in sides:
            sides[here] = Side(here, *seats)
        found.append(Held(_dtype(label, specs[0]), shape, sides[here], specs[0].lossy))
    return found


def _check_alike(label: str, peer: str, specs: Sequence[TensorSpec]) -> None:
    first = specs[0]
    for index, spec in enumerate(specs):
        if spec is first:
            continue
        stated = spec.whole is not None and first.whole is not None and spec.whole != first.whole
        if spec.dtype != first.dtype or stated or (spec.offsets is None) != (first.offsets is None):
            raise TensorMismatchError(
                f"{label}: {peer}[{index}] holds {_spec(spec)} and {peer}[0] {_spec(first)}:"
                " register the same tensors, in the same order, on every rank"
            )
        if spec.lossy != first.lossy:
            raise TensorMismatchError(f"{label}: {peer}[{index}] and {peer}[0] differ in allow_lossy: give the same on every rank")


def _placed(label: str, peer: str, layout: Layout | None, specs: tuple[TensorSpec, ...]) -> tuple[tuple[int, ...], Layout | Pieces]:
    """The global shape, and the layout: the pair's, or what the ranks say themselves."""
    try:
        if specs[0].offsets is not None:
            pieces = _pieces(specs)
            return pieces.shape, pieces
        if layout is None:
            raise LayoutError(
                f"{len(specs)} ranks without a device_mesh in a batch with explicit pieces: register all tensors as pieces, or give this"
                " side a device_mesh and placements"
            )
        return _fitted(layout, specs)
    except LayoutError as error:
        raise LayoutError(f"{label} on {peer!r}: {error}") from error


@lru_cache(maxsize=1024)
def _pieces(specs: tuple[TensorSpec, ...]) -> Pieces:
    """Explicit pieces; an empty one is no piece, wherever it is said to be."""
    boxes = (None if spec.local is None or spec.offsets is None or 0 in spec.local else (spec.offsets, spec.local) for spec in specs)
    return Pieces(specs[0].whole or (), tuple(boxes))


@lru_cache(maxsize=4096)
def _fitted(layout: Layout, specs: tuple[TensorSpec, ...]) -> tuple[tuple[int, ...], Layout]:
    """The global shape, and the layout in the reading that the local shapes fit."""
    whole = next((spec.whole for spec in specs if spec.whole is not None), None)
    if whole is None:
        fitted, shape = layout.fit({index: spec.local or () for index, spec in enumerate(specs)})
        return shape, fitted
    local = {index: layout.region(index, whole).shape if spec.local is None else spec.local for index, spec in enumerate(specs)}
    return whole, layout.fit(local, whole)[0]


def _dtype(where: str, spec: TensorSpec) -> torch.dtype:
    dtype = DTYPES.get(spec.dtype)
    if dtype is None:
        raise TensorMismatchError(f"{where}: this torch has no dtype {spec.dtype!r}; run the same torch version on both sides")
    return dtype


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _as(held: Held) -> str:
    if held.side is None:
        return ""
    layout = held.side.layout
    return " whole" if layout == Layout.whole(1) else f" as {layout}"


def _spec(spec: TensorSpec) -> str:
    if spec.offsets is not None:
        return f"{spec.dtype} as a piece of shape {list(spec.local or ())} of {list(spec.whole or ())}"
    if spec.whole is not None:
        return f"{spec.dtype} as a DTensor of shape {list(spec.whole)}"
    return f"{spec.dtype} of local shape {list(spec.local or ())}"
