"""Which of several replicas serves which target, and with how much of what it wants.

The targets of one piece of the source are served from the same agent, else from the same host, else by whoever has given
least so far; of several that want the same from afar one reads it, for all of them (`relays`). Within each of these groups the
demands are laid end to end on a line, and the line is cut into a stretch per holder: equal stretches, or, for the last group,
stretches that level what the holders give in all (McNaughton's wrap-around rule). A demand that lies across a cut is served by
several holders, so that the shares come out even whatever the numbers of holders and targets. Cuts fall between rows of a
demand and leave parts of at least `LEAST_SHARE` elements: many small copies cost more than an uneven share of a small tensor.

What is guaranteed: where no replica is near a target, each gives less than one part (`Rows.units`) more than if all replicas
of its piece gave the same. As every position holds one piece only, no choice of replicas could make the largest of these even
shares smaller. Tensors too small to be divided even out over one another: ``turn`` says which holder the line begins with.

Every member of a group finds the same cuts alone, in time that grows with the holders of the piece, the pieces and the near
targets that it meets, but not with the number of targets.
"""

from __future__ import annotations

import itertools
import math
import zlib
from bisect import bisect_right
from collections import Counter
from collections.abc import Hashable, Iterable, Iterator, Sequence
from copy import copy
from dataclasses import dataclass
from functools import lru_cache

from etha_ray.layout import Layout, Pieces
from etha_ray.plan.overlap import Key, view
from etha_ray.plan.relays import relays
from etha_ray.plan.side import Side

LEAST_SHARE = 1 << 17
"""Elements below which no part of a demand is asked of another holder: 256 KiB of a 16-bit float, some 20 us of copying."""

_FINE = 16
"""How many of the parts that are not divided make a share that is even enough, whoever gets one of them more."""

Share = tuple[int, int, int]
"""``(holder, start, stop)``: who gives these rows of a demand."""


