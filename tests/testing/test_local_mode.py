"""Agents and workers on `ray_local`: in one process with ray==2.52.1 (`make test-local-mode`), in several with newer ones."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from torch.distributed.tensor import Shard

import etha_ray
from etha_ray.config import agent_paths
from etha_ray.errors import AgentBusyError, PairTimeoutError
from etha_ray.kvstore.gcs import in_local_mode
from etha_ray.runtime import find_pool, seen_agents
from etha_ray.tensor_bus import connection
from etha_ray.testing import RayUnderTest, TensorBus, eventually

pytestmark = pytest.mark.local_mode


@ray.remote(num_cpus=0)
class Worker:
    """One rank of a side of 2. No call of it waits for another worker, so it runs in local_mode, too."""

    def __init__(self, side: str, other: str, rank: int, shape: tuple[int, int], dim: int) -> None:
        self.tensor = torch.full(shape, float(rank))
        self.client, self.info = etha_ray.bootstrap_client()
        spec = etha_ray.MeshSpec((2,), (rank,))
        self.client.init_pair("weights", side, other, 2, spec, [Shard(dim)], blocking=False)
        self.batch = self.client.register_tensors("policy", [(self.tensor, "weights")], blocking=False)

    def where(self) -> tuple[int, int, str]:
        return os.getpid(), self.info.agent_rank, self.info.method

    def start(self, direction: Any) -> None:
        self.outcome: Any = self.batch.transfer(direction)

    def bytes(self) -> int:
        return int(self.outcome.result(60.0).bytes)

    def read(self) -> torch.Tensor:
        return self.tensor.clone()

    def close(self) -> None:
        self.client.close()


@ray.remote(num_cpus=0)
class Trainer:
    def __init__(self) -> None:
        self.model = torch.nn.Linear(4, 6)
        self.sender = etha_ray.publish(self.model, "policy")

    def push(self, step: int) -> torch.Tensor:
        with torch.no_grad():
            self.model.weight.fill_(step)
        self.pushed = self.sender.start_push(version=step, timeout=60.0)
        return self.model.bias.detach().clone()

    def pushed_version(self) -> int:
        return self.pushed.result(60.0).version

    def close(self) -> None:
        self.sender.close()


@ray.remote(num_cpus=0)
class Generator:
    def __init__(self) -> None:
        self.weights = {"weight": torch.zeros(6, 4), "bias": torch.zeros(6)}
        self.receiver = etha_ray.pull(self.weights, "policy")

    def update(self) -> tuple[int, float, torch.Tensor]:
        return self.receiver.update(60.0), self.weights["weight"].mean().item(), self.weights["bias"].clone()

    def close(self) -> None:
        self.receiver.close()


@pytest.fixture
def local_mode(ray_local: RayUnderTest) -> None:
    """For what only happens there; on clusters it is tests/test_runtime.py's."""
    if not ray_local.local_mode:
        pytest.skip(f"Ray {ray.__version__} has no local_mode")


@pytest.fixture(scope="module")
def pool(ray_local: RayUnderTest) -> Iterator[etha_ray.AgentPool]:
    with ray_local.launch_agents(2) as pool:
        yield pool


def test_local_mode_is_there_up_to_ray_2_52(ray_local: RayUnderTest) -> None:
    there = tuple(map(int, ray.__version__.split(".")[:2])) <= (2, 52)
    assert ray_local.local_mode == in_local_mode() == there


def test_tensors_cross_between_actors(pool: etha_ray.AgentPool, ray_local: RayUnderTest) -> None:
    trainers = [Worker.remote("trainer", "generator", rank, (2, 6), 0) for rank in range(2)]  # type: ignore[attr-defined]
    generators = [Worker.remote("generator", "trainer", rank, (4, 3), 1) for rank in range(2)]  # type: ignore[attr-defined]
    workers = [*trainers, *generators]
    pids, ranks, methods = zip(*ray.get([worker.where.remote() for worker in workers], timeout=60), strict=True)
    assert (sorted(ranks), set(methods)) == ([0, 0, 1, 1], {"ray"})
    assert set(pids) == {os.getpid()} if ray_local.local_mode else os.getpid() not in pids
    for _ in range(2):
        ray.get([worker.start.remote("send") for worker in trainers] + [worker.start.remote("recv") for worker in generators], timeout=60)
        assert ray.get([worker.bytes.remote() for worker in workers], timeout=60) == [48] * 4
    parts = ray.get([worker.read.remote() for worker in generators], timeout=60)
    assert torch.cat(parts, dim=1).tolist() == [[0.0] * 6] * 2 + [[1.0] * 6] * 2
    assert sum(agent["workers"] for agent in pool.describe(60.0)) == 4
    ray.get([worker.close.remote() for worker in workers], timeout=60)


