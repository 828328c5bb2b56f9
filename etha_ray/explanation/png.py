"""A picture as a PNG file, drawn by Pillow without a browser; in the colours for a light ground."""

from __future__ import annotations

import io
from functools import cache
from typing import Any

from etha_ray.errors import OptionalDependencyError
from etha_ray.explanation.picture import COLOURS, Picture, Rectangle

_SCALE = 2
"""Pixels to a unit of the picture, each way: sharp on dense screens and in print."""

PLAIN = str.maketrans({"×": "x", "–": "-", "→": ">", "·": ".", "…": "...", "µ": "u"})
"""What Pillow's own font does not have."""

_ANCHORS = {"start": "ls", "middle": "ms", "end": "rs"}


def png(picture: Picture) -> bytes:
    """``picture`` as a PNG file.

    Raises:
        OptionalDependencyError: Pillow is not installed.
    """
    try:
        from PIL import Image, ImageDraw
    except ImportError:
        raise OptionalDependencyError(
            "a PNG needs Pillow, which is not installed: pip install 'etha-ray[plot]', or save as .svg, which needs nothing"
        ) from None
    size = round(picture.width * _SCALE), round(picture.height * _SCALE)
    image = Image.new("RGB", size, COLOURS["ground"][0])
    draw = ImageDraw.Draw(image)
    for mark in picture.marks:
        colour = COLOURS[mark.fill][0]
        if isinstance(mark, Rectangle):
            left, top, right, bottom = (round(edge * _SCALE) for edge in (mark.x, mark.y, mark.x + mark.width, mark.y + mark.height))
            draw.rectangle((left, top, max(right - 1, left), max(bottom - 1, top)), fill=colour)
        else:
            place = mark.x * _SCALE, mark.y * _SCALE
            stroke = _SCALE * 0.25 if mark.bold else 0
            draw.text(place, mark.text.translate(PLAIN), colour, _font(mark.size), _ANCHORS[mark.anchor], stroke_width=stroke)
    found = io.BytesIO()
    image.save(found, "PNG", optimize=True)
    return found.getvalue()


@cache
def _font(size: float) -> Any:
    from PIL import ImageFont

    return ImageFont.load_default(size * _SCALE)
