"""A picture as plain marks: rectangles and lines of text with a colour role each. `svg` and `png` draw the same marks.

A role is a name such as "ink" or "heat3"; `COLOURS` says what it is on a light and on a dark ground.
"""

from __future__ import annotations

import colorsys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from textwrap import wrap
from typing import Literal, TypeAlias

Anchor = Literal["start", "middle", "end"]

HUES = 12
"""How many colours tell ranks apart: "hue0" to "hue11"."""

HEATS = 6
"""How many shades tell amounts apart, from the least: "heat0" to "heat5"."""

LETTER = 0.6
"""Width of an average letter or digit, as a part of the font size; on the wide side."""


@dataclass(frozen=True)
class Rectangle:
    """A filled rectangle, in pixels from the top left corner.

    ``tip`` is shown when the pointer rests on it, where the format can.
    """

    x: float
    y: float
    width: float
    height: float
    fill: str
    tip: str = ""


@dataclass(frozen=True)
class Label:
    """One line of text; ``y`` is its baseline."""

    x: float
    y: float
    text: str
    size: float = 12
    anchor: Anchor = "start"
    fill: str = "ink"
    bold: bool = False


Mark: TypeAlias = "Rectangle | Label"


@dataclass(frozen=True)
class Picture:
    """Marks on a ground of this size; ``name`` says what it shows, for those who cannot see it."""

    name: str
    width: float
    height: float
    marks: tuple[Mark, ...]


def text_width(text: str, size: float) -> float:
    """About how wide ``text`` is."""
    return len(text) * LETTER * size


def fitting(text: str, width: float, size: float) -> str:
    """``text``, its middle left out where it is too wide."""
    letters = int(width / (LETTER * size))
    if len(text) <= letters:
        return text
    head = max(letters - 1, 0) // 2
    return f"{text[:head]}…{text[len(text) - max(letters - 1 - head, 0) :]}" if letters > 2 else ""


def wrapped(text: str, width: float, size: float) -> list[str]:
    """``text`` in lines that are not wider than ``width``."""
    return wrap(text, int(width / (LETTER * size)))


def arranged(name: str, rows: Sequence[Sequence[Picture]], gap: float = 24) -> Picture:
    """Pictures beside one another in rows, on one ground, under their ``name``."""
    marks: list[Mark] = []
    width, top = 0.0, 64.0
    for row in rows:
        left = gap
        for picture in row:
            marks += [replace(mark, x=mark.x + left, y=mark.y + top) for mark in picture.marks]
            left += picture.width + gap
        width = max(width, left)
        top += max(picture.height for picture in row) + gap
    return Picture(name, width, top, (Label(gap, 36, fitting(name, width - 2 * gap, 16), 16, bold=True), *marks))


def _hex(hue: float, lightness: float, saturation: float) -> str:
    return "#" + "".join(f"{round(part * 255):02x}" for part in colorsys.hls_to_rgb(hue, lightness, saturation))


_LIGHT_HEAT = ("#e4eef9", "#bcd7f0", "#86b8e3", "#4a90d0", "#1f66ad", "#0b3d78")
_DARK_HEAT = ("#16283d", "#1c3f66", "#245c98", "#2f6fb3", "#6aa9e4", "#b9dcfb")

COLOURS: dict[str, tuple[str, str]] = {
    "ground": ("#ffffff", "#14171c"),
    "ink": ("#1d2129", "#e7eaf0"),
    "faint": ("#5d6675", "#9aa4b4"),
    "empty": ("#f0f2f5", "#1f242c"),
    **{f"hue{number}": (_hex(number / HUES, 0.80, 0.62), _hex(number / HUES, 0.25, 0.45)) for number in range(HUES)},
    **{f"heat{number}": (_LIGHT_HEAT[number], _DARK_HEAT[number]) for number in range(HEATS)},
    **{f"on_heat{number}": (("#1d2129", "#ffffff")[number > 3], ("#ffffff", "#0d1117")[number > 3]) for number in range(HEATS)},
}
"""Each role's colour on a light and on a dark ground. "on_heat3" is for text on "heat3"."""
