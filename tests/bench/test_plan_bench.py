"""The model that `bench plan` plans for, and what it measures."""

from __future__ import annotations

import json
import math
import os
from collections import Counter

import pytest
from typer.testing import CliRunner

from etha_ray.bench.agent_plan import AgentPlan, make, measure, routes_of_agent
from etha_ray.bench.moe import Form, Moe
from etha_ray.bench.plan import run_plan
from etha_ray.bench.processes import BenchError
from etha_ray.cli import app
from etha_ray.errors import ConfigError

FORMS: tuple[Form, ...] = ("stacked", "matrices")


@pytest.fixture(autouse=True)
def _once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures are not judged here, so one measurement of each is enough."""
    monkeypatch.setattr("etha_ray.bench.plan._REPEATS", 1)


@pytest.mark.parametrize("form", FORMS)
def test_it_is_the_whole_of_deepseek_v3(form: Form) -> None:
    tensors = list(Moe(1024, form).tensors())
    assert sum(math.prod(tensor.shape) for tensor in tensors) == 671_026_419_200
    assert len({tensor.name for tensor in tensors}) == len(tensors)
    assert len(tensors) == {"stacked": 1025, "matrices": 1025 - 58 * 3 + 58 * 256 * 3}[form]
    assert {(tensor.source.ranks, tensor.target.ranks) for tensor in tensors} == {(1024, 512)}


def test_every_parameter_arrives_once_whichever_way_experts_are_held() -> None:
    """With 16 trainer ranks the engine has 8: small enough to look at all of them."""
    received: dict[Form, list[int]] = {}
    for form in FORMS:
        model = Moe(16, form)
        tensors = list(model.tensors())
        into = [routes_of_agent(tensors, "target", position) for position in range(8)]
        out = [routes_of_agent(tensors, "source", position) for position in range(16)]
        assert Counter(_ends(into)) == Counter(_ends(out))
        for position, routes in enumerate(into):
            for tensor, found in zip(tensors, routes, strict=True):
                assert sum(route.numel for route in found) == tensor.target.region(position, tensor.shape).numel
        received[form] = [sum(route.numel for found in routes for route in found) for routes in into]
    assert received["stacked"] == received["matrices"]


def _ends(agents: list[list[tuple[object, ...]]]) -> list[tuple[int, object]]:
    return [(number, route) for agent in agents for number, routes in enumerate(agent) for route in routes]


@pytest.mark.parametrize("ranks", [0, 8, 24, 8192])
def test_ranks_that_the_model_cannot_be_laid_out_on_are_refused(ranks: int) -> None:
    with pytest.raises(ConfigError, match=f"{ranks} source ranks do not fit"):
        run_plan((64, ranks))


def test_no_ranks_are_refused() -> None:
    with pytest.raises(ConfigError, match="at least one"):
        run_plan(())


def test_a_measured_plan_is_the_plan_of_that_agent() -> None:
    found = measure(64, "stacked", "target", 5)
    routes = routes_of_agent(Moe(64).tensors(), "target", 5)
    assert found.tensors == len(routes) == 1025
    assert found.routes == sum(map(len, routes))
    assert found.boxes == sum(len(route.boxes) for of_tensor in routes for route in of_tensor)
    assert found.seconds > 0
    assert found.cpu_seconds > 0
    assert found.peak_mib > 0


def test_memory_counts_what_planning_takes_for_a_moment(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[int] = []

    def hungry(*arguments: object) -> list[tuple[object, ...]]:
        taken.append(len(bytearray(os.urandom(1) * (200 << 20))))
        return [()]

    monkeypatch.setattr("etha_ray.bench.agent_plan.routes_of_agent", hungry)
    found: AgentPlan = make(Moe(64), "source", 0)
    assert taken == [200 << 20]
    assert 150 < found.peak_mib < 1000


def test_a_process_that_dies_is_told_of(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("etha_ray.bench.agent_plan._answer", _die)
    with pytest.raises(BenchError, match="plans for source 3 of 64 ranks died"):
        measure(64, "stacked", "source", 3)


def _die(*arguments: object) -> None:
    os._exit(3)


def test_figures() -> None:
    result = CliRunner().invoke(app, ["bench", "plan", "--ranks", "16", "--ranks", "32", "--json"])
    assert result.exit_code == 0, result.stderr
    data = json.loads(result.stdout)
    assert data["bench"] == "plan"
    figures = data["figures"]
    assert figures["seconds"] == figures["ranks_32_seconds"]
    assert figures["peak_mib"] == figures["ranks_32_peak_mib"]
    assert figures["tensors_count"] == 1025
    assert figures["matrices_tensors_count"] == 45_395
    # Half of the trainer's ranks serve: a dense tensor has more pieces then, and each of them as many takers.
    assert figures["ranks_32_routes_count"] > figures["ranks_16_routes_count"]
    assert figures["ranks_32_us_per_route"] == pytest.approx(figures["cpu_seconds"] * 1e6 / figures["ranks_32_routes_count"], rel=1e-3)
    assert all(value > 0 for value in figures.values())


def test_the_layouts_are_said() -> None:
    texts = [figure.what for figure in run_plan((16,)).figures]
    assert "61 layers from 16 ranks (FSDP 1 × EP 16) to 8 (EP 1 × TP 8), 256 experts a layer stacked" in texts[0]


def test_bad_ranks_are_refused_by_name() -> None:
    result = CliRunner().invoke(app, ["bench", "plan", "--ranks", "24"])
    assert result.exit_code == 1
    assert "24 source ranks do not fit" in " ".join(result.stderr.split())
