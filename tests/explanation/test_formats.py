"""Pictures as files: well-formed, in light and dark, and safe whatever hosts are called."""

from __future__ import annotations

import io
import re
import sys
from xml.etree import ElementTree

import pytest

from etha_ray.errors import OptionalDependencyError
from etha_ray.explanation import Explanation, explain
from etha_ray.explanation.html import page
from etha_ray.explanation.picture import COLOURS, Label, Picture, Rectangle, text_width
from etha_ray.explanation.png import PLAIN, png
from etha_ray.explanation.svg import svg
from etha_ray.layout import Layout
from etha_ray.plan import Side, plan


@pytest.fixture
def hostile() -> Explanation:
    """A plan between hosts whose names are markup."""
    names = tuple(f'<script>alert("{number}")</script>&' for number in range(40))
    side = Side(Layout.decode("40: S0"), tuple(range(40)), names)
    return explain(plan(side, Side(Layout.decode("40: S1"), tuple(range(40)), names[::-1]), (80, 80)))


def test_an_svg_is_well_formed_and_has_a_name() -> None:
    made = explain("2x2: S0,S1", "4: R", (64, 64))
    root = ElementTree.fromstring(made.svg())
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    assert root.get("aria-label") == "2x2: S0,S1  →  4: R, 64x64 of 2 bytes an element"
    assert root.get("viewBox") == f"0 0 {root.get('width')} {root.get('height')}"


def test_every_colour_of_an_svg_is_there_in_light_and_in_dark() -> None:
    text = explain("2x2: S0,S1", "4: S0", (64, 64)).svg()
    style = text[text.index("<style>") : text.index("</style>")]
    light, dark = style.split("@media(prefers-color-scheme:dark)")
    for role in set(re.findall(r'class="(\w+)"', text)):
        for part, colour in zip((light, dark), COLOURS[role], strict=True):
            assert f".{role}{{fill:{colour}}}" in part


def test_names_are_text_and_never_markup(hostile: Explanation) -> None:
    ElementTree.fromstring(hostile.svg())
    for text in (hostile.svg(), page(hostile)):
        assert "<script" not in text
        assert "&lt;script&gt;" in text


def test_a_page_says_and_shows_everything() -> None:
    made = explain("2x2: S0,S1", "4: R", (64, 64), gpus_per_host=4)
    text = page(made)
    assert text == "".join((text[: text.index("<section")], made._repr_html_(), "</html>"))
    assert text.count("<svg ") == 3
    for said in (
        "8.19 kB between hosts",
        "1 target passes on 24.58 kB",
        "assumes one full-duplex link of 50.00 GB/s",
        "prefers-color-scheme:dark",
    ):
        assert said in text


def test_a_png_is_the_same_picture() -> None:
    image = pytest.importorskip("PIL.Image")
    picture = Picture("demo", 40, 20, (Rectangle(10, 5, 20, 10, "hue3"), Label(0, 18, "×–→…µ", 4, "start")))
    drawn = image.open(io.BytesIO(png(picture)))
    assert drawn.size == (80, 40)
    colours = {drawn.getpixel(place) for place in ((20, 10), (59, 29), (40, 20))}
    assert colours == {tuple(int(COLOURS["hue3"][0][at : at + 2], 16) for at in (1, 3, 5))}
    assert {drawn.getpixel(place) for place in ((19, 9), (60, 30), (79, 0))} == {(255, 255, 255)}


def test_a_png_of_all(hostile: Explanation) -> None:
    image = pytest.importorskip("PIL.Image")
    root = ElementTree.fromstring(hostile.svg())
    drawn = image.open(io.BytesIO(hostile.png()))
    assert drawn.size == tuple(round(2 * float(root.get(side, "0"))) for side in ("width", "height"))


def test_text_is_no_wider_than_it_is_taken_for() -> None:
    font = pytest.importorskip("PIL.ImageFont").load_default(100)
    for made in (explain("4x2: S0,S1", "300: SS0/2", (640, 64)), explain("64: P(sum)", "8: R", (7, 7, 7))):
        for mark in made._picture().marks:
            if isinstance(mark, Label):
                assert font.getlength(mark.text.translate(PLAIN)) <= text_width(mark.text, 100) * 1.02, mark.text


def test_without_pillow_a_png_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(OptionalDependencyError, match=r"pip install 'etha-ray\[plot\]', or save as \.svg"):
        explain("2: S0", "2: R", (4,)).png()


def test_numbers_are_short() -> None:
    text = svg(Picture("demo", 10.0, 20.5, (Rectangle(1 / 3, 0, 10, 2.0, "ink"),)))
    assert 'x="0.33" y="0" width="10" height="2"' in text
    assert 'viewBox="0 0 10 20.5"' in text
