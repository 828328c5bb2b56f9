"""The main job as a Ray job, on a cluster of its own."""

from __future__ import annotations

import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from .application import ROOT, environment

RAY = str(Path(sys.executable).with_name("ray"))


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[dict[str, str]]:
    """The environment in which `ray job submit` reaches a head node of this test's own."""
    token = tmp_path / "token"
    token.write_text(secrets.token_hex(32))
    token.chmod(0o600)
    dashboard, *ports = _free_ports(5)
    settings = environment() | {
        "PATH": f"{Path(RAY).parent}:{os.environ['PATH']}",  # the job's `python` is this one
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token),
        "RAY_ADDRESS": f"http://127.0.0.1:{dashboard}",
    }
    names = ("port", "ray-client-server-port", "dashboard-agent-listen-port", "dashboard-agent-grpc-port")
    options = [f"--{name}={port}" for name, port in zip(names, ports, strict=True)]
    # A folder of its own: in the default one Ray notes this cluster as the machine's, and a later ray.init would look for it.
    # The path is short, as it becomes part of sockets' names.
    folder = Path(tempfile.mkdtemp(prefix="ray-", dir="/tmp"))
    options += [
        f"--temp-dir={folder}",
        f"--dashboard-port={dashboard}",
        "--num-cpus=2",
        "--object-store-memory=100000000",
        "--disable-usage-stats",
    ]
    log = tmp_path / "head.log"
    with log.open("w") as output:
        head = subprocess.Popen([RAY, "start", "--head", "--block", *options], env=settings, stdout=output, stderr=subprocess.STDOUT)
    try:
        deadline = time.monotonic() + 60
        while not _listens(dashboard):
            assert head.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.2)
        yield settings
    finally:
        # Not `ray stop`, which would end every Ray of this machine.
        processes = psutil.Process(head.pid).children(recursive=True)
        head.terminate()
        head.wait(timeout=60)
        for process in psutil.wait_procs(processes, timeout=20)[1]:
            process.kill()
        shutil.rmtree(folder, ignore_errors=True)


@pytest.mark.timeout(300)
def test_the_main_job_runs_as_a_ray_job(cluster: dict[str, str], tmp_path: Path) -> None:
    report = tmp_path / "report.html"
    job = ["python", "-m", "actors.weight_sync", "--steps", "4", "--sync-every", "2", "--report", str(report)]
    ended = subprocess.run(
        [RAY, "job", "submit", "--working-dir", ".", "--", *job],
        cwd=ROOT,
        env=cluster,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=240,
        check=False,
    )
    assert ended.returncode == 0, ended.stdout
    assert ended.stdout.count(", bit-exact") == 2
    assert report.stat().st_size > 10_000


def _free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0
