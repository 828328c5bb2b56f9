"""The report's charts: SVG as text, coloured by the classes of report.css.

A line or bar chart is drawn twice, for wide and for narrow screens, so that its text keeps its size on both; CSS shows
the one that fits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from typing import Literal

_WIDTHS = {"wide": 540, "narrow": 350}
_HEIGHT = 280
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 12, 30, 44
_FLOOR = _HEIGHT - _BOTTOM


@dataclass(frozen=True)
class Series:
    """One line of a line chart: (version, value) points, drawn in the style of its side."""

    side: Literal["train", "held"]
    label: str
    points: tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class Bar:
    """One bar: its height in the chart's unit, the short text above it and the long one that a pointer shows."""

    version: int
    value: float
    above: str
    detail: str


def line_chart(label: str, axis: str, series: Sequence[Series]) -> str:
    """Lines over versions. The vertical axis need not start at zero: a line tells by its course, not by its height.

    `label` is for readers who hear the chart, `axis` names the vertical axis with its unit. Some series has a point.
    """
    return _for_each_width(label, lambda width: _lines(axis, [line for line in series if line.points], width))


def bar_chart(label: str, axis: str, above: str, bars: Sequence[Bar]) -> str:
    """Bars over versions, from zero. `above` says what the texts above the bars are; both stand only where they fit."""
    return _for_each_width(label, lambda width: _bars(axis, above, bars, width))


def heat_map(label: str, rows: Sequence[str], columns: Sequence[str], cells: Sequence[Sequence[tuple[int, str]]]) -> str:
    """A grid of cells, each a count and its text; the larger the count, the fuller the colour."""
    left, top, cell_width, cell_height, gap = 90, 34, 104, 48, 3
    largest = max((count for row in cells for count, _ in row), default=0)
    width, height = left + len(columns) * cell_width, top + len(rows) * cell_height
    parts = [f'<svg class="map" width="{width}" height="{height}" role="img" aria-label="{escape(label)}">']
    for index, column in enumerate(columns):
        parts.append(_text("head", left + (index + 0.5) * cell_width - gap / 2, top - 12, column))
    for row_index, row in enumerate(rows):
        y = top + row_index * cell_height
        middle = y + (cell_height - gap) / 2 + 4.5
        parts.append(_text("head", left - 12, middle, row, "end"))
        for index, (count, text) in enumerate(cells[row_index]):
            x = left + index * cell_width
            share = count / largest if largest else 0.0
            detail = _title(f"{row} to {columns[index]}: {count:,} bytes")
            parts.append(
                f'<rect class="cell" x="{x}" y="{y}" width="{cell_width - gap}" height="{cell_height - gap}" rx="3"'
                f' fill-opacity="{0.05 + 0.95 * share:.3f}">{detail}</rect>'
            )
            # At this share black and white text are equally readable on the cell, in both colour schemes.
            parts.append(_text("count on" if share > 0.78 else "count", x + (cell_width - gap) / 2, middle, text))
    return "".join(parts) + "</svg>"


def _for_each_width(label: str, draw: Callable[[int], str]) -> str:
    about = f'role="img" aria-label="{escape(label)}"'
    return "".join(f'<svg class="{name}" viewBox="0 0 {width} {_HEIGHT}" {about}>{draw(width)}</svg>' for name, width in _WIDTHS.items())


def _lines(axis: str, series: Sequence[Series], width: int) -> str:
    values = [value for line in series for _, value in line.points]
    versions = sorted({version for line in series for version, _ in line.points})
    ticks = _ticks(min(values), max(values))

    def x_of(version: int) -> float:
        return _place(version, versions[0], versions[-1], _LEFT + 12, width - _RIGHT - 12)

    def y_of(value: float) -> float:
        return _place(value, ticks[0], ticks[-1], _FLOOR, _TOP)

    parts = [_axis(axis, ticks, y_of, width), _version_axis(versions, x_of, width)]
    for line in series:
        places = [(x_of(version), y_of(value)) for version, value in line.points]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        parts.append(f'<polyline class="line {line.side}" points="{path}"/>')
        for (x, y), (version, value) in zip(places, line.points, strict=True):
            parts.append(_marker(line.side, x, y, f"version {version}: {value:.3f}"))
    # Each line's name stands top right, in its colour: falling curves leave that corner free.
    for index, line in enumerate(series):
        y = _TOP + 16 + 20 * index
        parts.append(_marker(line.side, width - _RIGHT - 8, y - 4, line.label))
        parts.append(_text(f"name {line.side}", width - _RIGHT - 20, y, line.label, "end"))
    return "".join(parts)


