from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

import etha_ray
from etha_ray.errors import AgentNotFoundError, EthaRayError
from etha_ray.testing import TensorBus, eventually, succeed, together
from tests.conftest import left_behind


def test_a_model_crosses_in_one_process(tensor_bus: TensorBus) -> None:
    sent, received = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)
    with etha_ray.publish(sent, "policy") as sender, etha_ray.pull(received, "policy", client=tensor_bus.client(1)) as receiver:
        push, version = succeed(lambda: sender.push(version=5), lambda: receiver.update(60.0))
    assert (push.version, version) == (5, 5)
    assert torch.equal(sent.weight, received.weight)


def test_workers_find_the_agent_they_are_to_find(tensor_bus: TensorBus) -> None:
    before = dict(os.environ)
    for rank in tensor_bus.ranks:
        with tensor_bus.worker(rank):
            client, info = etha_ray.bootstrap_client()
            client.close()
            assert (info.agent_rank, info.method) == (rank, "direct")
            assert info.command_queue_path == tensor_bus.paths[rank].command_queue
    assert dict(os.environ) == before
    client, info = etha_ray.bootstrap_client()
    client.close()
    assert info.agent_rank == 0


def test_other_processes_are_workers_too(tensor_bus: TensorBus) -> None:
    script = """
        import torch, etha_ray
        weights = {"w": torch.zeros(4)}
        with etha_ray.pull(weights, "policy") as receiver:
            print(receiver.update(60.0), weights["w"].tolist())
        client, info = etha_ray.bootstrap_client()
        print(info.agent_rank)
        client.close()
    """
    command = [sys.executable, "-c", textwrap.dedent(script)]
    worker = subprocess.Popen(command, env=tensor_bus.environment(1), stdout=subprocess.PIPE, text=True)
    with worker, etha_ray.publish({"w": torch.arange(4.0)}, "policy") as sender:
        sender.push(timeout=60.0)
        printed, _ = worker.communicate(timeout=60)
    assert printed.splitlines() == ["1 [0.0, 1.0, 2.0, 3.0]", "1"]


def test_torchrun_says_which_agent(tensor_bus: TensorBus, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where no rank is given, the launcher's count."""
    environment = tensor_bus.environment()
    assert "AGENT_RANK" in os.environ
    assert "AGENT_RANK" not in environment
    monkeypatch.setattr(os, "environ", {**environment, "LOCAL_RANK": "1"})
    client, info = etha_ray.bootstrap_client()
    client.close()
    assert (info.agent_rank, info.method) == (1, "offset")


@pytest.mark.parametrize("tensor_bus", [3], indirect=True)
def test_another_number_of_agents(tensor_bus: TensorBus) -> None:
    assert tensor_bus.ranks == [0, 1, 2]
    assert [tensor_bus.client(rank).agent_rank for rank in tensor_bus.ranks] == [0, 1, 2]


def test_an_agent_that_ends_is_noticed_and_may_come_again(tensor_bus: TensorBus) -> None:
    client = tensor_bus.client(1)
    tensor_bus.agents[1].stop()
    with pytest.raises(ConnectionError, match="agent 1"):
        client.init_pair("p", "a", "b", 1, timeout=10.0)
    with pytest.raises(AgentNotFoundError), tensor_bus.worker(1):
        etha_ray.bootstrap_client(connection_timeout=0.1)
    tensor_bus.agents[1] = tensor_bus.start_agent(1)
    assert tensor_bus.client(1).agent_rank == 1


def test_its_end_leaves_nothing() -> None:
    with TensorBus(1) as bus:
        client = bus.client()
        folder = Path(bus.paths[0].state).parent
        assert folder.exists()
    assert left_behind(bus.namespace, [os.getpid()]) == []
    assert not folder.exists()
    with pytest.raises(EthaRayError):
        client.init_pair("p", "a", "b", 1, timeout=5.0)


def test_calls() -> None:
    def fail() -> None:
        raise KeyError("first")

    assert succeed(lambda: 1, lambda: 2) == [1, 2]
    one, error = together(lambda: 1, fail)
    assert one == 1
    assert isinstance(error, KeyError)
    with pytest.raises(KeyError, match="first"):
        succeed(lambda: 1, fail)
    turns = iter([0, 0, "yes"])
    eventually(lambda: next(turns))
    with pytest.raises(TimeoutError, match=r"within 0\.01 s"):
        eventually(lambda: False, timeout=0.01)
