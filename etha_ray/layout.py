"""What part of a global tensor each rank of a mesh holds.

A `Layout` is a mesh shape with one placement per mesh dimension. `Layout.region` answers which indices of the global
tensor a rank holds, by DTensor's own rule: `torch.chunk` sizes (ceil, the last shards smaller or empty), mesh dimensions
that shard the same tensor dimension nest left to right. Everything here is pure and immutable: the same input gives the
same answer in every process, without communication, and any thread may call it.

A placement is a token inside etha_ray: ``"S0"`` is ``Shard(0)``, ``"R"`` is ``Replicate()``. A mesh position is its
row-major index in the mesh, from 0; it is not the agent's rank, nor the rank in a process group.
"""

from __future__ import annotations

import itertools
import math
import operator
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

from .errors import LayoutError

Intervals = tuple[tuple[int, int], ...]
"""Half-open ``(start, stop)`` pairs, sorted, disjoint and none of them empty."""

_TOKEN = re.compile(r"R|S(-?\d+)")
_SUPPORTED = 'supported are Shard(dim) ("S0", "S1", "S-1", ...) and Replicate() ("R")'


def _ints(values: Iterable[Any], what: str) -> tuple[int, ...]:
    if isinstance(values, int):
        values = (values,)
    try:
        return tuple(operator.index(value) for value in values)
    except TypeError:
        raise LayoutError(f"{what} is {values!r}, but it must be a sequence of integers, such as (4, 2)") from None


@dataclass(frozen=True)
class MeshSpec:
    """A device mesh as one of its members sees it, without a process group.

    Args:
        shape: the mesh's size per dimension, such as ``(4, 2)``. A list or one integer is taken too.
        coordinate: this member's place in it, one entry per mesh dimension.
        dim_names: names of the mesh dimensions, for messages only.

    Raises:
        LayoutError: a size is below 1, the coordinate lies outside the mesh, or the lengths disagree.
    """

    shape: tuple[int, ...]
    coordinate: tuple[int, ...]
    dim_names: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        shape = _ints(self.shape, "MeshSpec shape")
        coordinate = _ints(self.coordinate, "MeshSpec coordinate")
        _check_mesh(shape)
        if len(coordinate) != len(shape):
            raise LayoutError(
                f"MeshSpec coordinate {coordinate} has {len(coordinate)} entries, but the mesh {shape} has "
                f"{len(shape)} dimensions: give one entry per mesh dimension"
            )
        if any(not 0 <= at < size for at, size in zip(coordinate, shape, strict=True)):
            raise LayoutError(
                f"MeshSpec coordinate {coordinate} lies outside the mesh {shape}: each entry must be at least 0 and "
                "below the size of its mesh dimension"
            )
        object.__setattr__(self, "shape", shape)
        object.__setattr__(self, "coordinate", coordinate)
        if self.dim_names is not None:
            names = tuple(self.dim_names)
            if isinstance(self.dim_names, str) or len(names) != len(shape):
                raise LayoutError(f"MeshSpec dim_names {self.dim_names!r} do not fit the mesh {shape}: give {len(shape)} names, or none")
            object.__setattr__(self, "dim_names", names)

    @classmethod
    def of(cls, mesh: Any) -> MeshSpec:
        """The spec of ``mesh``, which is a `MeshSpec` or a torch `DeviceMesh` that this process belongs to.

        Raises:
            LayoutError: ``mesh`` is something else, or this process is not in it.
        """
        if isinstance(mesh, MeshSpec):
            return mesh
        # Asked only for a foreign object, so that layouts stay usable (and quick to import) without torch.distributed.
        from torch.distributed.device_mesh import DeviceMesh

        if not isinstance(mesh, DeviceMesh):
            raise LayoutError(f"device_mesh is a {type(mesh).__name__}, but it must be a torch DeviceMesh or an etha_ray.MeshSpec")
        coordinate = mesh.get_coordinate()
        shape = tuple(mesh.mesh.shape)
        if coordinate is None:
            raise LayoutError(
                f"this process is not part of the device mesh of shape {shape}: "
                "only members of the mesh hold a shard, so only they may take part with it"
            )
        names = mesh.mesh_dim_names
        return cls(shape, tuple(coordinate), None if names is None else tuple(names))

    @property
    def ndim(self) -> int:
        """How many dimensions the mesh has."""
        return len(self.shape)

    @property
    def size(self) -> int:
        """How many members the mesh has."""
        return math.prod(self.shape)

    @property
    def index(self) -> int:
        """This member's position in the mesh, row-major, from 0."""
        return sum(at * stride for at, stride in zip(self.coordinate, _strides(self.shape), strict=True))


