"""The routes of one rank, into it or out of it.

Both directions ask the same two questions, which pieces overlap (`overlap`) and which replica serves whom (`sharing`), so
they agree with one another; and a rank asks only about pieces that meet its own.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache

from etha_ray.errors import LayoutError
from etha_ray.layout import Layout, Pieces, Region
from etha_ray.plan.overlap import Key, Meeting, view
from etha_ray.plan.relays import relays
from etha_ray.plan.route import Box, Route, Segment
from etha_ray.plan.sharing import Rows, sharing, turn_of
from etha_ray.plan.side import Side


def routes_into(source: Side, target: Side, shape: tuple[int, ...], target_index: int, turn: int = 0) -> tuple[Route, ...]:
    """What mesh position ``target_index`` of ``target`` receives, by ascending source.

    Each element it holds is in exactly one box. Of several sources that hold the same region, those on the same agent are
    asked, else those on the same host, else those that have given least so far; see `sharing`. What another target passes on, as
    `Route.relay` says, is listed by the sources it comes from all the same. ``turn`` is this tensor's
    number among equal ones of a batch (see `turns`): all members must give the same.

    Raises:
        LayoutError: a layout does not fit ``shape``, there is no such position, the target's layout has a Partial, or no
            source holds some element.
    """
    return _routes_into(source, target, shape, target_index, turn_of(source, target, shape, turn))


def routes_out_of(source: Side, target: Side, shape: tuple[int, ...], source_index: int, turn: int = 0) -> tuple[Route, ...]:
    """What mesh position ``source_index`` of ``source`` gives, by ascending target: its share of all `routes_into`.

    From a Partial source the routes are those to which it is one of the contributors.

    Raises:
        LayoutError: a layout does not fit ``shape``, there is no such position, or the target's layout has a Partial.
    """
    return _routes_out_of(source, target, shape, source_index, turn_of(source, target, shape, turn))


def check_sides(source: Layout | Pieces, target: Layout | Pieces) -> None:
    """Raise `LayoutError` for what no shape could make right: a Partial target, source pieces that overlap."""
    check_target(target)
    if isinstance(source, Pieces):
        source.check_source()


def check_target(layout: Layout | Pieces) -> None:
    """Raise `LayoutError` if ``layout`` cannot be received into, because it has a Partial."""
    if layout.partial is not None:
        raise LayoutError(
            f"target layout {layout} has a Partial on mesh dimension {layout.partial.dims[0]}: a received tensor holds values, not "
            "contributions to them. Use Replicate() or Shard(dim) on the target; Partial is for sources"
        )


@lru_cache(maxsize=1024)
def _routes_into(source: Side, target: Side, shape: tuple[int, ...], index: int, turn: int) -> tuple[Route, ...]:
    return tuple(routes_of_target(source, target, shape, index, turn))


def routes_of_target(source: Side, target: Side, shape: tuple[int, ...], index: int, turn: int) -> list[Route]:
    """`routes_into` past its cache, for a ``turn`` that `turn_of` made."""
    check_sides(source.layout, target.layout)
    givers = view(source.layout, shape)
    takers, region = view(target.layout, shape), target.layout.region(index, shape)
    seat = takers.seat(index)
    shared = seat[0] if seat is not None and takers.copies(seat[0]) > 1 else None
    routes: list[Route] = []
    held = 0
    for meeting in givers.meeting(region):
        held += meeting.numel
        relay = None if shared is None else relays(source, target, shape, meeting.key).relay(index, shared)
        routes += _routes(source, target, shape, meeting.key, index, meeting, turn, relay=relay)
    if held != region.numel:
        raise LayoutError(_missing(source, shape, index, region))
    return sorted(routes)


@lru_cache(maxsize=1024)
def _routes_out_of(source: Side, target: Side, shape: tuple[int, ...], index: int, turn: int) -> tuple[Route, ...]:
    check_sides(source.layout, target.layout)
    givers, takers = view(source.layout, shape), view(target.layout, shape)
    region, seat = source.layout.region(index, shape), givers.seat(index)
    if seat is None:
        return ()
    slots = givers.slots(seat[0])
    own = next(slot for slot, holders in enumerate(slots) if index in holders)
    alone = all(len(holders) == 1 for holders in slots)
    wanting = None if alone else sharing(source, target, shape, seat[0], own, turn).takers(index)
    routes: list[Route] = []
    for meeting in takers.meeting(region):
        swapped = tuple(tuple((there, at, size) for at, there, size in parts) for parts in meeting.segments)
        seen = Meeting(seat[0], swapped, meeting.shape)
        chain = relays(source, target, shape, seat[0]).chain(meeting.key) if takers.copies(meeting.key) > 1 else None
        for taker in takers.slots(meeting.key)[0] if wanting is None else wanting.get(meeting.key, ()):
            if chain is not None and chain.relays.get(taker) is not None:
                continue
            given = list(_routes(source, target, shape, seat[0], taker, seen, turn, giver=index))
            routes += given
            if chain is not None and taker == chain.first:  # the same boxes for all whom it passes them on to
                for other, relay in chain.relays.items():
                    if relay is not None:
                        routes += [Route(each.source, other, each.boxes, each.numel, each.others, relay) for each in given]
    return tuple(sorted(routes, key=lambda route: (route.target, route)))


def _routes(
    source: Side,
    target: Side,
    shape: tuple[int, ...],
    key: Key,
    index: int,
    meeting: Meeting,
    turn: int,
    *,
    giver: int | None = None,
    relay: int | None = None,
) -> Iterator[Route]:
    """The routes by which the target position ``index`` gets what it has in common with the source's piece ``key``: all of
    them, or those from the source position ``giver``; passed on by ``relay``."""
    slots = view(source.layout, shape).slots(key)
    if all(len(holders) == 1 for holders in slots):
        yield _route(tuple(holders[0] for holders in slots), index, meeting.segments, relay)
        return
    rows = Rows.of(meeting.shape)
    each = [sharing(source, target, shape, key, slot, turn).shares(index) for slot in range(len(slots))]
    stops = sorted({stop for shares in each for _, _, stop in shares})
    for start, stop in zip([0, *stops], stops, strict=False):
        sources = tuple(next(holder for holder, _, last in shares if last >= stop) for shares in each)
        if giver is None or giver in sources:
            yield _route(sources, index, _rows(meeting.segments, rows, start, stop), relay)


def _route(sources: tuple[int, ...], target: int, segments: Iterable[Sequence[Segment]], relay: int | None) -> Route:
    boxes = tuple(
        Box(tuple(p[0] for p in parts), tuple(p[1] for p in parts), tuple(p[2] for p in parts)) for parts in itertools.product(*segments)
    )
    return Route(sources[0], target, boxes, sum(box.numel for box in boxes), sources[1:], relay)


def _rows(segments: Sequence[Sequence[Segment]], rows: Rows, start: int, stop: int) -> Iterable[Sequence[Segment]]:
    """``segments`` without the rows that lie outside of ``[start, stop)``."""
    if start == 0 and stop == rows.count:
        return segments
    kept: list[Segment] = []
    at = 0
    for giver, taker, size in segments[rows.dim]:
        low, high = max(start, at), min(stop, at + size)
        if low < high:
            kept.append((giver + low - at, taker + low - at, high - low))
        at += size
    return [*segments[: rows.dim], kept, *segments[rows.dim + 1 :]]


def _missing(source: Side, shape: tuple[int, ...], index: int, region: Region) -> str:
    """What is wrong when explicit pieces of the source do not cover the region of target ``index``."""
    assert isinstance(source.layout, Pieces)
    left = [tuple(zip(start, size, strict=True)) for start, _, size in region.boxes()]
    for offsets, sizes in source.layout.holders():
        left = [part for box in left for part in _without(box, tuple(zip(offsets, sizes, strict=True)))]
    shown = ", ".join(f"{at}:{at + size}" for at, size in left[0])
    numel = sum(math.prod(size for _, size in box) for box in left)
    return (
        f"no source holds [{shown}] of the tensor of shape {shape}, which target {index} wants ({numel} elements of it are missing "
        "in all): every part that a target holds must be in the piece of some source; check their offsets and sizes"
    )


_Spans = tuple[tuple[int, int], ...]
"""``(start, size)`` of a box along each dimension."""


def _without(box: _Spans, other: _Spans) -> Iterator[_Spans]:
    """``box`` less ``other``, in boxes."""
    rest = list(box)
    for dim, ((at, size), (start, length)) in enumerate(zip(box, other, strict=True)):
        low, high = max(at, start), min(at + size, start + length)
        if low >= high:
            yield tuple(rest)
            return
        for first, last in ((at, low), (high, at + size)):
            if first < last:
                yield (*rest[:dim], (first, last - first), *rest[dim + 1 :])
        rest[dim] = (low, high - low)
