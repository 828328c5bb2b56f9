"""Which pieces of one side overlap a region of the other, and who holds them.

A *key* names a piece: all positions with the same key hold the same indices. `View` is what routing asks of a side's layout
on one shape; there is one for placements, where a piece is a product of pieces of axes, and one for explicit boxes.
"""

from __future__ import annotations

import itertools
import math
from bisect import bisect_left
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol, TypeAlias

from etha_ray.layout import Axis, Intervals, Layout, Pieces, Region
from etha_ray.layout.mesh import strides
from etha_ray.plan.route import Segment

Key: TypeAlias = "tuple[int, ...]"
"""Names a piece."""


@dataclass(frozen=True)
class Meeting:
    """What a region has in common with the piece ``key``.

    Attributes:
        segments: per dimension ``(at, there, size)``: where a common run starts in the piece's own local tensor and in the
            region's, ascending.
        shape: the size of all runs, per dimension.
    """

    key: Key
    segments: tuple[tuple[Segment, ...], ...]
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        """How many elements they have in common."""
        return math.prod(self.shape)


class View(Protocol):
    """A layout on one shape, as routing sees it."""

    def seat(self, position: int) -> tuple[Key, int] | None:
        """The piece that ``position`` holds, and which of its slot's holders it is; None for one that never holds anything."""

    def region(self, key: Key) -> Region:
        """The indices of a piece."""

    def slots(self, key: Key) -> tuple[tuple[int, ...], ...]:
        """Per contribution to a piece, in mesh order, the positions that hold it, ascending. One slot but for Partial."""

    def copies(self, key: Key) -> int:
        """How many positions hold one slot of a piece."""

    def meeting(self, region: Region) -> Iterator[Meeting]:
        """All pieces that have an element in common with ``region``, in an order of their keys."""


@lru_cache(maxsize=1024)
def view(layout: Layout | Pieces, shape: tuple[int, ...]) -> View:
    """``layout`` on a tensor of ``shape``. Raises `LayoutError` if it does not fit."""
    if isinstance(layout, Pieces):
        layout.check_shape(shape)
        return _BoxView(layout)
    return _MeshView(layout, shape)


class _MeshView:
    """Placements: a key is one piece number per axis."""

    def __init__(self, layout: Layout, shape: tuple[int, ...]) -> None:
        mesh = layout.mesh_shape
        self._layout = layout
        self._axes, self._dims = layout.axes(shape), layout.axis_dims(len(shape))
        partial = () if layout.partial is None else layout.partial.dims
        used = {*itertools.chain.from_iterable(self._dims), *partial}
        self._free = tuple(dim for dim in range(len(mesh)) if dim not in used)
        self._slots, self._copies = _offsets(mesh, partial), _offsets(mesh, self._free)

    def seat(self, position: int) -> tuple[Key, int]:
        at, copy = self._layout.coordinate(position), 0
        for dim in self._free:
            copy = copy * self._layout.mesh_shape[dim] + at[dim]
        return self._layout.pieces(position, len(self._axes)), copy

    def copies(self, key: Key) -> int:
        return len(self._copies)

    def region(self, key: Key) -> Region:
        return Region(tuple(axis.held(piece) for axis, piece in zip(self._axes, key, strict=True)))

    def slots(self, key: Key) -> tuple[tuple[int, ...], ...]:
        steps, first = strides(self._layout.mesh_shape), 0
        for axis, dims, piece in zip(self._axes, self._dims, key, strict=True):
            for dim, (count, _) in zip(reversed(dims), reversed(axis.cuts), strict=True):
                piece, at = divmod(piece, count)
                first += at * steps[dim]
        return tuple(tuple(first + slot + copy for copy in self._copies) for slot in self._slots)

    def meeting(self, region: Region) -> Iterator[Meeting]:
        along = [_along(axis, held) for axis, held in zip(self._axes, region.intervals, strict=True)]
        for parts in itertools.product(*along):
            yield Meeting(tuple(p[0] for p in parts), tuple(p[1] for p in parts), tuple(p[2] for p in parts))


