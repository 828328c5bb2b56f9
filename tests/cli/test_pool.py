"""`up`, `down`, and what a Ray cluster shows of agents: `status`, `doctor`, Prometheus. One cluster for the whole module."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from typing import Any

import pytest
import ray
import torch
from typer.testing import CliRunner, Result

import etha_ray
from etha_ray.cli import app
from etha_ray.errors import AgentNotFoundError
from etha_ray.metrics import METRICS
from etha_ray.runtime import connect, find_pool
from etha_ray.tensor_bus import connection
from etha_ray.testing.rays import start_ray
from tests.conftest import left_behind
from tests.tensor_bus.cluster import LONG, free_port

_SCRAPE_TIMEOUT = 200.0
"""Ray's processes report every 10 s."""


@pytest.fixture(scope="module")
def metrics_port() -> Iterator[int]:
    """A Ray whose metrics are at this port."""
    port = free_port()
    start_ray(num_cpus=4, log_to_driver=False, logging_level="error", _metrics_export_port=port)
    yield port
    ray.shutdown()


@pytest.fixture(scope="module")
def pool(metrics_port: int) -> tuple[str, list[int]]:
    """The name and the pids of a pool that another process started, and which that process did not take with it."""
    name = f"test-{os.getpid()}-up"
    address = ray.get_runtime_context().gcs_address
    command = [sys.executable, "-m", "etha_ray.cli", "up", "--devices", "cpu,cpu", "--namespace", name, "--address", address, "--json"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=250, check=False)
    assert ended.returncode == 0, ended.stderr
    agents = json.loads(ended.stdout)["agents"]
    assert [agent["state"] for agent in agents] == ["running", "running"]
    return name, [agent["pid"] for agent in agents]


def run(*arguments: str) -> Result:
    return CliRunner(env={"COLUMNS": "200", "NO_COLOR": "1"}).invoke(app, list(arguments))


@ray.remote(num_cpus=0)
class Worker:
    def __init__(self, namespace: str, side: str, other: str) -> None:
        os.environ["ETHA_RAY_NAMESPACE"] = namespace
        connection._GRACE = LONG  # the agent says what it waited for, however busy it is: a client that gives up first cancels
        self.client, _ = etha_ray.bootstrap_client()
        self.tensor = torch.zeros(1000)
        self.client.init_pair("weights", side, other, 1)
        self.batch = self.client.register_tensors("policy", [(self.tensor, "weights")], blocking=False)

    def transfer(self, direction: Any, timeout: float) -> Any:
        try:
            return self.batch.transfer(direction, blocking=True, timeout=timeout).result().bytes
        except TimeoutError as error:
            return type(error).__name__


def test_a_pool_is_up_without_who_started_it(pool: tuple[str, list[int]]) -> None:
    name, pids = pool
    found = find_pool(name)
    assert (found.ranks, [agent["pid"] for agent in found.describe()]) == ([0, 1], pids)
    result = run("status", "--namespace", name, "--address", "auto", "--json")
    assert result.exit_code == 0, result.output
    assert [(agent["rank"], agent["life"], agent["pid"]) for agent in json.loads(result.stdout)["agents"]] == [
        (rank, "running", pid) for rank, pid in enumerate(pids)
    ]


def test_agents_of_other_hosts_are_seen_through_ray(pool: tuple[str, list[int]], monkeypatch: pytest.MonkeyPatch) -> None:
    name, pids = pool
    monkeypatch.setattr(sys.modules["etha_ray.status.gather"], "agents_here", lambda namespace: [])  # as on a node without agents
    result = run("status", "--namespace", name, "--address", "auto", "--json")
    assert [(agent["life"], agent["pid"]) for agent in json.loads(result.stdout)["agents"]] == [("running", pid) for pid in pids]


def test_up_again_is_refused(pool: tuple[str, list[int]]) -> None:
    result = run("up", "--devices", "cpu", "--namespace", pool[0])
    assert result.exit_code == 1
    assert "runs already" in result.stderr.replace("\n", " ")


@pytest.mark.parametrize("arguments", [("--devices", "gpu"), ("--namespace", "../up"), ("--store", "nonsense://")])
def test_wrong_use_ends_with_2(arguments: tuple[str, ...], metrics_port: int) -> None:
    result = run("up", *arguments)
    assert result.exit_code == 2, result.output


