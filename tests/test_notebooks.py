"""The notebooks run from top to bottom, and are kept without outputs."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.tensor_bus.cluster import free_port

nbformat = pytest.importorskip("nbformat", reason="the notebooks need the test extra: pip install -e '.[test]'")
nbclient = pytest.importorskip("nbclient", reason="the notebooks need the test extra: pip install -e '.[test]'")

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
QUICKSTART = "01_quickstart.ipynb"
WITH_RAY = ("03_weight_sync.ipynb", "04_failures.ipynb")
"""Those that start a cluster of their own, and agents and workers in it: a minute each. `make test-slow` runs them."""


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels and Ray's workers import this checkout."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT) + os.pathsep + os.environ.get("PYTHONPATH", ""))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")


@pytest.fixture
def ray_client(environment: None) -> Iterator[str]:
    """A cluster that runs already, and the address at which a Ray Client reaches it."""
    port = free_port()
    folder = tempfile.mkdtemp(prefix="ray-", dir="/tmp")  # short, as it becomes part of sockets' names
    options = [f"--port={free_port()}", f"--ray-client-server-port={port}", f"--temp-dir={folder}", "--include-dashboard=false"]
    options += ["--num-cpus=2", "--object-store-memory=100000000", "--disable-usage-stats"]
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", *options]
    head = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 60
        while not _listens(port):
            assert head.poll() is None, "ray start ended"
            assert time.monotonic() < deadline, "nobody listens for Ray Clients"
            time.sleep(0.1)
        address = f"ray://127.0.0.1:{port}"
        assert any(_takes(address) for _ in range(5)), "the cluster takes no Ray Client"
        yield address
    finally:
        head.terminate()
        head.wait(30)
        shutil.rmtree(folder, ignore_errors=True)


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def _takes(address: str) -> bool:
    """Whether a Ray Client connects: while the cluster starts, its server for that may fail."""
    connect = "import ray, sys; ray.init(sys.argv[1]); ray.shutdown()"
    return subprocess.run([sys.executable, "-c", connect, address], capture_output=True, timeout=250).returncode == 0


def run(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    where = {"metadata": {"path": str(path.parent)}}
    nbclient.NotebookClient(notebook, timeout=250, kernel_name="python3", resources=where).execute()
    assert all(cell.get("execution_count") for cell in notebook.cells if cell.cell_type == "code")


def _named(name: str) -> object:
    return pytest.param(name, marks=pytest.mark.slow if name in WITH_RAY else [])


@pytest.mark.parametrize("name", [_named(path.name) for path in NOTEBOOKS if path.name != QUICKSTART])
def test_it_runs(name: str, environment: None) -> None:
    run(ROOT / "notebooks" / name)


@pytest.mark.slow  # another Ray of its own
def test_the_quick_start_runs_on_a_cluster_that_it_reaches_by_ray_client(ray_client: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", ray_client)  # without, it starts a Ray of its own, as the others do
    run(ROOT / "notebooks" / QUICKSTART)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_it_is_kept_without_outputs(path: Path) -> None:
    for cell in nbformat.read(path, as_version=4).cells:
        if cell.cell_type == "code":
            assert not cell.outputs
            assert cell.execution_count is None


def test_there_are_some() -> None:
    assert [path.name[:2] for path in NOTEBOOKS] == ["01", "02", "03", "04"]