class _BoxView:
    """Explicit pieces: a key is the number of a box. Boxes are found by bisection along the dimension that separates most."""

    def __init__(self, layout: Pieces) -> None:
        self._layout = layout
        found = layout.holders()
        dims = range(len(layout.shape))
        sweep = self._sweep = max(dims, key=lambda dim: len({offsets[dim] for offsets, _ in found}), default=0)
        self._boxes = sorted(found, key=lambda box: (box[0][sweep : sweep + 1], box))
        self._holders = [found[box] for box in self._boxes]
        self._seats = {rank: ((number,), copy) for number, ranks in enumerate(self._holders) for copy, rank in enumerate(ranks)}
        self._starts = [offsets[sweep] for offsets, _ in self._boxes] if dims else []
        self._longest = max((sizes[sweep] for _, sizes in self._boxes), default=0) if dims else 0

    def seat(self, position: int) -> tuple[Key, int] | None:
        return self._seats.get(position)

    def copies(self, key: Key) -> int:
        return len(self._holders[key[0]])

    def region(self, key: Key) -> Region:
        return self._layout.region(self._holders[key[0]][0], self._layout.shape)

    def slots(self, key: Key) -> tuple[tuple[int, ...], ...]:
        return (self._holders[key[0]],)

    def meeting(self, region: Region) -> Iterator[Meeting]:
        if region.is_empty:
            return
        for number in self._near(region):
            segments = tuple(
                _joined((low - at, there + low - start, high - low) for low, high, start, there in _common(held, at, at + size))
                for held, at, size in zip(region.intervals, *self._boxes[number], strict=True)
            )
            if all(segments):
                yield Meeting((number,), segments, tuple(sum(part[2] for part in parts) for parts in segments))

    def _near(self, region: Region) -> range:
        """Numbers of boxes of which the others need not be looked at."""
        if not region.intervals:
            return range(len(self._boxes))
        held = region.intervals[self._sweep]
        return range(bisect_left(self._starts, held[0][0] - self._longest + 1), bisect_left(self._starts, held[-1][1]))


def _common(held: Intervals, start: int, stop: int) -> Iterator[tuple[int, int, int, int]]:
    """Where ``held`` meets ``[start, stop)``: ``(low, high)``, then the start of that interval and where it is locally."""
    there = 0
    for first, last in held:
        low, high = max(first, start), min(last, stop)
        if low < high:
            yield low, high, first, there
        there += last - first


@lru_cache(maxsize=4096)
def _along(axis: Axis, held: Intervals) -> tuple[tuple[int, tuple[Segment, ...], int], ...]:
    """The pieces of ``axis`` that share an index with ``held``: number, segments, and how many indices they share."""
    found: dict[int, list[Segment]] = {}
    there = 0
    for span in held:
        for piece, at, start, stop in axis.find((span,)):
            found.setdefault(piece, []).append((at, there + start - span[0], stop - start))
        there += span[1] - span[0]
    return tuple((piece, _joined(parts), sum(part[2] for part in parts)) for piece, parts in sorted(found.items()))


def _joined(segments: Iterable[Segment]) -> tuple[Segment, ...]:
    """``segments`` with neighbours on both sides as one. What both sides hold in the same order needs one copy, not many."""
    joined: list[Segment] = []
    for segment in segments:
        if joined:
            at, there, size = joined[-1]
            if (at + size, there + size) == segment[:2]:
                segment = (at, there, size + segment[2])
                joined.pop()
        joined.append(segment)
    return tuple(joined)


def _offsets(mesh: tuple[int, ...], dims: tuple[int, ...]) -> tuple[int, ...]:
    """How far the positions along ``dims`` lie from the first of them, in row-major order."""
    steps = strides(mesh)
    places = itertools.product(*(range(0, mesh[dim] * steps[dim], steps[dim]) for dim in dims))
    return tuple(sum(place) for place in places)