def test_weights_cross_between_actors(pool: etha_ray.AgentPool) -> None:
    trainer, generators = Trainer.remote(), [Generator.remote()]  # type: ignore[attr-defined]
    for step in (1, 2):
        bias = ray.get(trainer.push.remote(step), timeout=60)
        for version, mean, got in ray.get([generator.update.remote() for generator in generators], timeout=60):
            assert (version, mean) == (step, step)
            assert torch.equal(got, bias)
        assert ray.get(trainer.pushed_version.remote(), timeout=60) == step
    ray.get([actor.close.remote() for actor in (trainer, *generators)], timeout=60)


def test_weights_cross_between_driver_and_actor(pool: etha_ray.AgentPool) -> None:
    model = torch.nn.Linear(4, 6)
    with etha_ray.publish(model, "policy") as sender:
        generator = Generator.remote()  # type: ignore[attr-defined]
        pushing = sender.start_push(timeout=60.0)
        version, _, bias = ray.get(generator.update.remote(), timeout=60)
        assert pushing.result(60.0).version == version == 1
        assert torch.equal(bias, model.bias)
        ray.get(generator.close.remote(), timeout=60)


def test_the_agents_are_found_seen_and_refused_a_second_time(pool: etha_ray.AgentPool, ray_local: RayUnderTest) -> None:
    described = find_pool().describe(60.0)
    assert [(agent["rank"], agent["state"], agent["device"]) for agent in described] == [(0, "running", "cpu"), (1, "running", "cpu")]
    assert ({agent["pid"] for agent in described} == {os.getpid()}) == ray_local.local_mode
    assert [(seen.rank, seen.life) for seen in seen_agents(pool.namespace)] == [(0, "running"), (1, "running")]
    with pytest.raises(AgentBusyError, match="runs already"):
        ray_local.launch_agents(1)


@pytest.mark.usefixtures("local_mode")
def test_an_agent_that_cannot_start_is_an_error(tensor_bus: TensorBus) -> None:
    with pytest.raises(AgentBusyError, match="already serves"):
        etha_ray.launch_agents(["cpu"], namespace=tensor_bus.namespace)
    assert [agent.running for agent in tensor_bus.agents.values()] == [True, True]


@pytest.mark.usefixtures("local_mode")
def test_agents_leave_nothing_and_disturb_nothing(namespace: str) -> None:
    """They are threads of the test's process, whose settings are its own."""
    before = torch.get_num_threads(), threads_of_ours()
    for _ in range(2):
        with etha_ray.launch_agents(["cpu"], namespace=namespace) as pool:
            assert [agent["pid"] for agent in pool.describe(60.0)] == [os.getpid()]
            assert torch.get_num_threads() == before[0]
            assert threads_of_ours() - before[1]  # those of an earlier pool may still be ending
    assert not Path(agent_paths(0, namespace).state).parent.exists()
    eventually(lambda: threads_of_ours() <= before[1])


def threads_of_ours() -> set[threading.Thread]:
    return {thread for thread in threading.enumerate() if thread.name.startswith("etha-ray")}


@pytest.mark.usefixtures("local_mode", "pool")
def test_a_blocking_call_that_waits_for_an_actor_not_yet_called_ends_with_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "_GRACE", 60.0)
    client = etha_ray.bootstrap_client()[0]
    with pytest.raises(PairTimeoutError, match="'b'"):
        client.init_pair("pair", "a", "b", 1, timeout=0.2)
    client.close()
