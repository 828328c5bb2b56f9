"""Figures, ratios and what is printed of them."""

from __future__ import annotations

import json

import pytest
from rich.console import Console

from etha_ray.bench.figures import BenchResult, Figure, Ratio, interleaved, median, percentile


def test_percentile_is_one_of_the_values() -> None:
    values = [5.0, 1.0, 4.0, 2.0, 3.0]
    assert [percentile(values, percent) for percent in (1, 20, 50, 99, 100)] == [1.0, 1.0, 3.0, 5.0, 5.0]
    assert median([7.0]) == 7.0


def test_interleaved_takes_turns_and_keeps_all_samples() -> None:
    order: list[str] = []

    def measure(name: str, count: int) -> list[float]:
        order.append(name)
        return [float(len(order))] * count

    samples = interleaved(2, {"a": lambda: measure("a", 1), "b": lambda: measure("b", 2)})
    assert order == ["a", "b", "a", "b"]
    assert samples == {"a": [1.0, 3.0], "b": [2.0, 2.0, 4.0, 4.0]}


@pytest.mark.parametrize(("value", "figure_met", "ratio_met"), [(9.0, True, False), (10.0, True, True), (11.0, False, True)])
def test_a_figure_may_not_exceed_its_goal_and_a_ratio_must_reach_it(value: float, figure_met: bool, ratio_met: bool) -> None:
    assert Figure("p50_us", value, "", reach=10.0).met is figure_met
    assert Ratio("ray", value, "", reach=10.0).met is ratio_met
    assert Figure("p50_us", value, "").met is None


def test_result_as_json_and_as_table() -> None:
    result = BenchResult(
        "demo", [Figure("p50_us", 12.3456789, "a round trip", reach=30.0)], [Ratio("ray_call", 20.0, "over Ray", reach=25.0)]
    )
    data = json.loads(json.dumps(result.as_dict()))
    assert data["bench"] == "demo"
    assert data["figures"] == {"p50_us": 12.3457}
    assert data["ratios"] == {"ray_call": 20.0}
    assert {"cpu", "cores", "memory_gib", "kernel", "python", "torch", "ray", "date"} <= data["machine"].keys()

    console = Console(width=200)
    with console.capture() as capture:
        console.print(result.table())
    text = capture.get()
    assert "≤ 30 met" in text
    assert "≥ 25 missed" in text
    assert "20×" in text