def placement_tokens(placements: Iterable[Any]) -> tuple[str, ...]:
    """``placements`` as tokens: torch `Shard`/`Replicate` objects or tokens, in order; a negative dim is kept.

    Raises:
        LayoutError: a placement is of another kind (`Partial`, `_StridedShard`, ...), or is not a placement.
    """
    if isinstance(placements, str) or not isinstance(placements, Iterable):
        raise LayoutError(f"placements is {placements!r}, but it must be a list with one placement per mesh dimension")
    return tuple(_token(placement) for placement in placements)


def _token(placement: Any) -> str:
    if isinstance(placement, str):
        if match := _TOKEN.fullmatch(placement):
            return "R" if match[1] is None else f"S{int(match[1])}"
        raise LayoutError(f"{placement!r} is not a placement: {_SUPPORTED}")
    from torch.distributed.tensor import Replicate, Shard

    # Exact types: in some torch versions _StridedShard is a subclass of Shard, and holds other elements.
    if type(placement) is Shard:
        return f"S{int(placement.dim)}"
    if type(placement) is Replicate:
        return "R"
    raise LayoutError(f"placement {placement!r} is not supported: {_SUPPORTED}. Redistribute the tensor to one of these first")


@dataclass(frozen=True)
class Region:
    """The part of a global tensor that one rank holds.

    The rank's local tensor holds, along each dimension, the indices of ``intervals`` one after the other.

    Attributes:
        intervals: per tensor dimension, the global indices held. A dimension of which nothing is held is ``()``.
    """

    intervals: tuple[Intervals, ...]

    @cached_property
    def shape(self) -> tuple[int, ...]:
        """The local tensor's shape."""
        return tuple(sum(stop - start for start, stop in held) for held in self.intervals)

    @property
    def numel(self) -> int:
        """How many elements are held; 1 for a tensor without dimensions."""
        return math.prod(self.shape)

    @property
    def is_empty(self) -> bool:
        """Whether nothing is held."""
        return 0 in self.shape

    def boxes(self) -> Iterator[tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]]:
        """Boxes that are contiguous in the global index space: ``(global_start, local_start, size)`` of each, row-major."""
        per_dim: list[list[tuple[int, int, int]]] = []
        for held in self.intervals:
            local = itertools.accumulate((stop - start for start, stop in held), initial=0)
            per_dim.append([(start, at, stop - start) for (start, stop), at in zip(held, local, strict=False)])
        for parts in itertools.product(*per_dim):
            yield tuple(p[0] for p in parts), tuple(p[1] for p in parts), tuple(p[2] for p in parts)

    def span(self, dim: int, start: int, size: int) -> Intervals:
        """The global indices behind ``[start, start + size)`` of the local tensor's dimension ``dim``, in local order."""
        found: list[tuple[int, int]] = []
        at = 0
        for first, last in self.intervals[dim]:
            low, high = max(start, at), min(start + size, at + last - first)
            if low < high:
                found.append((first + low - at, first + high - at))
            at += last - first
        return tuple(found)


@dataclass(frozen=True)
class Axis:
    """How one tensor dimension of ``size`` is cut: by ``factors``, the mesh sizes that shard it, outermost first."""

    size: int
    factors: tuple[int, ...]

    @property
    def pieces(self) -> tuple[Intervals, ...]:
        """What each shard holds, by its row-major position among ``factors``."""
        return _pieces(self.size, self.factors)


