"""Metrics by name: what agents tell, and what the dashboard draws. That Prometheus gets them is in tests/cli/test_pool.py."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, ClassVar

import pytest

import etha_ray
from etha_ray.metrics import METRICS, RayMetrics
from etha_ray.tensor_bus.history import PastTransfer
from tests.status.seen import failure, transfer

DASHBOARD = Path(etha_ray.__file__).parent / "dashboards" / "grafana.json"
_LABELS = {"namespace", "agent", "le", *(tag for metric in METRICS for tag in metric.tags)}


class _Fake:
    """A metric that keeps what it is told."""

    told: ClassVar[list[tuple[str, str, float, dict[str, str]]]] = []

    def __init__(self, name: str, description: str, tag_keys: tuple[str, ...], boundaries: list[float] | None = None) -> None:
        self.name, self.keys, self.default = name, tag_keys, dict[str, str]()
        assert description

    def set_default_tags(self, tags: dict[str, str]) -> None:
        self.default = tags

    def _say(self, how: str, value: float, tags: dict[str, str] | None = None) -> None:
        tags = {**self.default, **(tags or {})}
        assert set(tags) == set(self.keys), "Ray refuses tags that are missing or not declared"
        _Fake.told.append((self.name, how, value, tags))

    def inc(self, value: float, tags: dict[str, str] | None = None) -> None:
        assert value > 0, "Ray refuses to count nothing"
        self._say("inc", value, tags)

    def set(self, value: float, tags: dict[str, str] | None = None) -> None:
        self._say("set", value, tags)

    def observe(self, value: float, tags: dict[str, str] | None = None) -> None:
        self._say("observe", value, tags)


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str, float, dict[str, str]]]:
    for kind in ("Counter", "Gauge", "Histogram"):
        monkeypatch.setattr(f"ray.util.metrics.{kind}", _Fake)
    monkeypatch.setattr(_Fake, "told", [])
    return _Fake.told


def told_of(told: list[Any], name: str) -> list[Any]:
    return [entry[1:] for entry in told if entry[0] == name]


def test_transfers_errors_and_counts_become_metrics(told: list[Any]) -> None:
    observer = RayMetrics("training", 3)
    observer([transfer("recv", "g", ["t"], sequence=7), failure("g")], {"PeerLostError": 2}, {"workers": 4, "pairs": 5, "batches": 6})
    common = {"namespace": "training", "agent": "3"}
    tags = {**common, "direction": "recv", "batch": "policy"}
    assert told_of(told, "etha_ray_transfer_seconds") == [("observe", 0.75, tags)]
    assert told_of(told, "etha_ray_wait_seconds") == [("observe", 0.25, tags)]
    assert told_of(told, "etha_ray_bytes") == [("inc", 1000, tags)]
    assert told_of(told, "etha_ray_gb_per_second") == [("set", 2e-6, tags)]
    assert told_of(told, "etha_ray_version") == [("set", 7, tags)]
    assert told_of(told, "etha_ray_errors") == [("inc", 2, {**common, "kind": "PeerLostError"})]
    assert [told_of(told, f"etha_ray_{what}")[0][1] for what in ("workers", "pairs", "batches")] == [4, 5, 6]


def test_batch_names_that_never_end_do_not_fill_prometheus(told: list[Any]) -> None:
    observer = RayMetrics("training", 0)
    none: dict[str, int] = {"workers": 0, "pairs": 0, "batches": 0}
    past: list[PastTransfer] = [transfer("send", "t", ["g"], batch_id=f"step {step}") for step in range(500)]
    observer(past, {}, none)
    observer(past[:1], {}, none)
    batches = [tags["batch"] for *_, tags in told_of(told, "etha_ray_transfer_seconds")]
    assert len(set(batches)) == 33
    assert (batches[0], batches[32], batches[-1]) == ("step 0", "other", "step 0")


def test_a_transfer_of_no_bytes_has_no_speed(told: list[Any]) -> None:
    RayMetrics("training", 0)([transfer("send", "t", [])], {}, {"workers": 0, "pairs": 0, "batches": 0})
    assert told_of(told, "etha_ray_gb_per_second") == told_of(told, "etha_ray_bytes") == []
    assert len(told_of(told, "etha_ray_transfer_seconds")) == 1


def test_the_dashboard_draws_every_metric_and_no_other() -> None:
    dashboard = json.loads(DASHBOARD.read_text())
    queries = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    queries += [variable["definition"] for variable in dashboard["templating"]["list"] if variable["type"] == "query"]
    drawn = {name for query in queries for name in re.findall(r"\bray_\w+", query)}
    series = {name: metric for metric in METRICS for name in metric.series}
    assert drawn <= series.keys()
    assert {series[name] for name in drawn} == set(METRICS)
    for query in queries:
        assert query.count("(") == query.count(")")
        labels = set(re.findall(r"(\w+)=~?\"", query)) | {each for by in re.findall(r"by \(([^)]*)\)", query) for each in by.split(", ")}
        assert labels <= _LABELS, query
    for panel in dashboard["panels"]:
        for target in panel["targets"]:
            (metric,) = {series[name] for name in re.findall(r"\bray_\w+", target["expr"])}
            known = {"namespace", "agent", *metric.tags}
            assert set(re.findall(r"{{(\w+)}}", target["legendFormat"])) <= known
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])


def test_panels_do_not_overlap() -> None:
    taken: set[tuple[int, int]] = set()
    for panel in json.loads(DASHBOARD.read_text())["panels"]:
        place = panel["gridPos"]
        cells = {(x, y) for x in range(place["x"], place["x"] + place["w"]) for y in range(place["y"], place["y"] + place["h"])}
        assert place["x"] + place["w"] <= 24
        assert taken.isdisjoint(cells)
        taken |= cells
