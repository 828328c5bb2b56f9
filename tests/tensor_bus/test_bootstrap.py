"""How a worker finds its agent."""

from __future__ import annotations

import os

import pytest

from etha_ray.config import agent_paths
from etha_ray.tensor_bus import bootstrap, bootstrap_client
from etha_ray.tensor_bus.bootstrap import BootstrapInfo, setup_ptrace
from tests.tensor_bus.cluster import LocalCluster, local_cluster

VARIABLES = [
    "AGENT_RANK",
    "AGENT_RANK_OFFSET",
    "LOCAL_RANK",
    "RANK",
    "ETHA_RAY_NAMESPACE",
    "TENSOR_BUS_COMMAND_QUEUE_PATH",
    "TENSOR_BUS_STATE_PATH",
]


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


def find(cluster: LocalCluster, **more: float) -> BootstrapInfo:
    def name(rank: int) -> tuple[str, str]:
        paths = cluster.paths.get(rank, agent_paths(rank, "nobody"))
        return paths.command_queue, paths.state

    client, info = bootstrap_client(name, **more)
    assert client.agent_rank == info.agent_rank
    client.ping()
    client.close()
    return info


def test_direct(environment: pytest.MonkeyPatch) -> None:
    environment.setenv("AGENT_RANK", "1")
    environment.setenv("LOCAL_RANK", "0")
    environment.setenv("AGENT_RANK_OFFSET", "7")
    environment.setenv("RANK", "5")
    with local_cluster() as cluster:
        paths = cluster.paths[1]
        info = find(cluster)
        assert info == BootstrapInfo(1, 5, None, paths.command_queue, paths.state, "direct", "cpu", tracers=info.tracers)


def test_offset(environment: pytest.MonkeyPatch) -> None:
    with local_cluster(3) as cluster:
        environment.setenv("LOCAL_RANK", "1")
        info = find(cluster)
        assert (info.agent_rank, info.rank_offset, info.method, info.global_rank) == (1, 0, "offset", 0)
        environment.setenv("AGENT_RANK_OFFSET", "1")
        info = find(cluster)
        assert (info.agent_rank, info.rank_offset, info.method) == (2, 1, "offset")


def test_neither() -> None:
    with pytest.raises(ValueError, match=r"set AGENT_RANK, or LOCAL_RANK.*AGENT_RANK_OFFSET.*launch_agents"):
        bootstrap_client()


@pytest.mark.parametrize(("name", "value"), [("AGENT_RANK", "first"), ("LOCAL_RANK", "0.5"), ("AGENT_RANK", "-1")])
def test_ranks_that_are_none(environment: pytest.MonkeyPatch, name: str, value: str) -> None:
    environment.setenv(name, value)
    with pytest.raises(ValueError, match=value):
        bootstrap_client(connection_timeout=0.1)


def test_no_agent(environment: pytest.MonkeyPatch) -> None:
    environment.setenv("AGENT_RANK", "3")
    environment.setenv("ETHA_RAY_NAMESPACE", f"nobody-{os.getpid()}")
    paths = agent_paths(3, f"nobody-{os.getpid()}")
    with pytest.raises(ConnectionError) as caught:
        bootstrap_client(connection_timeout=0.1)
    assert paths.state in str(caught.value)
    assert paths.command_queue in str(caught.value)
    assert "Start one" in str(caught.value)


def test_paths_in_the_environment(environment: pytest.MonkeyPatch) -> None:
    with local_cluster() as cluster:
        environment.setenv("AGENT_RANK", "1")
        environment.setenv("TENSOR_BUS_COMMAND_QUEUE_PATH", cluster.paths[1].command_queue)
        environment.setenv("TENSOR_BUS_STATE_PATH", cluster.paths[1].state)
        client, info = bootstrap_client()
        assert (info.command_queue_path, info.state_path) == (cluster.paths[1].command_queue, cluster.paths[1].state)
        client.close()


def test_its_agent_alone_may_trace_a_worker(environment: pytest.MonkeyPatch) -> None:
    environment.setattr(bootstrap, "permit_tracing", lambda pid: f"process {pid}")
    environment.setenv("AGENT_RANK", "0")
    with local_cluster(1) as cluster:
        assert find(cluster).tracers == f"process {os.getpid()}"


def test_ptrace() -> None:
    assert setup_ptrace() in ("every process of this user", "nobody else")
    assert setup_ptrace(os.getpid()) in ("every process of this user", "nobody else")  # as everybody has been permitted
