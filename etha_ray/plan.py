"""Which part of a tensor goes from whom to whom, between two layouts.

A rank asks only for its own part: `routes_into` lists what a target receives, `routes_out_of` what a source sends. Both
work dimension by dimension on intervals, so their cost follows what that rank exchanges; they agree with one another
because both ask the same two questions: which pieces overlap, and which of several holders serves this target. Everything
is frozen data and pure functions: the same on every rank, without communication, in any thread. `plan` collects all
routes, to prove, hash or show them.

Positions are indices in a side's mesh (see `layout`), not agent ranks; `Side` says which agent sits at each.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import operator
from bisect import bisect_left, bisect_right
from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

from .errors import LayoutError
from .layout import Axis, Layout

_FORMAT = "etha_ray plan 1"
"""Part of every hash, so that two versions which route differently never take each other's plan for their own."""

_TABLE_LIMIT = 16
"""Ranks a side up to which `explain_plan` prints the whole source x target table."""

Segment = tuple[int, int, int]
"""``(source_start, target_start, size)`` along one dimension, in local coordinates."""


@dataclass(frozen=True)
class Side:
    """Who sits where on one side of a pair.

    Attributes:
        layout: how this side holds the tensor.
        agents: the agent's rank at each mesh position. Any order, with gaps or repeats; the other side may name the same.
        hosts: the host of that agent. Positions of one agent are on one host.

    Raises:
        LayoutError: there is not one agent and one host per mesh position.
    """

    layout: Layout
    agents: tuple[int, ...]
    hosts: tuple[str, ...]
    _hash: int = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "agents", tuple(self.agents))
        object.__setattr__(self, "hosts", tuple(self.hosts))
        ranks = self.layout.ranks
        if len(self.agents) != ranks or len(self.hosts) != ranks:
            raise LayoutError(
                f"layout {self.layout} has {ranks} positions, but {len(self.agents)} agents and {len(self.hosts)} hosts "
                "were given: name one agent and one host per position"
            )
        # Sides are cache keys for every tensor of a model; hashing thousands of hosts each time would cost more than planning.
        # Made from text, so that it holds in another process too, where hash(str) differs.
        object.__setattr__(self, "_hash", int(digest_inputs((self.encode(),))[:15], 16))

    def __hash__(self) -> int:
        return self._hash

    def encode(self) -> str:
        """This side as text; equal sides, equal text."""
        seats = (f"{agent}@{len(host)}:{host}" for agent, host in zip(self.agents, self.hosts, strict=True))
        return f"{self.layout.encode()} [{' '.join(seats)}]"


@dataclass(frozen=True, order=True)
class Box:
    """One rectangular piece: where it starts in the source's and in the target's own local tensor, and its size."""

    source_start: tuple[int, ...]
    target_start: tuple[int, ...]
    size: tuple[int, ...]

    @property
    def numel(self) -> int:
        """How many elements the box has; 1 for a tensor without dimensions."""
        return math.prod(self.size)


@dataclass(frozen=True, order=True)
class Route:
    """Everything that mesh position ``source`` gives to mesh position ``target``.

    Attributes:
        boxes: the pieces, ascending, as few as can be; empty only where there is nothing to give.
        numel: elements in all boxes together.
    """

    source: int
    target: int
    boxes: tuple[Box, ...]
    numel: int


@lru_cache(maxsize=1024)
def routes_into(source: Side, target: Side, shape: tuple[int, ...], target_index: int) -> tuple[Route, ...]:
    """What mesh position ``target_index`` of ``target`` receives, by ascending source.

    Each element it holds is in exactly one box. Of several sources that hold the same region, one is asked: on the same
    agent, else on the same host, else they share the targets that want the region evenly among them.

    Raises:
        LayoutError: a layout does not fit ``shape``, or there is no such position.
    """
    return _routes_into(source, target, shape, target_index)


