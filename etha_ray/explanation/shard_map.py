"""The shard picture: the tensor as a rectangle, and which rank of one side holds which part of it.

Ranks that hold the same part share a cell. A tensor of more than two dimensions is seen along the two that are cut most.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass

from etha_ray.explanation.groups import Groups, grouped, ranges
from etha_ray.explanation.numbers import PlanNumbers
from etha_ray.explanation.picture import HUES, Label, Mark, Picture, Rectangle, fitting, text_width, wrapped
from etha_ray.layout import Intervals
from etha_ray.plan import Side

WIDTH = 400.0
_TOP = 46.0
_PARTS = 64
"""Different parts up to which they are drawn rank by rank; where there are more, host by host."""
_LIMIT = 1024
"""Rectangles drawn at most."""
_RUNS = 64
"""Runs along a dimension up to which one rank's are drawn apart: more of them are finer than the picture."""

Span = tuple[int, int, int, int]
"""Rows from and to, columns from and to, in tensor indices."""


@dataclass(frozen=True)
class _Cell:
    """A part of the tensor, and the groups of ranks that hold just that."""

    spans: tuple[Span, ...]
    members: tuple[int, ...]

    @property
    def size(self) -> int:
        """How much of the picture it covers."""
        return sum((below - above) * (right - left) for above, below, left, right in self.spans)


@dataclass(frozen=True)
class _Seen:
    """One side of a tensor, seen along ``dims``: what `_drawing` draws, and what it says about it.

    Attributes:
        held: what each position holds, per dimension of the tensor.
        cells: large ones first, so that they do not hide what lies in them.
    """

    side: Side
    shape: tuple[int, ...]
    dims: tuple[int, ...]
    groups: Groups
    held: tuple[tuple[Intervals, ...], ...]
    cells: tuple[_Cell, ...]

    @property
    def extent(self) -> tuple[int, int]:
        """Rows and columns of the rectangle that stands for the tensor; one dimension lies across."""
        rows, columns = (1, 1, *(self.shape[dim] for dim in self.dims))[-2:]
        return max(rows, 1), max(columns, 1)


def shard_maps(numbers: PlanNumbers) -> tuple[Picture, Picture]:
    """Who holds which part of the tensor, on the source's and on the target's side, seen along the same dimensions."""
    sides = numbers.source, numbers.target
    held = [tuple(side.layout.region(position, numbers.shape).intervals for position in range(side.layout.ranks)) for side in sides]
    cuts = [len({region[dim] for regions in held for region in regions}) for dim in range(len(numbers.shape))]
    dims = tuple(sorted(sorted(range(len(cuts)), key=lambda dim: -cuts[dim])[:2]))
    source, target = (_seen(side, numbers.shape, dims, regions) for side, regions in zip(sides, held, strict=True))
    return _drawing("Source", source), _drawing("Target", target)


def _seen(side: Side, shape: tuple[int, ...], dims: tuple[int, ...], held: tuple[tuple[Intervals, ...], ...]) -> _Seen:
    everyone = grouped(side, side.layout.ranks)
    cells = _cells(held, dims, everyone)
    if len(cells) <= _PARTS:
        return _Seen(side, shape, dims, everyone, held, cells)
    groups = grouped(side, _PARTS)
    return _Seen(side, shape, dims, groups, held, _cells(held, dims, groups))


def _cells(held: tuple[tuple[Intervals, ...], ...], dims: tuple[int, ...], groups: Groups) -> tuple[_Cell, ...]:
    spans: dict[int, set[Span]] = {}
    for position, region in enumerate(held):
        if all(region):
            rows, columns = (((0, 1),), ((0, 1),), *(_coarse(region[dim]) for dim in dims))[-2:]
            spans.setdefault(groups.of[position], set()).update((*row, *column) for row, column in itertools.product(rows, columns))
    members: dict[tuple[Span, ...], list[int]] = {}
    for number, parts in spans.items():
        members.setdefault(_joined(parts), []).append(number)
    cells = (_Cell(parts, tuple(numbers)) for parts, numbers in members.items())
    return tuple(sorted(cells, key=lambda cell: (-cell.size, cell.spans)))


def _coarse(held: Intervals) -> Intervals:
    return held if len(held) <= _RUNS else ((held[0][0], held[-1][1]),)


def _joined(parts: Iterable[Span]) -> tuple[Span, ...]:
    """``parts`` with those that touch along a whole side as one."""
    upright: list[Span] = []
    for above, below, left, right in sorted(parts, key=lambda span: (span[2:], span[:2])):
        if upright and upright[-1][1:] == (above, left, right):
            above = upright.pop()[0]
        upright.append((above, below, left, right))
    joined: list[Span] = []
    for above, below, left, right in sorted(upright):
        if joined and (*joined[-1][:2], joined[-1][3]) == (above, below, left):
            left = joined.pop()[2]
        joined.append((above, below, left, right))
    return tuple(joined)


