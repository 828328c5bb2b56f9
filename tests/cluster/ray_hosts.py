"""A Ray cluster of two hosts on one machine: the head here, another node over there, and a driver here.

The node over there has a network, a /dev/shm, a /tmp and process ids of its own. What a test wants done there, Ray must do.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import secrets
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from etha_ray.testing import eventually
from tests.net.namespaces import Cable, cable
from tests.tensor_bus.cluster import LONG

_ROOT = Path(__file__).parents[2]
_OWN_PROCESSES = ("unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc")
_OWN_MEMORY = 'mount --make-rprivate / && mount -t tmpfs tmpfs /dev/shm && mount -t tmpfs tmpfs /tmp && exec "$@"'
_START = (sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--disable-usage-stats")
# No port of another Ray on this machine is to be met: 0 has the system choose.
_SMALL = ("--num-cpus", "1", "--object-store-memory", "80000000", "--min-worker-port", "0", "--max-worker-port", "0")


@dataclass(frozen=True)
class RayHosts:
    """The cluster: what joins its hosts, a process that is connected to it, and the environment by which others connect."""

    cable: Cable
    driver: ProcessPoolExecutor
    environment: Mapping[str, str]

    def drive(self, function: Callable[..., None], *arguments: Any) -> None:
        """Call a function in the driver, with the ids of the nodes here and over there before its arguments."""
        self.driver.submit(_drive, function, self.cable, *arguments).result(8 * LONG)


def at(node: str) -> NodeAffinitySchedulingStrategy:
    """Place a task or an actor on this node."""
    return NodeAffinitySchedulingStrategy(node, soft=False)


def call(node: str, function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a function on a node."""
    return ray.get(_apply.options(scheduling_strategy=at(node)).remote(function, *arguments), timeout=2 * LONG)


@ray.remote(num_cpus=0, max_retries=0)
def _apply(function: Callable[..., Any], *arguments: Any) -> Any:
    return function(*arguments)


@contextlib.contextmanager
def ray_hosts() -> Iterator[RayHosts]:
    """Skips where the namespaces cannot be made."""
    with contextlib.ExitStack() as ending:
        wire = ending.enter_context(cable())
        over_there = (*wire.over_there, *_OWN_PROCESSES, "sh", "-c", _OWN_MEMORY, "sh")
        refused = subprocess.run([*over_there, "true"], capture_output=True, text=True, timeout=LONG, check=False)
        if refused.returncode:
            pytest.skip(f"processes cannot have a host of their own here: {refused.stderr.strip()}")
        # The paths of Ray's sockets, below this folder, must stay short.
        folder = ending.enter_context(tempfile.TemporaryDirectory(prefix="er", dir="/tmp", ignore_cleanup_errors=True))
        address = f"{wire.here}:{_free_port(wire.here)}"
        environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        environment |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32), "RAY_ADDRESS": address}
        head = ["--head", "--node-ip-address", wire.here, "--port", address.rpartition(":")[2], "--temp-dir", folder]
        head += ["--include-dashboard=false"]
        for service in ("ray-client-server", "dashboard-agent-listen"):
            head += [f"--{service}-port", str(_free_port(wire.here))]
        ending.enter_context(_running([*_START, *_SMALL, *head], environment))
        eventually(Path(folder, "ray_current_cluster").exists, 2 * LONG)
        node = [*over_there, *_START, *_SMALL, "--address", address, "--node-ip-address", wire.host]
        ending.enter_context(_running(node, environment))
        yield RayHosts(wire, ending.enter_context(_driver(environment)), environment)


@contextlib.contextmanager
def _driver(environment: Mapping[str, str]) -> Iterator[ProcessPoolExecutor]:
    """A process of its own, for Ray reads how to authenticate itself once for a process."""
    before = dict(os.environ)
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as driver:
        os.environ.clear()
        os.environ.update(environment)
        try:
            driver.submit(_connect).result(4 * LONG)
        finally:
            os.environ.clear()
            os.environ.update(before)
        try:
            yield driver
        finally:
            driver.submit(ray.shutdown)


def _connect() -> None:
    ray.init(log_to_driver=False, logging_level="error")
    eventually(lambda: len(_nodes()) == 2, 2 * LONG)


def _drive(function: Callable[..., None], wire: Cable, *arguments: Any) -> None:
    nodes = _nodes()
    function(nodes[wire.here], nodes[wire.host], *arguments)


def _nodes() -> dict[str, str]:
    """The ids of the nodes that live, by address."""
    return {node["NodeManagerAddress"]: node["NodeID"] for node in ray.nodes() if node["Alive"]}


def _free_port(host: str) -> int:
    with socket.create_server((host, 0)) as server:
        return int(server.getsockname()[1])


@contextlib.contextmanager
def _running(command: list[str], environment: Mapping[str, str]) -> Iterator[None]:
    """A Ray node, which is killed with everything that it started: asked to end, it would first drain itself for half a minute."""
    process = subprocess.Popen(command, cwd=_ROOT, env=environment)
    try:
        yield
    finally:
        family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
        for member in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                member.kill()
        psutil.wait_procs(family, timeout=LONG)
        process.wait(LONG)