@lru_cache(maxsize=1024)
def routes_out_of(source: Side, target: Side, shape: tuple[int, ...], source_index: int) -> tuple[Route, ...]:
    """What mesh position ``source_index`` of ``source`` sends, by ascending target: its share of all `routes_into`.

    Raises:
        LayoutError: a layout does not fit ``shape``, or there is no such position.
    """
    pieces = _grid(source.layout, shape).pieces_of(source.layout.coordinate(source_index))
    served = _served(source, target, shape, pieces)
    return tuple(_route(source.layout, target.layout, shape, source_index, index) for index, holder in served if holder == source_index)


def paired_route(index: int, local_shape: Sequence[int]) -> Route:
    """The route of a pair without meshes: position ``index`` gives its whole local tensor to position ``index``."""
    size = tuple(local_shape)
    start = (0,) * len(size)
    numel = math.prod(size)
    return Route(index, index, (Box(start, start, size),) if numel else (), numel)


# --- which positions hold which piece ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Grid:
    """A layout on one shape as a product of axes: a position is one piece number per axis, and one copy of that region."""

    axes: tuple[Axis, ...]
    dims: tuple[tuple[int, ...], ...]
    offsets: tuple[tuple[int, ...], ...]
    copies: tuple[int, ...]

    def pieces_of(self, coordinate: tuple[int, ...]) -> tuple[int, ...]:
        """The piece number on each axis of the position at ``coordinate``."""
        pieces: list[int] = []
        for axis, dims in zip(self.axes, self.dims, strict=True):
            piece = 0
            for dim, size in zip(dims, axis.factors, strict=True):
                piece = piece * size + coordinate[dim]
            pieces.append(piece)
        return tuple(pieces)

    def holders(self, pieces: tuple[int, ...]) -> tuple[int, ...]:
        """The positions that hold this region, ascending."""
        base = sum(offsets[piece] for offsets, piece in zip(self.offsets, pieces, strict=True))
        return tuple(base + copy for copy in self.copies)


@lru_cache(maxsize=1024)
def _grid(layout: Layout, shape: tuple[int, ...]) -> _Grid:
    axes, dims = layout.axes(shape), layout.axis_dims(len(shape))
    sharded = set(itertools.chain.from_iterable(dims))
    free = tuple(dim for dim in range(len(layout.mesh_shape)) if dim not in sharded)
    offsets = tuple(_offsets(layout.mesh_shape, group) for group in dims)
    return _Grid(axes, dims, offsets, copies=_offsets(layout.mesh_shape, free))


def _offsets(mesh: tuple[int, ...], dims: tuple[int, ...]) -> tuple[int, ...]:
    """The mesh positions along ``dims`` (row-major, all other coordinates 0); ascending if ``dims`` are."""
    strides = [math.prod(mesh[dim + 1 :]) for dim in dims]
    places = itertools.product(*(range(mesh[dim]) for dim in dims))
    return tuple(sum(map(operator.mul, place, strides)) for place in places)


@lru_cache(maxsize=65536)
def _overlapping(axis: Axis, piece: int, other: Axis) -> tuple[int, ...]:
    """The pieces of ``other`` that share an index with piece ``piece`` of ``axis``, ascending."""
    starts, stops, owners = _intervals(other)
    found: set[int] = set()
    for start, stop in axis.pieces[piece]:
        found.update(owners[bisect_right(stops, start) : bisect_left(starts, stop)])
    return tuple(sorted(found))


@lru_cache(maxsize=4096)
def _intervals(axis: Axis) -> tuple[list[int], list[int], list[int]]:
    """All intervals of all pieces by ascending start: starts, stops, and whose they are."""
    flat = sorted((start, stop, piece) for piece, held in enumerate(axis.pieces) for start, stop in held)
    return [f[0] for f in flat], [f[1] for f in flat], [f[2] for f in flat]


