"""Shades."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from etha_ray.explanation.picture import HEATS
from etha_ray.explanation.scale import Scale


@given(st.lists(st.integers(1, 10**15), min_size=1, max_size=60))
def test_more_is_never_fainter(amounts: list[int]) -> None:
    scale = Scale.of(amounts)
    shades = [scale.shade(amount) for amount in sorted(amounts)]
    assert shades == sorted(shades)
    assert all(0 <= shade < HEATS for shade in shades)
    assert len(scale.legend()) <= HEATS
    assert max(amounts) == scale.steps[-1]


def test_few_amounts_have_a_shade_each_far_apart() -> None:
    assert [Scale.of([5, 10, 20]).shade(amount) for amount in (5, 10, 20)] == [1, 3, 5]


def test_amounts_that_are_nearly_the_same_look_the_same() -> None:
    scale = Scale.of([1000, 1001, 5000])
    assert scale.shade(1000) == scale.shade(1001) != scale.shade(5000)
    assert [text for _, text in scale.legend()] == ["1.00 kB", "5.00 kB"]


def test_a_wide_range_is_told_apart_at_its_low_end_too() -> None:
    amounts = [10**power for power in range(8)]
    assert len({Scale.of(amounts).shade(amount) for amount in amounts}) >= 5
