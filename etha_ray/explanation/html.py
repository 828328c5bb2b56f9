"""A plan's numbers and pictures as a piece of a page: for notebooks. Beside one another where there is room, else one below."""

from __future__ import annotations

from html import escape

from etha_ray.explanation.byte_map import byte_map
from etha_ray.explanation.numbers import PlanNumbers
from etha_ray.explanation.picture import COLOURS
from etha_ray.explanation.shard_map import shard_maps
from etha_ray.explanation.svg import FONT, svg
from etha_ray.explanation.text import assumption, heading, sentences

_STYLE = f"""
.etha-ray-page{{font:14px/1.45 {FONT};color:{COLOURS["ink"][0]};background:{COLOURS["ground"][0]};padding:16px;max-width:880px}}
.etha-ray-page h3{{font-size:16px;margin:0 0 8px}}
.etha-ray-page dl{{display:grid;grid-template-columns:max-content 1fr;gap:2px 14px;margin:0 0 8px}}
.etha-ray-page dt,.etha-ray-page p{{color:{COLOURS["faint"][0]};font-weight:400}}
.etha-ray-page dd{{margin:0}}
.etha-ray-page p{{font-size:12px;margin:0 0 8px}}
.etha-ray-page div{{display:flex;flex-wrap:wrap;align-items:flex-start;gap:24px;margin-top:16px}}
@media(prefers-color-scheme:dark){{
.etha-ray-page{{color:{COLOURS["ink"][1]};background:{COLOURS["ground"][1]}}}
.etha-ray-page dt,.etha-ray-page p{{color:{COLOURS["faint"][1]}}}
}}"""


def html(numbers: PlanNumbers) -> str:
    """The sentences and all pictures, in light and dark."""
    terms = "".join(f"<dt>{escape(word)}</dt><dd>{escape(sentence)}</dd>" for word, sentence in sentences(numbers))
    note = f"<p>{escape(assumption(numbers))}</p>" if numbers.between_hosts else ""
    pictures = "".join(svg(picture) for picture in (*shard_maps(numbers), byte_map(numbers)))
    return (
        f'<section class="etha-ray-page"><style>{_STYLE}</style><h3>{escape(heading(numbers))}</h3>'
        f"<dl>{terms}</dl>{note}<div>{pictures}</div></section>"
    )


def page(numbers: PlanNumbers) -> str:
    """The same as a page of its own."""
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width,initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f"<title>{escape(heading(numbers))}</title>{html(numbers)}</html>"
    )
