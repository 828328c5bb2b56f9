"""Each benchmark at a tiny size, through the command line: what it prints, and that nothing is left."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from typer.testing import CliRunner

from etha_ray.bench.processes import WorkerProcess, Workers
from etha_ray.cli import app
from etha_ray.tensor_bus.semaphores import queue_semaphore_name


@pytest.fixture(autouse=True)
def _nothing_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    folder, pids, start = tmp_path / "bus", [os.getpid()], Workers.start

    def make_folder(prefix: str) -> str:
        folder.mkdir(mode=0o700)
        return str(folder)

    def recorded(workers: Workers, role: str, name: str) -> WorkerProcess:
        worker = start(workers, role, name)
        pids.append(worker.pid)
        return worker

    monkeypatch.setattr("etha_ray.bench.bus.tempfile.mkdtemp", make_folder)
    monkeypatch.setattr(Workers, "start", recorded)
    yield
    assert not folder.exists()
    assert not [pid for pid in pids[1:] if psutil.pid_exists(pid)]
    files = [folder / f"{name}.lmdb" for name in ("command0", "command1", "command2", "alone")]
    queues = {queue_semaphore_name(file, role).replace("/", "sem.") for file in files for role in ("items", "space")}
    for entry in Path("/dev/shm").iterdir():
        assert entry.name not in queues
        assert not any(f"_{pid}_" in entry.name or f".{pid}." in entry.name for pid in pids)


def _json_of(*arguments: str) -> dict[str, Any]:
    result = CliRunner().invoke(app, ["bench", *arguments, "--json"])
    assert result.exit_code == 0, result.stderr
    data: dict[str, Any] = json.loads(result.stdout)  # exactly one object, and nothing else
    assert data.keys() == {"bench", "figures", "ratios", "machine"}
    assert data["bench"] == arguments[0]
    assert all(value > 0 for name, value in data["figures"].items() if name != "extra_peak_mib_per_agent")
    assert all(value > 0 for value in data["ratios"].values())
    assert "round 1 of" in result.stderr
    return data


@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_roundtrip() -> None:
    data = _json_of("roundtrip", "--count", "200")
    figures = data["figures"]
    assert figures["roundtrips_count"] == 200
    assert figures["p50_us"] <= figures["p99_us"]
    assert data["ratios"]["ray_call"] == pytest.approx(figures["ray_p50_us"] / figures["p50_us"], rel=1e-3)


@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_sync() -> None:
    data = _json_of("sync", "--shape", "tiny", "--src", "1", "--dst", "2", "--steps", "2")
    figures, ratios = data["figures"], data["ratios"]
    assert figures["steps_count"] == 2
    assert figures["gb_per_s"] == pytest.approx(figures["moved_gb"] / figures["sync_s"], rel=1e-3)
    assert ratios["copy_limit"] == pytest.approx(figures["copy_limit_s"] / figures["sync_s"], rel=1e-3)
    assert ratios["ray_objects"] == pytest.approx(figures["ray_objects_s"] / figures["sync_s"], rel=1e-3)
    assert "extra_peak_mib_per_agent" in figures


@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_small() -> None:
    data = _json_of("small", "--tensors", "40", "--steps", "2", "--single-count", "10")
    figures = data["figures"]
    assert figures["tensors_count"] == 40
    assert figures["many_sync_ms"] == pytest.approx(figures["per_tensor_us"] * 40 / 1e3, rel=1e-3)
    assert figures["one_mib_p50_us"] <= figures["one_mib_p99_us"]
    assert 0 < figures["proof_percent"] < 100


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("sync", "--shape", "gpt-9"), "gpt-9"),
        (("sync", "--dtype", "bfloat61"), "bfloat61"),
        (("sync", "--steps", "0"), "at least 1"),
        (("roundtrip", "--count", "3"), "at least 100"),
        (("small", "--tensors", "0"), "at least 1"),
    ],
)
def test_impossible_arguments_are_refused_by_name(arguments: tuple[str, ...], named: str) -> None:
    result = CliRunner().invoke(app, ["bench", *arguments])
    assert result.exit_code == 1
    assert result.stdout == ""
    assert named in " ".join(result.stderr.split())


@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_faults() -> None:
    data = _json_of("faults", "--count", "1")
    faults = {"worker_killed", "agent_killed", "own_agent_killed", "agent_stopped", "own_agent_stopped"}
    if "left_out" not in data["machine"]:
        faults.add("store_stopped")
    assert data["figures"].keys() == {"repetitions_count"} | {f"{fault}_{figure}_s" for fault in faults for figure in ("p50", "max")}