@lru_cache(maxsize=4096)
def _pieces(size: int, factors: tuple[int, ...]) -> tuple[Intervals, ...]:
    spans = [(0, size)]
    for count in factors:
        spans = [part for start, stop in spans for part in _chunks(start, stop, count)]
    return tuple(((start, stop),) if start < stop else () for start, stop in spans)


def _chunks(start: int, stop: int, count: int) -> Iterator[tuple[int, int]]:
    step = -(-(stop - start) // count)
    for number in range(count):
        yield min(start + number * step, stop), min(start + (number + 1) * step, stop)


@dataclass(frozen=True)
class Layout:
    """A mesh shape with one placement token per mesh dimension: how a group of ranks holds tensors.

    Use `Layout.of` for placements that come from outside. Frozen and hashable.

    Raises:
        LayoutError: the number of placements is not the number of mesh dimensions, or one of them is not supported.
    """

    mesh_shape: tuple[int, ...]
    placements: tuple[str, ...]

    def __post_init__(self) -> None:
        _check_mesh(self.mesh_shape)
        if len(self.placements) != len(self.mesh_shape):
            raise LayoutError(
                f"{len(self.placements)} placements [{', '.join(self.placements)}] do not fit the mesh {self.mesh_shape} "
                f"of {len(self.mesh_shape)} dimensions: give one placement per mesh dimension"
            )
        for token in self.placements:
            if not _TOKEN.fullmatch(token):
                raise LayoutError(f"{token!r} is not a placement: {_SUPPORTED}")

    @classmethod
    def of(cls, mesh_shape: Sequence[int], placements: Iterable[Any]) -> Layout:
        """The layout of ``placements`` (torch objects or tokens) on a mesh of ``mesh_shape``."""
        return cls(_ints(mesh_shape, "mesh shape"), placement_tokens(placements))

    @classmethod
    def whole(cls, n: int = 1) -> Layout:
        """``n`` ranks that each hold the whole tensor."""
        return cls((n,), ("R",))

    @classmethod
    def decode(cls, text: str) -> Layout:
        """The layout that `encode` wrote: ``"4x2: S0,R"``. Blanks do not matter."""
        mesh, colon, placements = text.partition(":")
        sizes = [part.strip() for part in mesh.split("x")] if mesh.strip() else []
        if not colon or not all(size.isdecimal() for size in sizes):
            raise LayoutError(f'{text!r} is not a layout: write mesh sizes, a colon, and placements, such as "4x2: S0,R"')
        tokens = [part.strip() for part in placements.split(",")] if placements.strip() else []
        return cls.of([int(size) for size in sizes], tokens)

    def encode(self) -> str:
        """This layout as text, ``"4x2: S0,R"``."""
        return f"{'x'.join(map(str, self.mesh_shape))}: {','.join(self.placements)}"

    def __str__(self) -> str:
        return self.encode()

    @property
    def ranks(self) -> int:
        """How many ranks the mesh has."""
        return math.prod(self.mesh_shape)

    def resolve(self, ndim: int) -> Layout:
        """This layout with negative dims counted from a tensor of ``ndim`` dimensions.

        Raises:
            LayoutError: a placement shards a dimension that such a tensor does not have.
        """
        return _resolve(self, ndim, f"a tensor of {ndim} dimensions")

    def axes(self, global_shape: Sequence[int]) -> tuple[Axis, ...]:
        """How each tensor dimension is cut; see `axis_dims` for the mesh dimensions that cut it."""
        shape = tuple(global_shape)
        cuts = _resolve(self, len(shape), f"a tensor of shape {shape}").axis_dims(len(shape))
        return tuple(Axis(size, tuple(self.mesh_shape[dim] for dim in dims)) for size, dims in zip(shape, cuts, strict=True))

    def axis_dims(self, ndim: int) -> tuple[tuple[int, ...], ...]:
        """Per dimension of a tensor of ``ndim`` dimensions, the mesh dimensions that shard it, outermost first."""
        return _axis_dims(self.resolve(ndim), ndim)

    def coordinate(self, index: int) -> tuple[int, ...]:
        """The mesh coordinate of position ``index``.

        Raises:
            LayoutError: there is no such position.
        """
        if not 0 <= index < self.ranks:
            raise LayoutError(f"the mesh {self.mesh_shape} has no position {index}: positions are 0 to {self.ranks - 1}")
        return tuple(index // stride % size for stride, size in zip(_strides(self.mesh_shape), self.mesh_shape, strict=True))

    def region(self, index: int, global_shape: Sequence[int]) -> Region:
        """What mesh position ``index`` holds of a tensor of ``global_shape``.

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
        strides = _strides(self.mesh_shape)
        return tuple(sum(map(operator.mul, place, strides)) for place in itertools.product(*choices))

    def global_shape(self, local_shapes: Mapping[int, Sequence[int]]) -> tuple[int, ...]:
        """The global shape of the tensor whose local shapes are these, for every mesh position.

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


def _check_mesh(shape: tuple[int, ...]) -> None:
    if any(size < 1 for size in shape):
        raise LayoutError(f"mesh shape {shape} has a dimension below 1: every mesh dimension needs at least one member")


@lru_cache(maxsize=1024)
def _strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(math.prod(shape[dim + 1 :]) for dim in range(len(shape)))


@lru_cache(maxsize=1024)
def _resolve(layout: Layout, ndim: int, tensor: str) -> Layout:
    tokens: list[str] = []
    for token in layout.placements:
        if token == "R":
            tokens.append(token)
            continue
        dim = int(token[1:])
        if not -ndim <= dim < ndim:
            raise LayoutError(
                f"placements [{', '.join(layout.placements)}] shard dimension {dim} of {tensor}, which has no such "
                "dimension: correct the Shard dim, or use Replicate() on that mesh dimension"
            )
        tokens.append(f"S{dim % ndim}")
    return layout if tuple(tokens) == layout.placements else Layout(layout.mesh_shape, tuple(tokens))


@lru_cache(maxsize=1024)
def _axis_dims(layout: Layout, ndim: int) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(dim for dim, token in enumerate(layout.placements) if token == f"S{axis}") for axis in range(ndim))


@lru_cache(maxsize=16384)
def _region(layout: Layout, index: int, shape: tuple[int, ...]) -> Region:
    at = layout.coordinate(index)
    held: list[Intervals] = []
    for axis, dims in zip(layout.axes(shape), layout.axis_dims(len(shape)), strict=True):
        piece = 0
        for dim in dims:
            piece = piece * layout.mesh_shape[dim] + at[dim]
        held.append(axis.pieces[piece])
    return Region(tuple(held))


@lru_cache(maxsize=128)
def _infer(layout: Layout, shapes: tuple[tuple[int, ...], ...]) -> tuple[int, ...]:
    ndim = len(shapes[0])
    for index, shape in enumerate(shapes):
        if len(shape) != ndim:
            raise LayoutError(
                f"position {index} of layout {layout} holds shape {shape}, but position 0 holds {shapes[0]}: "
                "all members must register a tensor of the same number of dimensions"
            )
    strides = _strides(layout.mesh_shape)
    inferred: list[int] = []
    for axis, dims in enumerate(_axis_dims(_resolve(layout, ndim, f"a tensor of local shape {shapes[0]}"), ndim)):
        places = itertools.product(*(range(layout.mesh_shape[dim]) for dim in dims))
        line = (sum(at * strides[dim] for at, dim in zip(place, dims, strict=True)) for place in places)
        inferred.append(sum(shapes[index][axis] for index in line))
    for index, shape in enumerate(shapes):
        expected = layout.region(index, inferred).shape
        if shape != expected:
            raise LayoutError(
                f"position {index} (mesh coordinate {layout.coordinate(index)}) holds shape {shape}, but layout {layout} "
                f"of a tensor of shape {tuple(inferred)} gives it {expected}: check this member's coordinate and "
                "placements, and shard as DTensor does (torch.chunk: equal pieces rounded up, the last ones smaller or empty)"
            )
    return tuple(inferred)