@lru_cache(maxsize=65536)
def _segments(source: Axis, source_piece: int, target: Axis, target_piece: int) -> tuple[Segment, ...]:
    """What two pieces share, as few segments as can be: neighbours that stay neighbours on both sides are one."""
    found: list[Segment] = []
    source_at = 0
    for source_start, source_stop in source.pieces[source_piece]:
        target_at = 0
        for target_start, target_stop in target.pieces[target_piece]:
            start, stop = max(source_start, target_start), min(source_stop, target_stop)
            if start < stop:
                segment = (source_at + start - source_start, target_at + start - target_start, stop - start)
                if found and all(found[-1][side] + found[-1][2] == segment[side] for side in (0, 1)):
                    segment = (found[-1][0], found[-1][1], found[-1][2] + segment[2])
                    found.pop()
                found.append(segment)
            target_at += target_stop - target_start
        source_at += source_stop - source_start
    return tuple(found)


def _routes_into(source: Side, target: Side, shape: tuple[int, ...], target_index: int) -> tuple[Route, ...]:
    mine, theirs = _grid(target.layout, shape), _grid(source.layout, shape)
    own = mine.pieces_of(target.layout.coordinate(target_index))
    touched = map(_overlapping, mine.axes, own, theirs.axes)
    sources = sorted(_chosen(source, target, shape, pieces, target_index) for pieces in itertools.product(*touched))
    return tuple(_route(source.layout, target.layout, shape, index, target_index) for index in sources)


def _route(source: Layout, target: Layout, shape: tuple[int, ...], source_index: int, target_index: int) -> Route:
    giving, taking = _grid(source, shape), _grid(target, shape)
    per_dim = [
        _segments(source_axis, source_piece, target_axis, target_piece)
        for source_axis, source_piece, target_axis, target_piece in zip(
            giving.axes,
            giving.pieces_of(source.coordinate(source_index)),
            taking.axes,
            taking.pieces_of(target.coordinate(target_index)),
            strict=True,
        )
    ]
    boxes = tuple(
        Box(tuple(p[0] for p in parts), tuple(p[1] for p in parts), tuple(p[2] for p in parts)) for parts in itertools.product(*per_dim)
    )
    return Route(source_index, target_index, boxes, sum(box.numel for box in boxes))


# --- which of several holders serves a target --------------------------------------------------------------------------


def _chosen(source: Side, target: Side, shape: tuple[int, ...], pieces: tuple[int, ...], target_index: int) -> int:
    """The source position that gives the region ``pieces`` to ``target_index``."""
    holders = _grid(source.layout, shape).holders(pieces)
    if len(holders) == 1:
        return holders[0]
    return _matching(source, target, holders, _wanting(source.layout, target.layout, shape, pieces))[target_index]


def _served(source: Side, target: Side, shape: tuple[int, ...], pieces: tuple[int, ...]) -> Iterator[tuple[int, int]]:
    """Each target position that wants some of the region ``pieces``, ascending, with the source position that gives it."""
    holders = _grid(source.layout, shape).holders(pieces)
    wanting = _wanting(source.layout, target.layout, shape, pieces)
    if len(holders) == 1:
        return ((index, holders[0]) for index in wanting)
    served = _matching(source, target, holders, wanting)
    return ((index, served[index]) for index in wanting)


def _wanting(source: Layout, target: Layout, shape: tuple[int, ...], pieces: tuple[int, ...]) -> tuple[int, ...]:
    """The target positions that want some of the source region ``pieces``, ascending."""
    axes, other = _grid(source, shape).axes, _grid(target, shape)
    return _positions(target, shape, tuple(map(_overlapping, axes, pieces, other.axes)))


@lru_cache(maxsize=4096)
def _positions(layout: Layout, shape: tuple[int, ...], pieces: tuple[tuple[int, ...], ...]) -> tuple[int, ...]:
    grid = _grid(layout, shape)
    return tuple(sorted(itertools.chain.from_iterable(map(grid.holders, itertools.product(*pieces)))))


@lru_cache(maxsize=1024)
def _matching(source: Side, target: Side, holders: tuple[int, ...], wanting: tuple[int, ...]) -> dict[int, int]:
    """Which of ``holders`` serves each of ``wanting``. Each rule spreads only the targets that the rules before it left."""
    served: dict[int, int] = {}
    for givers, takers in ((source.agents, target.agents), (source.hosts, target.hosts)):
        near = _grouped(holders, givers)
        for place, members in _grouped((index for index in wanting if index not in served), takers).items():
            if place in near:
                served.update(_spread(near[place], members))
    served.update(_spread(holders, [index for index in wanting if index not in served]))
    return served