def _marker(side: str, x: float, y: float, detail: str) -> str:
    """Round for one side, square for the other, so that colour is not all that tells them apart."""
    if side == "train":
        return f'<circle class="mark {side}" cx="{x:.1f}" cy="{y:.1f}" r="3.5">{_title(detail)}</circle>'
    corner = f'x="{x - 3.5:.1f}" y="{y - 3.5:.1f}"'
    return f'<rect class="mark {side}" {corner} width="7" height="7">{_title(detail)}</rect>'


def _bars(axis: str, above: str, bars: Sequence[Bar], width: int) -> str:
    ticks = _ticks(0.0, max(bar.value for bar in bars))
    step = (width - _LEFT - _RIGHT) / len(bars)
    thickness = min(48.0, step * 0.68)
    x_of = {bar.version: _LEFT + (index + 0.5) * step for index, bar in enumerate(bars)}

    def y_of(value: float) -> float:
        return _place(value, 0.0, ticks[-1], _FLOOR, _TOP)

    labelled = step >= 24
    parts = [
        _axis(f"{axis}; above the bars: {above}" if labelled else axis, ticks, y_of, width),
        _version_axis(list(x_of), x_of.__getitem__, width),
    ]
    for bar in bars:
        x, top = x_of[bar.version], y_of(bar.value)
        parts.append(
            f'<rect class="bar" x="{x - thickness / 2:.1f}" y="{top:.1f}" width="{thickness:.1f}"'
            f' height="{_FLOOR - top:.1f}">{_title(bar.detail)}</rect>'
        )
        if labelled:
            parts.append(_text("value", x, top - 5, bar.above))
    return "".join(parts)


def _axis(name: str, ticks: Sequence[float], y_of: Callable[[float], float], width: int) -> str:
    step = ticks[1] - ticks[0]
    decimals = next(count for count in range(12) if math.isclose(round(step, count), step, rel_tol=1e-6))
    parts = [_text("axis", 2, 14, name, "start")]
    for index, tick in enumerate(ticks):
        y = y_of(tick)
        style = "base" if index == 0 else "grid"
        parts.append(f'<line class="{style}" x1="{_LEFT}" x2="{width - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(_text("axis", _LEFT - 8, y + 4, f"{tick:.{decimals}f}", "end"))
    return "".join(parts)


def _version_axis(versions: Sequence[int], x_of: Callable[[int], float], width: int) -> str:
    """Numbers under the chart, as many as fit, and the axis' name below them."""
    room = (width - _LEFT - _RIGHT) // 34
    every = -(-len(versions) // room)
    numbers = [_text("axis", x_of(version), _FLOOR + 18, str(version)) for version in versions[::every]]
    return "".join([*numbers, _text("axis", (_LEFT + width - _RIGHT) / 2, _FLOOR + 38, "version")])


def _text(style: str, x: float, y: float, content: str, anchor: str = "middle") -> str:
    return f'<text class="{style}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(content)}</text>'


def _title(detail: str) -> str:
    return f"<title>{escape(detail)}</title>"


def _place(value: float, low: float, high: float, start: float, end: float) -> float:
    """Where `value` lies between `start` and `end`, `low` being at the one and `high` at the other."""
    share = (value - low) / (high - low) if high > low else 0.5
    return start + share * (end - start)


def _ticks(low: float, high: float) -> list[float]:
    """Two to six round numbers, evenly apart, that enclose [low, high]."""
    raw = ((high - low) or abs(high) or 1.0) / 4
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [index * step for index in range(first, max(last, first + 1) + 1)]