@dataclass(frozen=True)
class Rows:
    """How a demand may be divided: into ranges of its rows along ``dim``, at the borders of ``units`` equal parts.

    Attributes:
        dim: the outermost dimension whose rows are not larger than a least share; where there is none, the longest.
        count: how many rows there are; 1 for a tensor without dimensions.
        units: how many parts of at least `LEAST_SHARE` elements there are; 1 where the demand is not divided.
        numel: elements of the whole demand.
    """

    dim: int
    count: int
    units: int
    numel: int

    @classmethod
    def of(cls, shape: tuple[int, ...]) -> Rows:
        """The rows of a demand of ``shape``, which is not empty."""
        numel = math.prod(shape)
        if not shape:
            return cls(0, 1, 1, numel)
        fine = (dim for dim, size in enumerate(shape) if numel <= size * LEAST_SHARE)
        dim = next(fine, max(range(len(shape)), key=lambda dim: shape[dim]))
        count = shape[dim]
        return cls(dim, count, max(1, min(count, numel // LEAST_SHARE)), numel)

    def at(self, elements: int) -> int:
        """The row at which a cut after so many elements falls: the border at or before it."""
        return max(0, min(elements * self.units // self.numel, self.units)) * self.count // self.units


@dataclass(frozen=True)
class _Line:
    """Demands end to end, and who serves which stretch: ``holders[i]`` from ``cuts[i]`` to ``cuts[i + 1]``."""

    holders: tuple[int, ...]
    cuts: tuple[int, ...]

    @classmethod
    def of(cls, holders: Sequence[int], total: int, given: Sequence[int]) -> _Line:
        """A line of ``total`` elements, cut so that what the holders give, with what is ``given`` already, comes out even."""
        # Whoever has given most already may be over the level and get nothing: leave those out until the rest is below it.
        order = sorted(range(len(holders)), key=lambda number: given[number])
        below, spent = len(order), sum(given)
        while below > 1 and given[order[below - 1]] * below >= total + spent:
            below -= 1
            spent -= given[order[below]]
        level, at, cuts = total + spent, 0, [0]
        for amount in given:
            at += max(0, level - amount * below)
            cuts.append(at // below)
        cuts[-1] = total
        return cls(tuple(holders), tuple(cuts))

    def shares(self, start: int, rows: Rows) -> Iterator[Share]:
        """Who gives what of a demand that begins at ``start``."""
        number, row = bisect_right(self.cuts, start) - 1, 0
        while row < rows.count:
            stop = rows.at(self.cuts[number + 1] - start) if number + 1 < len(self.holders) else rows.count
            if stop > row:
                yield self.holders[number], row, stop
                row = stop
            number += 1

    def stretch(self, holder: int) -> tuple[int, int]:
        """From where to where ``holder`` serves."""
        number = self.holders.index(holder)
        return self.cuts[number], self.cuts[number + 1]


class Sharing:
    """How the replicas of one piece, for one contribution, share the targets that read some of it; see `relays` for the others."""

    def __init__(self, source: Side, target: Side, shape: tuple[int, ...], key: Key, slot: int, turn: int) -> None:
        holders = view(source.layout, shape).slots(key)[slot]
        holders = holders[turn % len(holders) :] + holders[: turn % len(holders)]
        self._view = view(target.layout, shape)
        self._relays = relays(source, target, shape, key)
        meetings = self._view.meeting(view(source.layout, shape).region(key))
        self._wanted = {meeting.key: Rows.of(meeting.shape) for meeting in meetings}
        self._near: dict[int, tuple[Share, ...]] = {}
        given = self._serve_near(source, target, holders) if _neighbours(source, target) else {}
        # What targets far from all holders want is laid end to end, each piece once: one of its copies reads it, for all of them.
        self._starts: dict[Key, int] = {}
        at = 0
        for piece, rows in self._wanted.items():
            first = self._relays.chain(piece).first
            if first is not None and first not in self._near:
                self._starts[piece] = at
                at += rows.numel
        self._far = _Line.of(holders, at, [given.get(holder, 0) for holder in holders])

    def turned(self, turn: int) -> Sharing:
        """The same with another holder at the line's beginning; where no target is near a holder."""
        far, number = self._far, turn % len(self._far.holders)
        turned = copy(self)
        turned._far = _Line(far.holders[number:] + far.holders[:number], far.cuts)
        return turned

    def shares(self, index: int) -> tuple[Share, ...]:
        """Who gives which rows of what the target position ``index``, which wants some of the piece, gets; ascending by row."""
        piece = self._piece(index)
        chain = self._relays.chain(piece)
        head = index if chain.relays.get(index) is None else chain.first
        if head in self._near:
            return self._near[head]
        return tuple(self._far.shares(self._starts[piece], self._wanted[piece]))

    def takers(self, holder: int) -> dict[Key, list[int]]:
        """The target positions that read something from ``holder``, by the piece they hold; ascending."""
        found: dict[Key, set[int]] = {}
        for index, shares in self._near.items():
            if any(giver == holder for giver, _, _ in shares):
                found.setdefault(self._piece(index), set()).add(index)
        low, high = self._far.stretch(holder)
        for piece, start in self._starts.items():
            first = self._relays.chain(piece).first
            if start < high and low < start + self._wanted[piece].numel and first is not None:
                found.setdefault(piece, set()).add(first)
        return {piece: sorted(positions) for piece, positions in found.items()}

    def _serve_near(self, source: Side, target: Side, holders: Sequence[int]) -> dict[int, int]:
        """Serve the targets that share an agent or a host with a holder. Elements that each holder gives to other agents."""
        for agent, givers in _grouped(source.agents, holders):
            takers = [index for index in target.at_agent.get(agent, ()) if self._reads(index)]
            for number, index in enumerate(takers):
                self._near[index] = ((givers[number * len(givers) // len(takers)], 0, self._demand(index).count),)
        given: dict[int, int] = {}
        for host, givers in _grouped(source.hosts, holders):
            takers = [index for index in target.at_host.get(host, ()) if index not in self._near and self._reads(index)]
            demands = [self._demand(index) for index in takers]
            starts = list(itertools.accumulate((rows.numel for rows in demands), initial=0))
            line = _Line.of(givers, starts[-1], [0] * len(givers))
            for index, start, rows in zip(takers, starts, demands, strict=False):
                self._near[index] = tuple(line.shares(start, rows))
                for holder, first, last in self._near[index]:
                    given[holder] = given.get(holder, 0) + (last - first) * rows.numel // rows.count
        return given

    def _reads(self, index: int) -> bool:
        """Whether the target position wants some of the piece, and reads it itself."""
        seat = self._view.seat(index)
        return seat is not None and seat[0] in self._wanted and self._relays.relay(index, seat[0]) is None

    def _demand(self, index: int) -> Rows:
        return self._wanted[self._piece(index)]

    def _piece(self, index: int) -> Key:
        """The piece of a target position that wants some."""
        seat = self._view.seat(index)
        assert seat is not None
        return seat[0]


def sharing(source: Side, target: Side, shape: tuple[int, ...], key: Key, slot: int, turn: int) -> Sharing:
    """How the holders of ``key`` share their targets; see `Sharing`."""
    if _neighbours(source, target):
        return _sharing(source, target, shape, key, slot, turn)
    return _sharing(source, target, shape, key, slot, 0).turned(turn)


@lru_cache(maxsize=4096)
def _sharing(source: Side, target: Side, shape: tuple[int, ...], key: Key, slot: int, turn: int) -> Sharing:
    return Sharing(source, target, shape, key, slot, turn)


@lru_cache(maxsize=256)
def _neighbours(source: Side, target: Side) -> bool:
    """Whether an agent or a host has members of both sides."""
    return not (source.at_agent.keys().isdisjoint(target.at_agent) and source.at_host.keys().isdisjoint(target.at_host))


def turn_of(source: Side, target: Side, shape: tuple[int, ...], turn: int) -> int:
    """The turn that counts: with which of the holders of its pieces the line of a tensor begins.

    It is another one for each of several equal tensors, so that small ones, whose demands are not divided, come from all
    holders in turn; and another one for other shapes. It is 0 where the shares come out even without, by the size of the
    tensor: equal tensors then have one plan.
    """
    if isinstance(source.layout, Pieces):
        copies = max(map(len, source.layout.holders().values()), default=1)
    else:
        copies = _copies(source.layout)
        slots = 1 if source.layout.partial is None else source.layout.partial.count
        piece = math.prod(shape) * slots * copies // source.layout.ranks
        if copies == 1 or piece >= _FINE * copies * min(piece, 2 * LEAST_SHARE):
            return 0
    return (zlib.crc32(repr(tuple(shape)).encode()) + turn) % copies


def _copies(layout: Layout) -> int:
    return math.prod(size for size, token in zip(layout.mesh_shape, layout.placements, strict=True) if token == "R")


def turns(shapes: Iterable[tuple[int, ...]]) -> list[int]:
    """The turn of each tensor of a batch, by its global shape: how many equal ones came before it."""
    seen: Counter[tuple[int, ...]] = Counter()
    found: list[int] = []
    for shape in shapes:
        found.append(seen[shape])
        seen[shape] += 1
    return found


def _grouped(places: Sequence[Hashable], holders: Sequence[int]) -> Iterable[tuple[Hashable, list[int]]]:
    groups: dict[Hashable, list[int]] = {}
    for holder in holders:
        groups.setdefault(places[holder], []).append(holder)
    return groups.items()
