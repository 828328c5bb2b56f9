"""The bench of the stores at a tiny size: what it measures, what it says is not there, and that nothing is left."""

from __future__ import annotations

import contextlib
import shutil
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import psutil
import pytest

from etha_ray.bench.store import run_store
from etha_ray.errors import ConfigError, StoreUnavailableError

ETCD = shutil.which("etcd")
WAIT = 60.0


def gone(pid: int) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        psutil.wait_procs([psutil.Process(pid)], timeout=WAIT)
    return not psutil.pid_exists(pid)


def names(*stores: str) -> set[str]:
    each = {f"{store}_{what}_{percent}_us" for store in stores for what in ("put", "get", "wake") for percent in ("p50", "p99")}
    return each | {"puts_count", "wakes_count"}


@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.skipif(ETCD is None, reason="no etcd is installed")
def test_all_stores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    children = {child.pid for child in psutil.Process().children()}  # Ray's start others when they like
    data = run_store(200).as_dict()
    assert data["bench"] == "store"
    figures = data["figures"]
    assert figures.keys() == names("memory", "tcp", "gcs", "etcd")
    assert (figures["puts_count"], figures["wakes_count"]) == (200, 10)
    assert all(value > 0 for value in figures.values())
    assert all(value <= figures[name.replace("p50", "p99")] for name, value in figures.items())
    assert data["machine"]["left_out"] == ""
    assert not list(tmp_path.glob("etha_ray_bench_etcd_*"))
    assert not {child.pid for child in psutil.Process().children()} - children


def test_what_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(shutil, "which", lambda program: None)
    monkeypatch.setitem(sys.modules, "ray", None)
    result = run_store(200)
    assert {figure.name for figure in result.figures} == names("memory", "tcp")
    said = " ".join(capsys.readouterr().err.split())
    left_out = str(result.machine["left_out"]).split("; ")
    assert [reason.partition(" is not ")[0] for reason in left_out] == ["gcs: Ray", "etcd: etcd"]
    assert all(f"left out: {reason}" in said for reason in left_out)


def test_an_etcd_that_does_not_serve(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("pyetcd")
    monkeypatch.setitem(sys.modules, "ray", None)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    with pytest.raises(StoreUnavailableError, match=str(port)):
        run_store(200, etcd=f"127.0.0.1:{port}")


def test_too_few() -> None:
    with pytest.raises(ConfigError, match="at least 200"):
        run_store(199)


@pytest.mark.skipif(ETCD is None, reason="no etcd is installed")
@pytest.mark.slow
def test_the_etcd_ends_when_the_benchmark_is_killed() -> None:
    program = (
        "import shutil, time\n"
        "from etha_ray.bench.processes import Workers\n"
        "with Workers() as workers:\n"
        "    etcd = workers.start('etcd', 'etcd')\n"
        "    etcd.call('start', program=shutil.which('etcd'))\n"
        "    print(etcd.pid, flush=True)\n"
        "    time.sleep(600)\n"
    )
    with tempfile.TemporaryDirectory() as folder:
        environment = {"PATH": "/usr/bin:/bin", "TMPDIR": folder}
        with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, env=environment) as bench:
            assert bench.stdout is not None
            role = psutil.Process(int(bench.stdout.readline()))
            (etcd,) = role.children()
            bench.kill()
        assert gone(etcd.pid)
        assert gone(role.pid)
        assert not list(Path(folder).glob("etha_ray_bench_etcd_*"))
