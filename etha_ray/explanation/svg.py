"""A picture as an SVG file, or as markup inside a page; its colours follow the reader's light or dark setting."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape

from etha_ray.explanation.picture import COLOURS, Mark, Picture, Rectangle

FONT = "system-ui,-apple-system,'Segoe UI',Roboto,Helvetica,Arial,sans-serif"


def svg(picture: Picture) -> str:
    """``picture`` as an SVG document that stands alone, and may also be put into a page as it is."""
    marks = (Rectangle(0, 0, picture.width, picture.height, "ground"), *picture.marks)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" class="etha-ray" role="img" aria-label="{escape(picture.name)}" '
        f'viewBox="0 0 {_number(picture.width)} {_number(picture.height)}" '
        f'width="{_number(picture.width)}" height="{_number(picture.height)}" style="max-width:100%;height:auto">'
        f"<style>{_style(marks)}</style>{''.join(map(_markup, marks))}</svg>"
    )


def _style(marks: Iterable[Mark]) -> str:
    roles = dict.fromkeys(mark.fill for mark in marks)
    light, dark = ("".join(f".etha-ray .{role}{{fill:{COLOURS[role][ground]}}}" for role in roles) for ground in (0, 1))
    return f".etha-ray text{{font-family:{FONT}}}{light}@media(prefers-color-scheme:dark){{{dark}}}"


def _markup(mark: Mark) -> str:
    if isinstance(mark, Rectangle):
        tip = f"<title>{escape(mark.tip)}</title>" if mark.tip else ""
        place = f'x="{_number(mark.x)}" y="{_number(mark.y)}" width="{_number(mark.width)}" height="{_number(mark.height)}"'
        return f'<rect class="{mark.fill}" {place}>{tip}</rect>'
    weight = ' font-weight="600"' if mark.bold else ""
    anchor = "" if mark.anchor == "start" else f' text-anchor="{mark.anchor}"'
    place = f'x="{_number(mark.x)}" y="{_number(mark.y)}" font-size="{_number(mark.size)}"'
    return f'<text class="{mark.fill}" {place}{anchor}{weight}>{escape(mark.text)}</text>'


def _number(value: float) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".")