def _grouped(indices: Iterable[int], places: Sequence[Hashable]) -> dict[Hashable, list[int]]:
    groups: dict[Hashable, list[int]] = {}
    for index in indices:
        groups.setdefault(places[index], []).append(index)
    return groups


def _spread(holders: Sequence[int], members: Sequence[int]) -> Iterator[tuple[int, int]]:
    # Evenly in blocks, not in turns: fewer members than holders are then served from all over the mesh, not its first host.
    for turn, index in enumerate(members):
        yield index, holders[turn * len(holders) // len(members)]


# --- the whole plan -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TensorPlan:
    """All routes of one tensor between two sides. An agent needs only its own; this is for proof, hashes and display.

    Attributes:
        shape: the tensor's global shape.
        routes: ascending by target, then source.
    """

    source: Side
    target: Side
    shape: tuple[int, ...]
    routes: tuple[Route, ...]

    def verify(self) -> None:
        """Prove that each target element is written exactly once, from a source that holds that very element.

        The proof does not use the code that made the routes: it asks both layouts what each position holds.

        Raises:
            LayoutError: it is not so; the message names the route or the position.
        """
        into: dict[int, list[Box]] = {index: [] for index in range(self.target.layout.ranks)}
        for route in self.routes:
            _verify_route(self, route)
            into[route.target].extend(route.boxes)
        for index, boxes in into.items():
            wanted = self.target.layout.region(index, self.shape).numel
            written = sum(box.numel for box in boxes)
            if written != wanted:
                raise LayoutError(f"{self._name()} writes {written} elements into target {index}, which holds {wanted}")
            if overlap := _overlap(boxes):
                raise LayoutError(f"{self._name()} writes target {index} twice: {overlap[0]} overlaps {overlap[1]}")

    def bytes_between(self, itemsize: int) -> dict[tuple[int, int], int]:
        """Bytes that cross, by (source position, target position), for elements of ``itemsize`` bytes."""
        crossing: dict[tuple[int, int], int] = {}
        for route in self.routes:
            pair = (route.source, route.target)
            crossing[pair] = crossing.get(pair, 0) + route.numel * itemsize
        return crossing

    def digest(self) -> str:
        """A hash over both sides, the shape and every route: equal plans, equal digest, in any process. 64 hex digits."""
        return digest_inputs(
            (self.source.encode(), self.target.encode(), repr(self.shape), *(_encode_route(route) for route in self.routes))
        )

    def _name(self) -> str:
        return f"the plan from {self.source.layout} to {self.target.layout} for shape {self.shape}"


def plan(source: Side, target: Side, shape: Sequence[int]) -> TensorPlan:
    """All routes that carry a tensor of ``shape`` from ``source`` to ``target``.

    Raises:
        LayoutError: a layout shards a dimension that the tensor does not have.
    """
    wanted = tuple(shape)
    # Past the cache: a whole plan would push out the few routes that this process's own agents need.
    into = (_routes_into(source, target, wanted, index) for index in range(target.layout.ranks))
    return TensorPlan(source, target, wanted, tuple(itertools.chain.from_iterable(into)))


def digest_inputs(parts: Iterable[bytes | str]) -> str:
    """A hash over ``parts`` in their order, 64 hex digits. How the parts are cut counts: ("ab", "c") is not ("a", "bc")."""
    found = hashlib.sha256(_FORMAT.encode())
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        found.update(b"%s%d:" % (b"s" if isinstance(part, str) else b"b", len(data)))
        found.update(data)
    return found.hexdigest()


def inputs_digest(source: Side, target: Side, tensors: Iterable[tuple[Sequence[int], str]]) -> str:
    """A hash over all that plans are made from: both sides and each tensor's global shape and dtype name, in order.

    Planning is a pure function of these, so sides that agree on this hash agree on every route.
    """
    described = (f"{dtype} {'x'.join(map(str, shape))}" for shape, dtype in tensors)
    return digest_inputs((source.encode(), target.encode(), *described))


def explain_plan(plan: TensorPlan, itemsize: int) -> str:
    """A short text about ``plan`` for a terminal: totals, then bytes by source (rows) and target (columns).

    The table is left out where a side has more than 16 ranks.
    """
    crossing = plan.bytes_between(itemsize)
    source, target = plan.source, plan.target
    between_hosts = sum(size for (giver, taker), size in crossing.items() if source.hosts[giver] != target.hosts[taker])
    egress = [0] * source.layout.ranks
    for (giver, _), size in crossing.items():
        egress[giver] += size
    total = sum(egress)
    lines = [
        f"{source.layout}  ->  {target.layout}   shape {plan.shape}, {itemsize} bytes an element",
        f"{_bytes(total)} in {len(plan.routes)} routes, {sum(len(route.boxes) for route in plan.routes)} boxes; "
        f"{_bytes(between_hosts)} between hosts; most from one source {_bytes(max(egress))}, mean {_bytes(total / len(egress))}",
    ]
    if max(len(egress), target.layout.ranks) <= _TABLE_LIMIT:
        rows = [["source", *(f"-> {taker}" for taker in range(target.layout.ranks))]]
        for giver in range(len(egress)):
            sizes = (crossing.get((giver, taker), 0) for taker in range(target.layout.ranks))
            rows.append([str(giver), *(_bytes(size) if size else "." for size in sizes)])
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines += ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    return "\n".join(lines)


def _bytes(size: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.4g} {unit}"
        size /= 1024
    return f"{size:.4g} TiB"


def _encode_route(route: Route) -> str:
    boxes = ";".join(f"{box.source_start}{box.target_start}{box.size}" for box in route.boxes)
    return f"{route.source}>{route.target} {route.numel} {boxes}"


def _verify_route(plan: TensorPlan, route: Route) -> None:
    name = f"{plan._name()}: route {route.source} -> {route.target}"
    if not (0 <= route.source < plan.source.layout.ranks and 0 <= route.target < plan.target.layout.ranks):
        raise LayoutError(f"{name} names a position that is not in the mesh")
    giving = plan.source.layout.region(route.source, plan.shape)
    taking = plan.target.layout.region(route.target, plan.shape)
    if route.numel != sum(box.numel for box in route.boxes):
        raise LayoutError(f"{name} says {route.numel} elements, but its boxes have {sum(box.numel for box in route.boxes)}")
    for box in route.boxes:
        if not len(box.source_start) == len(box.target_start) == len(box.size) == len(plan.shape):
            raise LayoutError(f"{name}: {box} has another number of dimensions than the tensor")
        if any(size < 1 for size in box.size):
            raise LayoutError(f"{name}: {box} is empty")
        for dim, size in enumerate(box.size):
            given, taken = giving.span(dim, box.source_start[dim], size), taking.span(dim, box.target_start[dim], size)
            if given != taken or sum(stop - start for start, stop in given) != size:
                raise LayoutError(f"{name}: {box} reads {given} and writes {taken} of the tensor's dimension {dim}")


def _overlap(boxes: Sequence[Box]) -> tuple[Box, Box] | None:
    """Two boxes that share a target element, if there are any: a sweep along the dimension that separates most of them."""
    if len(boxes) < 2:
        return None
    if not boxes[0].size:
        return boxes[0], boxes[1]
    sweep = max(range(len(boxes[0].size)), key=lambda dim: len({box.target_start[dim] for box in boxes}))
    open_boxes: list[Box] = []
    for box in sorted(boxes, key=lambda box: box.target_start[sweep]):
        open_boxes = [other for other in open_boxes if other.target_start[sweep] + other.size[sweep] > box.target_start[sweep]]
        for other in open_boxes:
            if all(_meet(box, other, dim) for dim in range(len(box.size))):
                return other, box
        open_boxes.append(box)
    return None


def _meet(one: Box, other: Box, dim: int) -> bool:
    return (
        one.target_start[dim] < other.target_start[dim] + other.size[dim]
        and other.target_start[dim] < one.target_start[dim] + one.size[dim]
    )