def test_doctor_finds_the_cluster(metrics_port: int) -> None:
    result = run("doctor", "--address", ray.get_runtime_context().gcs_address, "--json")
    said = next(check for check in json.loads(result.stdout)["checks"] if check["name"] == "ray")
    assert said["state"] == "ok", said
    assert "1 nodes" in said["found"]


def test_where_no_cluster_is_commands_end_with_1(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: Any, **__: Any) -> None:
        raise ConnectionError("Could not find any running Ray instance.")

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", refused)
    with pytest.raises(AgentNotFoundError, match="ray start --head"):
        connect("auto")
    for command in ("up", "down"):
        result = run(command, "--namespace", "nobody")
        assert result.exit_code == 1
        assert "no Ray cluster answers" in result.stderr.replace("\n", " ")


def test_prometheus_gets_what_the_agents_measure(pool: tuple[str, list[int]], metrics_port: int) -> None:
    name, _ = pool
    workers = [Worker.remote(name, "trainer", "generator"), Worker.remote(name, "generator", "trainer")]
    assert ray.get([workers[0].transfer.remote("send", LONG), workers[1].transfer.remote("recv", LONG)]) == [4000, 4000]
    assert ray.get(workers[0].transfer.remote("send", 0.1)) == "TransferTimeoutError"
    lines: list[str] = []

    def values(series: str, **tags: str) -> list[float]:
        parts = [f'{key}="{value}"' for key, value in tags.items()]
        return [float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(f"{series}{{") and all(part in line for part in parts)]

    def seen() -> dict[str, list[float]]:
        return {
            "sent": values("ray_etha_ray_bytes_total", direction="send", batch="policy"),
            "received": values("ray_etha_ray_bytes_total", direction="recv", batch="policy"),
            "receives": values("ray_etha_ray_transfer_seconds_count", direction="recv"),
            "version": values("ray_etha_ray_version", direction="recv"),
            "errors": values("ray_etha_ray_errors_total", kind="TransferTimeoutError"),
            "workers": values("ray_etha_ray_workers"),
        }

    everything = {series for metric in METRICS for series in metric.series}
    wanted = {"sent": [4000], "received": [4000], "receives": [1], "version": [1], "errors": [1], "workers": [1, 1]}
    deadline = time.monotonic() + _SCRAPE_TIMEOUT
    while seen() != wanted or {line.split("{")[0] for line in lines} != everything:  # each agent's process reports by itself
        assert time.monotonic() < deadline, (seen(), lines)
        time.sleep(0.5)
        with urllib.request.urlopen(f"http://127.0.0.1:{metrics_port}/metrics", timeout=LONG) as answer:
            lines = [line for line in answer.read().decode().splitlines() if f'namespace="{name}"' in line]
    assert not re.search(r'agent="[^01]', "\n".join(lines))


def test_down_ends_the_agents_and_leaves_nothing(pool: tuple[str, list[int]]) -> None:
    name, pids = pool
    result = run("down", "--namespace", name, "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout) == {"namespace": name, "ended": [0, 1]}
    assert left_behind(name, pids) == []
    again = run("down", "--namespace", name)
    assert again.exit_code == 1
    assert f"no pool named '{name}'" in again.stderr.replace("\n", " ")


@pytest.mark.parametrize("command", ["up", "down", "status"])
def test_an_address_where_nobody_listens_is_told_at_once(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray itself asks for minutes."""
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", lambda *_, **__: pytest.fail("Ray was asked"))
    result = run(command, "--namespace", "nobody", "--address", "127.0.0.1:1")
    assert result.exit_code == 1
    assert "no Ray cluster answers at '127.0.0.1:1': [Errno 111] Connection refused. Start one" in " ".join(result.stderr.split())
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    with pytest.raises(AgentNotFoundError, match="Connection refused"):
        connect("auto")


def test_devices_are_looked_at_before_the_cluster_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    result = run("up", "--devices", "tpu", "--address", "127.0.0.1:1")
    assert result.exit_code == 2
    assert "device 'tpu' is not understood" in " ".join(result.stderr.split())
