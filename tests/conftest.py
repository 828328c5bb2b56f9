"""Fixtures that several parts of the suite use."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, settings

from etha_ray.config import agent_paths
from etha_ray.tensor_bus.semaphores import queue_semaphore_name
from etha_ray.testing import plugin
from etha_ray.testing.etcd_server import EtcdServer, free_ports

if TYPE_CHECKING:
    from tests.kvstore.tcp_master import Master

# Torch and Ray look up the names of both ends of a connection: a resolver that loses questions must not cost 5 s for each of
# them. A process reads this at its first lookup, which importing Ray already makes.
os.environ.setdefault("RES_OPTIONS", "timeout:1")

# Ray has its workers give way to everything else on their host, so tests beside theirs that compute would keep them from starting.
os.environ.setdefault("RAY_worker_niceness", "0")

# A machine that stands still for a moment makes no example too slow: by default one that takes 200 ms is a failure.
settings.register_profile("unhurried", settings.default, deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("unhurried")


def pytest_configure(config: pytest.Config) -> None:
    """Workers of pytest-xdist that have a /tmp of their own (.ci/isolated) do not find there the folder that theirs is to be in.

    An editable install from before the plugin was there has no entry point for it; its code is here all the same.
    """
    if not config.pluginmanager.has_plugin("etha_ray"):
        config.pluginmanager.register(plugin, "etha_ray")
    if hasattr(config, "workerinput") and config.option.basetemp:
        Path(config.option.basetemp).parent.mkdir(parents=True, exist_ok=True)


@pytest.fixture
def own_etcd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EtcdServer]:
    """An etcd of this test's own, with ``kill()``, ``restart()``, ``pause()`` and ``resume()``."""
    server = EtcdServer(tmp_path_factory.mktemp("etcd"))
    server.restart()
    yield server
    server.stop()


@pytest.fixture
def master() -> Iterator[Master]:
    """A process of this test's own that serves a TCPStore."""
    from tests.kvstore.tcp_master import Master

    made = Master(free_ports(1)[0])
    made.start()
    yield made
    made.kill()


@pytest.fixture
def namespace() -> str:
    """A pool or store namespace that nobody else uses."""
    return f"test-{os.getpid()}-{uuid.uuid4().hex[:8]}"


def left_behind(namespace: str, pids: Iterable[int] = ()) -> list[str]:
    """What a pool left on this host: LMDB files of its folder, semaphores of its queues, and what ``pids`` have in /dev/shm."""
    folder = Path(agent_paths(0, namespace).state).parent
    found = [str(path) for path in folder.glob("*")]
    queues = {
        queue_semaphore_name(agent_paths(rank, namespace).command_queue, role).replace("/", "sem.")
        for rank in range(16)
        for role in ("items", "space")
    }
    for entry in Path("/dev/shm").iterdir():
        of_process = any(f"_{pid}_" in entry.name or f".{pid}." in entry.name for pid in pids)
        if entry.name in queues or of_process:
            found.append(str(entry))
    return found
