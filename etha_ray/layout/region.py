"""Intervals: how one tensor dimension is cut, and what one rank holds of a tensor.

An `Axis` answers two questions by arithmetic alone, without a table of all its pieces: which indices a piece holds, and in
which pieces given indices lie. So a rank pays for what it holds and exchanges, however many ranks there are.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache

Intervals = tuple[tuple[int, int], ...]
"""Half-open ``(start, stop)`` pairs, sorted, disjoint and none of them empty."""


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
        return tuple(_pick(self.intervals[dim], [(start, start + size)]))


@dataclass(frozen=True)
class Axis:
    """How one tensor dimension of ``size`` is cut.

    Attributes:
        cuts: ``(count, split_factor)`` of each mesh dimension that shards it, outermost first. One cut works on what the
            cuts before it left, taken as one row of indices: into ``split_factor`` chunks, each of these into ``count``
            chunks, and piece ``i`` is the ``i``-th chunk of all of them. Chunks are those of `torch.chunk`.
    """

    size: int
    cuts: tuple[tuple[int, int], ...] = ()

    @property
    def count(self) -> int:
        """How many pieces there are, empty ones included. They are numbered row-major among the cuts' counts."""
        return math.prod(count for count, _ in self.cuts)

    def held(self, piece: int) -> Intervals:
        """The indices that ``piece`` holds."""
        return _held(self, piece)

    def find(self, intervals: Iterable[tuple[int, int]]) -> Iterator[tuple[int, int, int, int]]:
        """Where the indices of ``intervals`` lie: ``(piece, at, start, stop)`` says that the indices from ``start`` to
        ``stop`` lie in ``piece``, from its local index ``at`` on. Ascending by ``start``.
        """
        for start, stop in intervals:
            low, high = max(start, 0), min(stop, self.size)
            if low < high:
                yield from _find(self.cuts, self.size, 0, low, high, low)


def _pick(held: Iterable[tuple[int, int]], spans: Iterable[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """The global indices behind the local ones of ``spans``, both ascending, in one pass."""
    wanted = iter(spans)
    span = next(wanted, None)
    at = 0
    for first, last in held:
        stop = at + last - first
        while span is not None and span[0] < stop:
            low, high = max(span[0], at), min(span[1], stop)
            if low < high:
                yield first + low - at, first + high - at
            if span[1] > stop:
                break
            span = next(wanted, None)
        at = stop


@lru_cache(maxsize=4096)
def _held(axis: Axis, piece: int) -> Intervals:
    held: list[tuple[int, int]] = [(0, axis.size)] if axis.size else []
    size, below = axis.size, axis.count
    for count, split_factor in axis.cuts:
        below //= count
        number = piece // below % count
        chunk = _ceil(size, split_factor)
        spans: list[tuple[int, int]] = []
        for start in range(0, size, max(chunk, 1)):
            stop = min(start + chunk, size)
            step = _ceil(stop - start, count)
            low, high = min(start + number * step, stop), min(start + (number + 1) * step, stop)
            if low < high:
                spans += [(low, high)]
        held = _joined(_pick(held, spans))
        size = sum(stop - start for start, stop in held)
    return tuple(held)


def _joined(spans: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    joined: list[tuple[int, int]] = []
    for start, stop in spans:
        if joined and joined[-1][1] == start:
            start = joined.pop()[0]
        joined.append((start, stop))
    return joined


def _find(
    cuts: tuple[tuple[int, int], ...], size: int, piece: int, start: int, stop: int, index: int
) -> Iterator[tuple[int, int, int, int]]:
    """`Axis.find` within one piece of ``size`` that ``cuts`` cut on: for its local indices ``[start, stop)``, the first of
    which is the global ``index``; they are neighbours in the whole, too."""
    if not cuts:
        yield piece, start, index, index + stop - start
        return
    (count, split_factor), rest = cuts[0], cuts[1:]
    chunk = _ceil(size, split_factor)
    whole, left = divmod(size, chunk)
    step, left_step = _ceil(chunk, count), _ceil(left, count)
    for number in range(start // chunk, (stop - 1) // chunk + 1):
        first = number * chunk
        here = step if number < whole else left_step
        low, high = max(start - first, 0), min(stop - first, chunk)
        for child in range(low // here, (high - 1) // here + 1):
            one, other = max(low, child * here), min(high, (child + 1) * here)
            each, last = _clip(chunk - child * step, step), _clip(left - child * left_step, left_step)
            # Chunks are whole up to the last one, so what this piece holds of the chunks before has a known size.
            at = number * each + one - child * here
            yield from _find(rest, whole * each + last, piece * count + child, at, at + other - one, index + first + one - start)


def _clip(value: int, high: int) -> int:
    return max(0, min(value, high))


def _ceil(size: int, parts: int) -> int:
    return -(-size // parts)
