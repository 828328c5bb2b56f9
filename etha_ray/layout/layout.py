"""A mesh shape with one placement per mesh dimension: how a group of ranks holds tensors.

What a rank holds is what `distribute_tensor(..., src_data_rank=None)` gives it, and what DTensor's
`compute_local_shape_and_global_offset` says: mesh dimensions are applied left to right. Where `_StridedShard` is uneven,
torch 2.13 contradicts itself. FSDP2 makes a `_StridedShard` of a tensor that tensor parallelism has cut before, and reads it
*by order*: its split factor says that the mesh dimension is applied after others to the right of it, and all of them cut as
`Shard`; `full_tensor` gathers by order, too. The two readings hold the same elements but where a size does not divide, and
some ranks then differ in how many: so `Layout.fit` tells from the local shapes which of them it is. Where three mesh dimensions
or more cut one tensor dimension, ranks may hold as many elements either way and yet not the same; then it is the order, in
which torch makes and gathers such tensors. Not followed are

- `full_tensor` of several `_StridedShard` whose split factors spell no order: it puts elements in the wrong places, or fails
  (``SS0/2,SS0/3`` on a 2x3 mesh, for one);
- `distribute_tensor` where it cuts by strides what `full_tensor` then gathers by order, and the local shapes do not show it;
- `distribute_tensor` that scatters: it stops with a bare AssertionError where a `_StridedShard` comes out uneven.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import Any

from etha_ray.errors import LayoutError
from etha_ray.layout.mesh import check_mesh, ints, strides
from etha_ray.layout.region import Axis, Region
from etha_ray.layout.tokens import CombineOp, parse, placement_tokens, reduce_ops, sharding

_BY_ORDER = " by order"


@dataclass(frozen=True)
class Reduction:
    """How the contributions of ranks that hold a Partial become the value that DTensor means.

    Attributes:
        dims: the mesh dimensions that are Partial. Ranks that differ only along these hold contributions to one value.
        op: what all contributions of one value are combined by, in ascending order of their ranks. An avg is a sum.
        divisor: what the combined value is then divided by: the product of the sizes of the mesh dimensions with avg.
        count: how many contributions one value has.
    """

    dims: tuple[int, ...]
    op: CombineOp
    divisor: int
    count: int


@dataclass(frozen=True)
class Layout:
    """A mesh shape with one placement token per mesh dimension: how a group of ranks holds tensors.

    Use `Layout.of` for placements that come from outside. Frozen and hashable.

    Attributes:
        by_order: whether split factors spell the order in which mesh dimensions are applied, rather than strides; see above.

    Raises:
        LayoutError: the number of placements is not the number of mesh dimensions, one of them is not supported, or Partial
            placements cannot be combined.
    """

    mesh_shape: tuple[int, ...]
    placements: tuple[str, ...]
    by_order: bool = False

    def __post_init__(self) -> None:
        check_mesh(self.mesh_shape)
        if len(self.placements) != len(self.mesh_shape):
            raise LayoutError(
                f"{len(self.placements)} placements [{', '.join(self.placements)}] do not fit the mesh {self.mesh_shape} "
                f"of {len(self.mesh_shape)} dimensions: give one placement per mesh dimension"
            )
        reduce_ops(self.placements)

    @classmethod
    def of(cls, mesh_shape: Sequence[int], placements: Iterable[Any]) -> Layout:
        """The layout of ``placements`` (torch objects or tokens) on a mesh of ``mesh_shape``."""
        return cls(ints(mesh_shape, "mesh shape"), placement_tokens(placements))

    @classmethod
    def whole(cls, n: int = 1) -> Layout:
        """``n`` ranks that each hold the whole tensor."""
        return cls((n,), ("R",))

    @classmethod
    def decode(cls, text: str) -> Layout:
        """The layout that `encode` wrote: ``"4x2: S0,R"``. Blanks do not matter."""
        text, by_order, rest = text.partition(_BY_ORDER)
        mesh, colon, placements = text.partition(":")
        sizes = [part.strip() for part in mesh.split("x")] if mesh.strip() else []
        if not colon or rest.strip() or not all(size.isdecimal() for size in sizes):
            raise LayoutError(f'{text!r} is not a layout: write mesh sizes, a colon, and placements, such as "4x2: S0,R"')
        tokens = [part.strip() for part in placements.split(",")] if placements.strip() else []
        return replace(cls.of([int(size) for size in sizes], tokens), by_order=bool(by_order))

    def encode(self) -> str:
        """This layout as text, ``"4x2: S0,R"``."""
        return f"{'x'.join(map(str, self.mesh_shape))}: {','.join(self.placements)}{_BY_ORDER if self.by_order else ''}"

    def __str__(self) -> str:
        return self.encode()

    @cached_property
    def ranks(self) -> int:
        """How many ranks the mesh has."""
        return math.prod(self.mesh_shape)

    @cached_property
    def partial(self) -> Reduction | None:
        """How contributions are combined; None where no placement is Partial. A target must not have any."""
        ops = [parse(token).op for token in self.placements]
        dims = tuple(dim for dim, op in enumerate(ops) if op is not None)
        if not dims:
            return None
        first = ops[dims[0]]
        assert first is not None
        op: CombineOp = "sum" if first == "avg" else first
        divisor = math.prod(self.mesh_shape[dim] for dim in dims if ops[dim] == "avg")
        return Reduction(dims, op, divisor, math.prod(self.mesh_shape[dim] for dim in dims))

    def resolve(self, ndim: int) -> Layout:
        """This layout with negative dims counted from a tensor of ``ndim`` dimensions.

        Raises:
            LayoutError: a placement shards a dimension that such a tensor does not have.
        """
        return _resolve(self, ndim, f"a tensor of {ndim} dimensions")

    def axes(self, global_shape: Sequence[int]) -> tuple[Axis, ...]:
        """How each tensor dimension is cut; see `axis_dims` for the mesh dimensions that cut it."""
        return _axes(self, tuple(global_shape))

    def axis_dims(self, ndim: int) -> tuple[tuple[int, ...], ...]:
        """Per dimension of a tensor of ``ndim`` dimensions, the mesh dimensions that shard it, outermost first.

        Raises:
            LayoutError: there is no such dimension, or this layout is read by order and spells none.
        """
        return _axis_dims(self.resolve(ndim), ndim)

    def coordinate(self, index: int) -> tuple[int, ...]:
        """The mesh coordinate of position ``index``.

        Raises:
            LayoutError: there is no such position.
        """
        if not 0 <= index < self.ranks:
            raise LayoutError(f"the mesh {self.mesh_shape} has no position {index}: positions are 0 to {self.ranks - 1}")
        return tuple(index // stride % size for stride, size in zip(strides(self.mesh_shape), self.mesh_shape, strict=True))

    def pieces(self, index: int, ndim: int) -> tuple[int, ...]:
        """Which piece of each axis of a tensor of ``ndim`` dimensions mesh position ``index`` holds."""
        at = self.coordinate(index)
        found: list[int] = []
        for dims in self.axis_dims(ndim):
            piece = 0
            for dim in dims:
                piece = piece * self.mesh_shape[dim] + at[dim]
            found.append(piece)
        return tuple(found)

    def region(self, index: int, global_shape: Sequence[int]) -> Region:
        """What mesh position ``index`` holds of a tensor of ``global_shape``, be it values or contributions to them.

        Raises:
            LayoutError: no such position, or a placement shards a dimension that the tensor does not have.
        """
        return _region(self, index, tuple(global_shape))

    def replicas(self, index: int) -> tuple[int, ...]:
        """All mesh positions that hold what ``index`` holds, itself included, in ascending order."""
        at = self.coordinate(index)
        choices = [
            range(size) if token == "R" else (place,) for size, token, place in zip(self.mesh_shape, self.placements, at, strict=True)
        ]
        steps = strides(self.mesh_shape)
        return tuple(sum(map(operator.mul, place, steps)) for place in itertools.product(*choices))

    def fit(self, local_shapes: Mapping[int, Sequence[int]], shape: Sequence[int] | None = None) -> tuple[Layout, tuple[int, ...]]:
        """This layout in the reading that fits these local shapes, by mesh position; and the tensor's global shape.

        Args:
            local_shapes: of all positions; of any, where ``shape`` is given: both readings may then fit, and it is this one.
            shape: the global shape, where it is known, as that of a DTensor is.

        Raises:
            LayoutError: the local shapes fit in neither reading; see `global_shape`.
        """
        try:
            found = self._fitting(local_shapes, shape)
            return (_meant(self, found) if len(local_shapes) == self.ranks else self), found
        except LayoutError:
            if self.by_order or not any(token.startswith("SS") for token in self.placements):
                raise
            ordered = replace(self, by_order=True)
            with contextlib.suppress(LayoutError):
                return ordered, ordered._fitting(local_shapes, shape)
            raise

    def global_shape(self, local_shapes: Mapping[int, Sequence[int]]) -> tuple[int, ...]:
        """The global shape of the tensor whose local shapes are these, for every mesh position.

        A tensor without elements may have any shape that has none: FSDP2 keeps such shards without their other sizes.

        Raises:
            LayoutError: positions are missing, or a local shape is not what this layout gives that position.
        """
        missing = [index for index in range(self.ranks) if index not in local_shapes]
        if missing or len(local_shapes) != self.ranks:
            raise LayoutError(
                f"layout {self} needs the local shapes of positions 0 to {self.ranks - 1}, but has those of "
                f"{sorted(local_shapes)[:16]}: every member of the mesh must take part"
            )
        return _infer(self, tuple(tuple(local_shapes[index]) for index in range(self.ranks)))

    def _fitting(self, local_shapes: Mapping[int, Sequence[int]], shape: Sequence[int] | None) -> tuple[int, ...]:
        if shape is None:
            return self.global_shape(local_shapes)
        _check(self, tuple(shape), ((index, tuple(local)) for index, local in local_shapes.items()))
        return tuple(shape)


@lru_cache(maxsize=1024)
def _resolve(layout: Layout, ndim: int, tensor: str) -> Layout:
    tokens: list[str] = []
    for token in layout.placements:
        dim = parse(token).dim
        if dim is None:
            tokens.append(token)
            continue
        if not -ndim <= dim < ndim:
            raise LayoutError(
                f"placements [{', '.join(layout.placements)}] shard dimension {dim} of {tensor}, which has no such "
                "dimension: correct the Shard dim, or use Replicate() on that mesh dimension"
            )
        tokens.append(sharding(token, dim % ndim))
    return layout if tuple(tokens) == layout.placements else replace(layout, placements=tuple(tokens))


@lru_cache(maxsize=1024)
def _axis_dims(layout: Layout, ndim: int) -> tuple[tuple[int, ...], ...]:
    dims = (tuple(dim for dim, token in enumerate(layout.placements) if parse(token).dim == axis) for axis in range(ndim))
    return tuple(_order(layout, group) if layout.by_order else group for group in dims)


def _order(layout: Layout, dims: tuple[int, ...]) -> tuple[int, ...]:
    """The order that the split factors of ``dims`` spell: each is the number of pieces that those applied before have made."""
    order: list[int] = []
    for dim in reversed(dims):
        pieces = list(itertools.accumulate((layout.mesh_shape[other] for other in order), operator.mul, initial=1))
        factor = parse(layout.placements[dim]).split_factor
        if factor not in pieces:
            raise LayoutError(f"the split factors of layout {layout} spell no order: {factor} is none of {pieces}")
        order.insert(pieces.index(factor), dim)
    return tuple(order)


@lru_cache(maxsize=4096)
def _meant(layout: Layout, shape: tuple[int, ...]) -> Layout:
    """``layout``, whose local shapes were found; by order if that gives every rank as many elements, and not the same."""
    if layout.by_order or not any(token.startswith("SS") for token in layout.placements):
        return layout
    ordered = replace(layout, by_order=True)
    with contextlib.suppress(LayoutError):  # split factors that spell no order
        axes = ordered.axes(shape)
        if all(axis.size % axis.count == 0 for axis in axes):
            return layout  # the same in both readings, and what nearly every tensor has
        pairs = [(layout.region(index, shape), ordered.region(index, shape)) for index in range(layout.ranks)]
        held = [(one, other) for one, other in pairs if not (one.is_empty and other.is_empty)]
        if all(one.shape == other.shape for one, other in held) and any(one != other for one, other in held):
            return ordered
    return layout


@lru_cache(maxsize=1024)
def _axes(layout: Layout, shape: tuple[int, ...]) -> tuple[Axis, ...]:
    dims = _axis_dims(_resolve(layout, len(shape), f"a tensor of shape {shape}"), len(shape))
    factors = [1 if layout.by_order else parse(token).split_factor for token in layout.placements]
    return tuple(
        Axis(size, tuple((layout.mesh_shape[dim], factors[dim]) for dim in group)) for size, group in zip(shape, dims, strict=True)
    )


@lru_cache(maxsize=4096)
def _region(layout: Layout, index: int, shape: tuple[int, ...]) -> Region:
    axes = layout.axes(shape)
    return Region(tuple(axis.held(piece) for axis, piece in zip(axes, layout.pieces(index, len(shape)), strict=True)))


@lru_cache(maxsize=128)
def _infer(layout: Layout, shapes: tuple[tuple[int, ...], ...]) -> tuple[int, ...]:
    ndim = len(shapes[0])
    for index, shape in enumerate(shapes):
        if len(shape) != ndim:
            raise LayoutError(
                f"position {index} of layout {layout} holds shape {shape}, but position 0 holds {shapes[0]}: "
                "all members must register a tensor of the same number of dimensions"
            )
    steps = strides(layout.mesh_shape)
    inferred: list[int] = []
    for axis, dims in enumerate(_axis_dims(_resolve(layout, ndim, f"a tensor of local shape {shapes[0]}"), ndim)):
        places = itertools.product(*(range(layout.mesh_shape[dim]) for dim in dims))
        line = (sum(at * steps[dim] for at, dim in zip(place, dims, strict=True)) for place in places)
        inferred.append(sum(shapes[index][axis] for index in line))
    _check(layout, tuple(inferred), enumerate(shapes))
    return tuple(inferred)


def _check(layout: Layout, shape: tuple[int, ...], local_shapes: Iterable[tuple[int, tuple[int, ...]]]) -> None:
    """Raise `LayoutError` for a local shape that is not what ``layout`` gives that position of a tensor of ``shape``."""
    sizes = [[sum(stop - start for start, stop in axis.held(piece)) for piece in range(axis.count)] for axis in layout.axes(shape)]
    for index, local in local_shapes:
        expected = tuple(sizes[axis][piece] for axis, piece in enumerate(layout.pieces(index, len(shape))))
        if local != expected and (len(local) != len(shape) or 0 not in local or 0 not in expected):
            raise LayoutError(
                f"position {index} (mesh coordinate {layout.coordinate(index)}) holds shape {local}, but layout {layout} "
                f"of a tensor of shape {shape} gives it {expected}: check this member's coordinate and "
                "placements, and shard as DTensor does (torch.chunk: equal pieces rounded up, the last ones smaller or empty)"
            )
