"""The application that keeps agents."""

from __future__ import annotations

import signal

import pytest
from ray.cluster_utils import Cluster
from typer.testing import CliRunner

import etha_ray
from actors import agents
from tests.conftest import left_behind

from .application import read_until
from .conftest import Start


def test_agents_serve_other_processes_until_they_are_told_to_end(start: Start, namespace: str, monkeypatch: pytest.MonkeyPatch) -> None:
    process = start("actors.agents", "--devices", "cpu,cpu", "--namespace", namespace)
    output = read_until(process, "Interrupt to end it")
    assert namespace in output
    monkeypatch.setenv("ETHA_RAY_NAMESPACE", namespace)
    for rank in (0, 1):
        monkeypatch.setenv("AGENT_RANK", str(rank))
        client, _ = etha_ray.bootstrap_client()
        client.ping()
        client.close()
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0, output
    assert left_behind(namespace, [process.pid]) == []


@pytest.mark.slow
def test_nodes_that_join_get_agents(start: Start, namespace: str) -> None:
    node = {"num_cpus": 1, "object_store_memory": 80_000_000}
    cluster = Cluster(initialize_head=True, head_node_args={**node, "include_dashboard": False})
    try:
        process = start("actors.agents", "--namespace", namespace, cluster=cluster.address)
        read_until(process, "Interrupt to end it")
        cluster.add_node(**node)
        assert "Agent 1 joins on " in read_until(process, "joins on")
        process.send_signal(signal.SIGTERM)
        output, _ = process.communicate(timeout=60)
        assert output.endswith("Ended; no agent is left.\n")  # a line that the signal interrupts may be there twice
        assert left_behind(namespace, [process.pid]) == []
    finally:
        cluster.shutdown()


def test_a_cluster_that_cannot_be_reached_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "http://127.0.0.1:8265")
    ended = CliRunner().invoke(agents.app)
    assert ended.exit_code == 2
    assert "RAY_ADDRESS=http://127.0.0.1:8265 is not the address of a Ray cluster" in ended.output
