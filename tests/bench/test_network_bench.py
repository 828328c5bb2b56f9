"""``bench network`` at a tiny size: what it gives, and that nothing is left."""

from __future__ import annotations

import json
import multiprocessing
import threading

import pytest

from etha_ray.bench import network
from etha_ray.bench.network import run_network
from etha_ray.bench.processes import BenchError
from etha_ray.errors import ConfigError
from etha_ray.testing import eventually


def test_figures_and_ratios() -> None:
    before = set(threading.enumerate())
    data = json.loads(json.dumps(run_network("tiny", src=2, dst=2, steps=2).as_dict()))
    figures, ratios = data["figures"], data["ratios"]
    assert data["bench"] == "network"
    assert figures["steps_count"] == 2
    assert figures["regions_count"] == 37
    assert all(figures[f"{name}_gb_per_s"] > 0 for name in ("tcp", "unchecked", "gloo", "raw"))
    assert ratios["gloo"] == pytest.approx(figures["tcp_gb_per_s"] / figures["gloo_gb_per_s"], rel=1e-3)
    assert ratios["unchecked"] == pytest.approx(figures["tcp_gb_per_s"] / figures["unchecked_gb_per_s"], rel=1e-3)
    assert ratios["raw"] == pytest.approx(figures["tcp_gb_per_s"] / figures["raw_gb_per_s"], rel=1e-3)
    assert not multiprocessing.active_children()
    eventually(lambda: set(threading.enumerate()) <= before)


def test_wrong_bytes_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(network._Taker, "tcp", lambda taker: None)
    with pytest.raises(BenchError, match="tcp moved wrong bytes"):
        run_network("tiny", steps=1)
    assert not multiprocessing.active_children()


@pytest.mark.parametrize(
    ("arguments", "named"), [({"shape": "gpt-9"}, "gpt-9"), ({"dtype": "bfloat61"}, "bfloat61"), ({"steps": 0}, "at least 1")]
)
def test_impossible_arguments_are_refused_by_name(arguments: dict[str, object], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        run_network(**arguments)  # type: ignore[arg-type]
