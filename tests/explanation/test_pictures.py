"""All pictures: nothing lies outside, no two lines of text overlap, and text can be read on what it stands on."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from etha_ray.explanation import Explanation, explain
from etha_ray.explanation.byte_map import byte_map
from etha_ray.explanation.picture import COLOURS, HEATS, HUES, Label, Picture, Rectangle, fitting, text_width
from etha_ray.explanation.shard_map import shard_maps
from etha_ray.explanation.words import words
from etha_ray.layout import Layout, Pieces
from etha_ray.plan import Side, plan

from .layouts import Case, cases

Edges = tuple[float, float, float, float]


def edges(mark: Label | Rectangle) -> Edges:
    """Left, top, right and bottom."""
    if isinstance(mark, Rectangle):
        return mark.x, mark.y, mark.x + mark.width, mark.y + mark.height
    width = text_width(mark.text, mark.size)
    left = mark.x - {"start": 0.0, "middle": width / 2, "end": width}[mark.anchor]
    return left, mark.y - 0.75 * mark.size, left + width, mark.y + 0.2 * mark.size


def pictures(made: Explanation) -> list[Picture]:
    return [*shard_maps(made), byte_map(made), words(made), made._picture()]


def check(made: Explanation) -> None:
    for picture in pictures(made):
        for mark in picture.marks:
            left, top, right, bottom = edges(mark)
            assert left >= -0.01, mark
            assert top >= -0.01, mark
            assert right <= picture.width + 0.01, mark
            assert bottom <= picture.height + 0.01, mark
        labels = [mark for mark in picture.marks if isinstance(mark, Label)]
        for one, other in itertools.combinations(labels, 2):
            a, b = edges(one), edges(other)
            assert a[2] <= b[0] + 0.01 or b[2] <= a[0] + 0.01 or a[3] <= b[1] + 0.01 or b[3] <= a[1] + 0.01, (one, other)


@settings(max_examples=80, deadline=None)
@given(cases(most_dims=4), st.integers(1, 8))
def test_everything_has_its_place(case: Case, gpus_per_host: int) -> None:
    check(explain(*case, gpus_per_host=gpus_per_host))


@pytest.mark.parametrize(
    ("source", "target", "shape"),
    [
        ("1024: S0", "64x8: R,S0", (24576, 1536)),
        ("64x16: S1,S0", "64x8: S0,S2", (256, 7168, 2048)),
        ("300: S0", "31: S1", (1000, 77)),
        ("33: S1", "100: R", (3, 100000)),
    ],
)
def test_with_many_ranks_too(source: str, target: str, shape: tuple[int, ...]) -> None:
    made = explain(source, target, shape)
    check(made)
    assert len(made.svg()) < 400_000


def test_with_long_names_of_hosts_too() -> None:
    names = tuple(f"ip-10-0-{number // 16}-{number % 16}.eu-central-1.compute.internal" for number in range(64))
    made = explain(
        plan(
            Side(Layout.decode("64: S0"), tuple(range(64)), names),
            Side(Layout.decode("80: S1"), tuple(range(80)), names + names[:16]),
            (64, 80),
        )
    )
    for picture in pictures(made)[:3]:
        for mark in picture.marks:
            assert -0.01 <= edges(mark)[0] <= edges(mark)[2] <= picture.width + 0.01, mark


# --- the shard picture ------------------------------------------------------------------------------------------------


def texts(picture: Picture) -> list[str]:
    return [mark.text for mark in picture.marks if isinstance(mark, Label)]


def parts(picture: Picture) -> list[Rectangle]:
    return [mark for mark in picture.marks if isinstance(mark, Rectangle) and mark.fill.startswith("hue")]


def test_each_rank_has_its_part_and_its_colour() -> None:
    source, target = shard_maps(explain("2x2: S0,S1", "4: R", (8, 8)))
    assert texts(source) == [
        "Source: 2x2: S0,S1",
        "dimension 0 (8) down, dimension 1 (8) across",
        *"0123",
        "each part: the ranks that hold it",
    ]
    centres = [((left + right) / 2, (top + bottom) / 2) for left, top, right, bottom in map(edges, parts(source))]
    ground = next(mark for mark in source.marks if isinstance(mark, Rectangle))
    left, top, right, bottom = edges(ground)
    quarters = [(left + x * (right - left), top + y * (bottom - top)) for y in (0.25, 0.75) for x in (0.25, 0.75)]
    assert [pytest.approx(centre) for centre in centres] == quarters
    assert len({part.fill for part in parts(source)}) == 4
    assert texts(target)[2:4] == ["0–3", "×4"]
    assert len(parts(target)) == 1


def test_the_parts_of_a_side_fill_the_tensor() -> None:
    for layout in ("7: S0", "3x5: S0,S1", "2x3: SS0/2,S0", "5: S1", "4x2: R,S0"):
        picture = shard_maps(explain(layout, "1: R", (30, 30)))[0]
        ground = next(mark for mark in picture.marks if isinstance(mark, Rectangle) and mark.fill == "empty")
        outlines = {edges(mark) for mark in picture.marks if isinstance(mark, Rectangle) and mark.fill == "ground"}
        covered = sum((right - left) * (bottom - top) for left, top, right, bottom in outlines)
        assert covered == pytest.approx(ground.width * ground.height)


def test_interleaved_shards_are_drawn_where_they_are() -> None:
    picture = shard_maps(explain("2x2: SS0/2,S0", "1: R", (8, 8)))[0]
    down = sorted((mark.y, mark.text) for mark in picture.marks if isinstance(mark, Label) and mark.text.isdecimal())
    assert [text for _, text in down] == ["0", "2", "1", "3"]


def test_the_two_dimensions_that_are_cut_most_are_drawn() -> None:
    source, target = shard_maps(explain("4: S2", "2x3: S0,S1", (6, 6, 8)))
    assert "dimension 1 (6) down, dimension 2 (8) across" in texts(source)
    assert "not cut along dimension 0, which is not drawn" in texts(source)
    assert "also cut along dimension 0, which is not drawn: names share parts" in " ".join(texts(target))
    assert "0, 3" in texts(target)


def test_who_holds_nothing_is_named() -> None:
    assert "2 ranks without a part: 3–4" in texts(shard_maps(explain("5: S0", "1: R", (3,)))[0])
    assert "rank without a part: 1" in texts(shard_maps(explain(Pieces((2,), (((0,), (2,)), None)), "1: R", (2,)))[0])


def test_contributions_are_no_replicas() -> None:
    assert "each value is the sum of 2 contributions" in texts(shard_maps(explain("2: P(sum)", "1: R", (3,)))[0])


def test_a_small_piece_is_not_hidden_by_a_large_one_that_overlaps_it() -> None:
    target = Pieces((40, 40), (((10, 10), (10, 10)), ((0, 0), (40, 40))))
    drawn = parts(shard_maps(explain("1: R", target, (40, 40)))[1])
    assert [part.tip for part in drawn] == ["rank 1", "rank 0"]


def test_many_parts_are_shown_by_host_but_many_replicas_are_not() -> None:
    source, target = shard_maps(explain("1024: S0", "64x8: R,S0", (4096, 64)))
    assert 0 < len(parts(source)) <= 64
    assert "a colour per part; 1,024 ranks, shown by 2 hosts" in texts(source)
    assert [text for text in texts(target) if "×64" in text] == [f"{rank}… ×64" for rank in range(8)]


def test_what_is_too_fine_or_too_much_to_draw_is_said() -> None:
    fine = shard_maps(explain("4: SS0/100", "1: R", (1000,)))[0]
    assert "interleaved too finely to draw: each rank from its first to its last index" in " ".join(texts(fine))
    many = shard_maps(explain("8x8: SS0/32,SS1/32", "1: R", (256, 256)))[0]
    assert "the 64,512 smallest parts are left out" in texts(many)
    assert len(parts(many)) == 1024


# --- the byte map -------------------------------------------------------------------------------------------------------


def test_a_cell_says_what_goes_from_whom_to_whom() -> None:
    picture = byte_map(explain("2: S0", "4: S1", (4, 6), 1))
    tips = [mark.tip for mark in picture.marks if isinstance(mark, Rectangle) and mark.tip]
    assert tips[0] == "rank 0 → rank 0: 4 B"
    assert len(tips) == 8
    assert [text for text in texts(picture) if text.endswith(" B")].count("4 B") == 6 + 1  # the legend has one


def test_thousands_of_ranks_make_no_monster() -> None:
    picture = byte_map(explain("64x16: S1,S0", "64x8: S0,S1", (256, 2048, 8)))
    assert sum(isinstance(mark, Rectangle) for mark in picture.marks) <= 32 * 32 + HEATS
    assert "rows: source 4 hosts; columns: target 2 hosts" in texts(picture)


def test_nothing_moves() -> None:
    picture = byte_map(explain("2: S0", "2: R", (0,)))
    assert "nothing moves" in texts(picture)
    assert {mark.fill for mark in picture.marks if isinstance(mark, Rectangle)} == {"empty"}


# --- text and colours ---------------------------------------------------------------------------------------------------


def contrast(one: str, other: str) -> float:
    """Contrast ratio of two colours, as in the Web Content Accessibility Guidelines 2."""

    def luminance(colour: str) -> float:
        parts = (int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5))
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    light, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("ground", [0, 1], ids=["light", "dark"])
def test_text_can_be_read_on_every_colour_it_stands_on(ground: int) -> None:
    stands = [("ink", "ground"), ("faint", "ground"), *(("ink", f"hue{hue}") for hue in range(HUES))]
    stands += [(f"on_heat{heat}", f"heat{heat}") for heat in range(HEATS)]
    assert {(text, under) for text, under in stands if contrast(COLOURS[text][ground], COLOURS[under][ground]) < 4.5} == set()


def test_fitting() -> None:
    assert fitting("host0", 100, 12) == "host0"
    shortened = fitting("a-very-long-name-17", 80, 12)
    assert shortened.startswith("a-ver")
    assert shortened.endswith("e-17")
    assert text_width(shortened, 12) <= 80
    assert fitting("host0", 5, 12) == ""