def _drawing(name: str, seen: _Seen) -> Picture:
    rows, columns = seen.extent
    height = 72.0 if len(seen.dims) < 2 else max(130.0, min(WIDTH * rows / columns, 330.0))
    parts: list[Mark] = []
    hues = _hues(seen.cells)
    room = _LIMIT
    for cell in seen.cells:
        for above, below, left, right in cell.spans[:room]:
            x, y = left * WIDTH / columns, _TOP + above * height / rows
            parts += _part(cell, seen.groups, hues[cell], x, y, (right - left) * WIDTH / columns, (below - above) * height / rows)
        room -= min(room, len(cell.spans))
    named = any(isinstance(mark, Label) for mark in parts)
    notes = [*([_caption(seen.groups, named)] if seen.cells else []), *_notes(seen)]
    lines = [line for note in notes for line in wrapped(fitting(note, 2 * WIDTH, 12), WIDTH, 12)]
    marks = [
        Label(0, 14, fitting(f"{name}: {seen.side.layout}", WIDTH, 14), 14, bold=True),
        Label(0, 34, fitting(_dimensions(seen), WIDTH, 12), fill="faint"),
        Rectangle(0, _TOP, WIDTH, height, "empty"),
        *parts,
        *(Label(0, _TOP + height + 18 + 16 * number, line, fill="faint") for number, line in enumerate(lines)),
    ]
    return Picture(f"{name}: who holds which part", WIDTH, _TOP + height + 16 * len(lines) + 6, tuple(marks))


def _hues(cells: tuple[_Cell, ...]) -> dict[_Cell, str]:
    """A colour for each cell; where there are too many cells for that, another one than its neighbours have."""
    if len(cells) <= HUES:
        return {cell: f"hue{number * 5 % HUES}" for number, cell in enumerate(cells)}
    tops = {top: number for number, top in enumerate(sorted({cell.spans[0][0] for cell in cells}))}
    lefts = {left: number for number, left in enumerate(sorted({cell.spans[0][2] for cell in cells}))}
    return {cell: f"hue{(tops[cell.spans[0][0]] * 5 + lefts[cell.spans[0][2]] * 7) % HUES}" for cell in cells}


def _part(cell: _Cell, groups: Groups, hue: str, x: float, y: float, width: float, height: float) -> list[Mark]:
    """One rectangle of a cell, with as full a name as fits."""
    gap_x, gap_y = (1.0 if side > 4 else 0.0 for side in (width, height))
    names = _names(cell, groups)
    marks: list[Mark] = [
        Rectangle(x, y, width, height, "ground"),
        Rectangle(x + gap_x / 2, y + gap_y / 2, width - gap_x, height - gap_y, hue, f"{groups.unit} {names[0]}"),
    ]
    copies = len(cell.members)
    for lines in ([names[0], f"×{copies}"] if copies > 1 else [names[0]], *([name] for name in names)):
        size = next((size for size in (13.0, 11.0, 9.0) if _fits(lines, size, width, height)), None)
        if size:
            first = y + height / 2 + size * 0.35 - (len(lines) - 1) * size * 0.62
            return marks + [Label(x + width / 2, first + number * size * 1.25, line, size, "middle") for number, line in enumerate(lines)]
    return marks


def _names(cell: _Cell, groups: Groups) -> list[str]:
    """What a cell may be called, the fullest name first."""
    labels = [groups.labels[number] for number in cell.members]
    full = ranges(list(cell.members)) if groups.by_rank else ", ".join(labels)
    return [full] if len(labels) == 1 else [full, f"{labels[0]}… ×{len(labels)}", f"×{len(labels)}"]


def _fits(lines: list[str], size: float, width: float, height: float) -> bool:
    return max(text_width(line, size) for line in lines) <= width - 1.5 and len(lines) * size * 1.25 <= height - 2


def _dimensions(seen: _Seen) -> str:
    if not seen.dims:
        return "a tensor without dimensions"
    *down, across = (f"dimension {dim} ({seen.shape[dim]})" for dim in seen.dims)
    return ", ".join([*(f"{dim} down" for dim in down), f"{across} across"])


def _caption(groups: Groups, named: bool) -> str:
    if groups.by_rank:
        return "each part: the ranks that hold it" if named else "a colour per part; too narrow to name the ranks"
    return f"{'each part: who holds it' if named else 'a colour per part'}; {len(groups.of):,} ranks, shown by {groups.unit}"


def _notes(seen: _Seen) -> list[str]:
    """What the picture does not show."""
    notes = []
    hidden = [dim for dim in range(len(seen.shape)) if dim not in seen.dims]
    cut = [dim for dim in hidden if len({region[dim] for region in seen.held}) > 1]
    if cut:
        notes.append(f"also cut along {_list(cut)}, which is not drawn: names share parts")
    elif hidden:
        notes.append(f"not cut along {_list(hidden)}, which is not drawn")
    if idle := [position for position, region in enumerate(seen.held) if not all(region)]:
        notes.append(f"{'rank' if len(idle) == 1 else f'{len(idle)} ranks'} without a part: {ranges(idle)}")
    if (reduction := seen.side.layout.partial) is not None:
        notes.append(f"each value is the {reduction.op} of {reduction.count} contributions")
    if any(len(region[dim]) > _RUNS for region in seen.held for dim in seen.dims):
        notes.append("interleaved too finely to draw: each rank from its first to its last index")
    if (left_out := sum(len(cell.spans) for cell in seen.cells) - _LIMIT) > 0:
        notes.append(f"the {left_out:,} smallest parts are left out")
    return notes


def _list(dims: list[int]) -> str:
    return f"dimension{'s' if len(dims) > 1 else ''} {', '.join(map(str, dims))}"
