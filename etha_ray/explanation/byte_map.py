"""The byte map: a cell for each source (row) and target (column), darker the more bytes go from one to the other."""

from __future__ import annotations

import math

from etha_ray.explanation.groups import Groups, grouped
from etha_ray.explanation.numbers import PlanNumbers
from etha_ray.explanation.picture import HEATS, Label, Mark, Picture, Rectangle, fitting, text_width
from etha_ray.explanation.scale import Scale
from etha_ray.report import format_bytes

WIDTH = 400.0
_LIMIT = 32
"""Rows and columns, at most."""
_SIZE = 12.0
_TOP = 62.0


def byte_map(numbers: PlanNumbers) -> Picture:
    """Bytes from each source to each target of ``numbers``, whichever way they take; ranks of many hosts are taken together."""
    givers, takers = grouped(numbers.source, _LIMIT), grouped(numbers.target, _LIMIT)
    sums = givers.sums(takers, numbers.pairs)
    left = max(24.0, min(90.0, max(text_width(label, _SIZE) for label in givers.labels) + 8))
    width = (WIDTH - left) / len(takers.labels)
    height = 28.0 if len(givers.labels) <= 12 else 16.0
    marks: list[Mark] = [
        Label(0, 14, "Bytes from source to target", 14, bold=True),
        Label(0, 32, f"rows: source {givers.unit}; columns: target {takers.unit}", fill="faint"),
        *_column_labels(takers, left, width),
        *_row_labels(givers, left, height),
    ]
    scale = Scale.of(list(sums.values())) if sums else None
    for row in range(len(givers.labels)):
        for column in range(len(takers.labels)):
            amount = sums.get((row, column), 0)
            tip = f"{givers.unit} {givers.labels[row]} → {takers.unit} {takers.labels[column]}: {format_bytes(amount)}"
            x, y = left + column * width, _TOP + row * height
            gap = 1.0 if width > 6 else 0.0
            shade = f"heat{scale.shade(amount)}" if scale is not None and amount else "empty"
            marks.append(Rectangle(x, y, width - gap, height - 1, shade, tip))
            marks += _amount(amount, shade, x + (width - gap) / 2, y + height / 2, width - gap)
    bottom = _TOP + len(givers.labels) * height
    marks += _legend(scale, bottom + 22)
    return Picture("Bytes from each source to each target", WIDTH, bottom + 30, tuple(marks))


def _amount(amount: int, shade: str, x: float, y: float, width: float) -> list[Mark]:
    """The amount, where its text fits the cell."""
    text = format_bytes(amount)
    size = next((size for size in (11.0, 10.0, 9.0) if text_width(text, size) <= width - 4), None)
    return [Label(x, y + 4, text, size, "middle", f"on_{shade}")] if amount and size else []


def _column_labels(takers: Groups, left: float, width: float) -> list[Mark]:
    """Names above the columns: each where they fit, else as many as have room beside one another."""
    widest = max(text_width(label, _SIZE) for label in takers.labels) + 6
    if widest <= width or len(takers.labels) == 1:
        return [
            Label(left + (column + 0.5) * width, _TOP - 8, fitting(label, width, _SIZE), _SIZE, "middle")
            for column, label in enumerate(takers.labels)
        ]
    room = min(widest, 120.0)
    step = math.ceil(room / width)
    return [
        Label(left + column * width, _TOP - 8, fitting(takers.labels[column], room, _SIZE), _SIZE)
        for column in range(0, len(takers.labels), step)
        if left + column * width + room <= WIDTH + 6
    ]


def _row_labels(givers: Groups, left: float, height: float) -> list[Mark]:
    return [
        Label(left - 6, _TOP + (row + 0.5) * height + 4, fitting(label, left - 6, _SIZE), _SIZE, "end")
        for row, label in enumerate(givers.labels)
    ]


def _legend(scale: Scale | None, y: float) -> list[Mark]:
    if scale is None:
        return [Label(0, y, "nothing moves", fill="faint")]
    marks: list[Mark] = [Label(0, y, "up to" if len(scale.steps) > 1 else "each", 10, fill="faint")]
    room = (WIDTH - 36) / HEATS
    for number, (shade, text) in enumerate(scale.legend()):
        x = 36 + number * room
        marks += [Rectangle(x, y - 9, 11, 11, f"heat{shade}"), Label(x + 14, y, text, 9, fill="faint")]
    return marks
