"""Do both sides of a batch mean the same tensors? Decided by every member from the same records, without talking.

The plan is a pure function of what is compared here, so members that publish the same digest have the same plan.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

from etha_ray.errors import LayoutError, TensorMismatchError
from etha_ray.layout import Layout
from etha_ray.tensor_bus.pair import Match
from etha_ray.tensor_bus.records import BatchRecord, Manifest, MemberRecord, TensorSpec, fingerprint

_FORMAT = "etha_ray batch 1"


def set_digest(batch_id: str, pair_name: str, match: Match, local: Sequence[BatchRecord], remote: Sequence[BatchRecord]) -> str:
    """One digest of everything that the plan is made from; the same on both sides."""
    sides = sorted((_side(match.local, local), _side(match.remote, remote)))
    return fingerprint(_FORMAT, batch_id, pair_name, *sides)


def _side(members: Sequence[MemberRecord], records: Sequence[BatchRecord]) -> tuple[object, ...]:
    return (
        members[0].peer,
        members[0].layout or "",
        tuple((member.agent.rank, member.agent.host) for member in members),
        tuple((record.registration, record.manifest) for record in records),
    )


def agreed_shapes(
    batch_id: str, pair_name: str, match: Match, local: Sequence[Manifest], remote: Sequence[Manifest]
) -> list[tuple[int, ...]]:
    """The global shape of each tensor, or for a pair without meshes this rank's own.

    Args:
        local, remote: manifests in the order of mesh indices.

    Raises:
        TensorMismatchError: the sides, or the members of one side, disagree on count, dtype or shape.
        LayoutError: a member's local shape does not fit its layout.
    """
    where = f"batch {batch_id!r}, pair {pair_name!r}"
    names = match.local[0].peer, match.remote[0].peer
    if match.paired:
        for index, (mine, other) in enumerate(zip(local, remote, strict=True)):
            _compare(where, [f"{name}[{index}]" for name in names], [("", mine.tensors), ("", other.tensors)])
        return [spec.local_shape for spec in local[match.index].tensors]
    here = _global_specs(where, match.local, local)
    there = _global_specs(where, match.remote, remote)
    _compare(where, names, [(_shown(match.local), here), (_shown(match.remote), there)])
    return [spec.local_shape if spec.global_shape is None else spec.global_shape for spec in here]


def _layout(members: Sequence[MemberRecord]) -> Layout:
    text = members[0].layout
    return Layout.whole(1) if text is None else Layout.decode(text)


def _shown(members: Sequence[MemberRecord]) -> str:
    return f" as {members[0].layout}" if members[0].layout is not None else " whole"


def _global_specs(where: str, members: Sequence[MemberRecord], manifests: Sequence[Manifest]) -> list[TensorSpec]:
    """One side's tensors with their global shapes."""
    layout, peer, first = _layout(members), members[0].peer, manifests[0].tensors
    for index, manifest in enumerate(manifests):
        if len(manifest.tensors) != len(first):
            raise TensorMismatchError(
                f"{where}: {peer}[{index}] registered {len(manifest.tensors)} tensors and {peer}[0] {len(first)}:"
                " register the same tensors, in the same order, on every rank"
            )
    specs = []
    for position, columns in enumerate(zip(*(manifest.tensors for manifest in manifests), strict=True)):
        label = f"{where}, tensor {position}"
        for index, spec in enumerate(columns):
            if spec.dtype != columns[0].dtype or _stated(spec, columns[0]):
                raise TensorMismatchError(
                    f"{label}: {peer}[{index}] holds {_spec(spec)} and {peer}[0] {_spec(columns[0])}:"
                    " register the same tensors, in the same order, on every rank"
                )
        shape = _global_shape(label, peer, layout, tuple(columns))
        specs.append(TensorSpec(dtype=columns[0].dtype, local_shape=(), global_shape=shape))
    return specs


def _stated(spec: TensorSpec, first: TensorSpec) -> bool:
    """Whether two DTensors state different global shapes."""
    return spec.global_shape is not None and first.global_shape is not None and spec.global_shape != first.global_shape


def _global_shape(label: str, peer: str, layout: Layout, columns: tuple[TensorSpec, ...]) -> tuple[int, ...]:
    try:
        inferred = _inferred(layout, tuple(spec.local_shape for spec in columns))
    except LayoutError as error:
        raise LayoutError(f"{label} on {peer!r}: {error}") from error
    for index, spec in enumerate(columns):
        if spec.global_shape is not None and spec.global_shape != inferred:
            raise LayoutError(
                f"{label}: {peer}[{index}] holds {_spec(spec)}, and layout {layout} makes {list(inferred)} of the local shapes:"
                " shard as DTensor does (torch.chunk)"
            )
    return inferred


@lru_cache(maxsize=4096)
def _inferred(layout: Layout, local_shapes: tuple[tuple[int, ...], ...]) -> tuple[int, ...]:
    return layout.global_shape(dict(enumerate(local_shapes)))


def _spec(spec: TensorSpec) -> str:
    whole = "" if spec.global_shape is None else f" (a DTensor of shape {list(spec.global_shape)})"
    return f"{spec.dtype} of local shape {list(spec.local_shape)}{whole}"


def _shape(spec: TensorSpec) -> list[int]:
    return list(spec.local_shape if spec.global_shape is None else spec.global_shape)


def _compare(where: str, names: Sequence[str], sides: Sequence[tuple[str, Sequence[TensorSpec]]]) -> None:
    (my_layout, mine), (other_layout, other) = sides
    if len(mine) != len(other):
        raise TensorMismatchError(
            f"{where}: {names[0]} registered {len(mine)} tensors and {names[1]} {len(other)}:"
            " register the same tensors, in the same order, on both sides"
        )
    for position, (one, two) in enumerate(zip(mine, other, strict=True)):
        for what, left, right in (("shape", _shape(one), _shape(two)), ("dtype", one.dtype, two.dtype)):
            if left != right:
                raise TensorMismatchError(
                    f"{where}, tensor {position}: {names[0]} holds it{my_layout} with {what} {left}, {names[1]}"
                    f"{other_layout} with {what} {right}: register the same tensors, in the same order, on both sides"
                )
