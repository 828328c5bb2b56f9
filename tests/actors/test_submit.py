"""The applications as Ray jobs, on a cluster of its own."""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from etha_ray.testing.calls import eventually
from tests.conftest import left_behind

from .application import ROOT, environment

RAY = str(Path(sys.executable).with_name("ray"))


pytestmark = pytest.mark.slow  # `make test-cluster` runs them, as they need a cluster of their own


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """The environment in which `ray job submit` reaches a head node of these tests' own."""
    tmp_path = tmp_path_factory.mktemp("cluster")
    token = tmp_path / "token"
    token.write_text(secrets.token_hex(32))
    token.chmod(0o600)
    dashboard, *ports = _free_ports(5)
    settings = environment() | {
        "PATH": f"{Path(RAY).parent}:{os.environ['PATH']}",  # the job's `python` is this one
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token),
        "RAY_ADDRESS": f"http://127.0.0.1:{dashboard}",
        "RAY_JOB_STOP_WAIT_TIME_S": "60",  # until a job that is told to end is killed; 3 are few on a busy machine
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


def ray_job(cluster: dict[str, str], *arguments: str, folder: Path = ROOT) -> str:
    """What `ray job` with these arguments prints; fails unless it ends well."""
    ended = subprocess.run(
        [RAY, "job", *arguments],
        cwd=folder,
        env=cluster,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=240,
        check=False,
    )
    assert ended.returncode == 0, ended.stdout
    return ended.stdout


def test_the_main_job_runs_as_a_ray_job(cluster: dict[str, str], tmp_path: Path) -> None:
    report = tmp_path / "report.html"
    job = ["python", "-m", "actors.weight_sync", "--steps", "4", "--sync-every", "2", "--report", str(report)]
    printed = ray_job(cluster, "submit", "--working-dir", ".", "--", *job)
    assert printed.count(", bit-exact") == 2
    assert report.stat().st_size > 10_000


WHERE = """
import etha_ray, ray, sys

def where():
    return etha_ray.__file__

ray.init(log_to_driver=False)
with etha_ray.launch_agents(["cpu"], namespace=sys.argv[1]) as pool:
    print("agents:", pool.ranks)
for place in (where(), ray.get(ray.remote(where).remote())):
    print("etha_ray is", place)
"""


@pytest.mark.parametrize("travels", [True, False], ids=["etha_ray travels in the working directory", "etha_ray is installed on the nodes"])
def test_a_job_has_its_etha_ray(cluster: dict[str, str], namespace: str, travels: bool, tmp_path: Path) -> None:
    (tmp_path / "where.py").write_text(WHERE)
    if travels:
        shutil.copytree(ROOT / "etha_ray", tmp_path / "etha_ray", ignore=shutil.ignore_patterns("__pycache__"))
    printed = ray_job(cluster, "submit", "--working-dir", ".", "--", "python", "where.py", namespace, folder=tmp_path)
    assert "agents: [0]" in printed
    places = re.findall(r"^etha_ray is (.*)$", printed, re.MULTILINE)
    assert len(places) == 2, "the driver's, a worker's"
    assert ["/working_dir_files/" in place for place in places] == [travels, travels]


@pytest.mark.parametrize(("headers", "status"), [({}, 401), ({"Authorization": "Bearer guessed"}, 403)], ids=["no token", "another"])
def test_without_the_token_nobody_sees_or_starts_jobs(cluster: dict[str, str], headers: dict[str, str], status: int) -> None:
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(urllib.request.Request(f"{cluster['RAY_ADDRESS']}/api/jobs/", headers=headers), timeout=30)
    assert refused.value.code == status
    refused.value.close()


def test_jobs_that_were_submitted_apart_find_each_other_by_name(cluster: dict[str, str], namespace: str) -> None:
    """One trains, one keeps agents, one generates, and goes on until the trainers leave. They wait for one another."""

    def submit(name: str, *arguments: str) -> str:
        start = ["submit", "--submission-id", f"{namespace}-{name}", "--working-dir", "."]
        if name != "generate":
            start.append("--no-wait")
        return ray_job(cluster, *start, "--", "python", "-u", "-m", f"actors.{name}", "--namespace", namespace, *arguments)

    def log(name: str) -> str:
        token = Path(cluster["RAY_AUTH_TOKEN_PATH"]).read_text()
        url = f"{cluster['RAY_ADDRESS']}/api/jobs/{namespace}-{name}/logs"  # what `ray job logs` asks, after three seconds
        with urllib.request.urlopen(urllib.request.Request(url, headers={"Authorization": f"Bearer {token}"}), timeout=30) as answer:
            return json.load(answer)["logs"]

    submit("train", "--trainers", "2", "--steps", "4", "--sync-every", "2")
    submit("agents", "--devices", "cpu,cpu,cpu")
    generated = submit("generate", "--generators", "2", "--replica", "mine")
    assert "The trainers have left." in generated
    eventually(lambda: log("train").count("\nVersion ") == 2)
    trained = log("train")
    pushed = re.findall(r"^Version (\d): train loss \S+, digest (\w+), to mine$", trained, re.MULTILINE)
    pulled = re.findall(r"^Version (\d): held-out loss [0-9.]+, digest (\w+)$", generated, re.MULTILINE)
    assert pushed == pulled, trained + generated
    assert [version for version, _ in pushed] == ["2", "4"]
    assert len({bits for _, bits in pushed}) == 2
    ray_job(cluster, "stop", f"{namespace}-agents")
    assert "Ended; no agent is left." in log("agents")
    assert left_behind(namespace) == []


def _free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0
