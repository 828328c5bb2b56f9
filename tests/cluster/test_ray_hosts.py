"""A pool on a Ray cluster of two hosts that share no memory: one agent per node, transfers both ways, and the death of one of them."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import ray
import torch

import etha_ray
from etha_ray.testing import eventually
from tests.cluster.ray_hosts import RayHosts, at, call, ray_hosts
from tests.conftest import left_behind
from tests.tensor_bus.cluster import LONG

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.executable.startswith("/tmp/"), reason="the node over there has a /tmp of its own, and this Python is in /tmp"),
]

SHAPES = [((300, 501), torch.float32), ((1000,), torch.bfloat16), ((7, 11, 13), torch.int64), ((), torch.float64)]


@pytest.fixture(scope="module")
def hosts() -> Iterator[RayHosts]:
    with ray_hosts() as hosts:
        yield hosts


@ray.remote(num_cpus=0)
class Worker:
    """One side of a pair of 1 x 1, with the agent of its node."""

    def __init__(self, namespace: str) -> None:
        os.environ["ETHA_RAY_NAMESPACE"] = namespace
        self.tensors = [torch.empty(shape, dtype=dtype) for shape, dtype in SHAPES]
        self.client: etha_ray.TensorBusClient | None = None

    def join(self, local: str, remote: str) -> tuple[int, str]:
        """Register with a new client; the agent's rank, and how it was found."""
        if self.client is not None:
            self.client.close()
        self.client, info = etha_ray.bootstrap_client(connection_timeout=2 * LONG)
        self.client.init_pair("pair", local, remote, 1, timeout=2 * LONG)
        self.handle = self.client.register_tensors("batch", [(tensor, "pair") for tensor in self.tensors], timeout=2 * LONG)
        return info.agent_rank, info.method

    def fill(self, seed: int) -> None:
        for tensor, bits in zip(self.tensors, _bits(seed), strict=True):
            tensor.copy_(bits.view(tensor.dtype).view(tensor.shape))

    def holds(self, seed: int) -> bool:
        return all(torch.equal(tensor.view(-1).view(torch.uint8), bits) for tensor, bits in zip(self.tensors, _bits(seed), strict=True))

    def start(self, direction: Any) -> None:
        self.moving = self.handle.transfer(direction, timeout=LONG)

    def finish(self) -> int:
        return self.moving.result(2 * LONG).bytes


def _bits(seed: int) -> list[torch.Tensor]:
    """Any bits at all, among them those of NaNs and infinities."""
    generator = torch.Generator().manual_seed(seed)
    sizes = [torch.Size(shape).numel() * dtype.itemsize for shape, dtype in SHAPES]
    return [torch.randint(0, 256, (size,), dtype=torch.uint8, generator=generator) for size in sizes]


def test_tensors_cross_between_nodes_and_an_agent_that_dies_is_replaced(hosts: RayHosts, namespace: str) -> None:
    hosts.drive(_cross_and_kill, namespace)


def test_the_main_job_runs_over_both(hosts: RayHosts) -> None:
    job = [sys.executable, "-m", "actors.weight_sync", "--steps", "4", "--sync-every", "2"]
    done = subprocess.run(job, env=hosts.environment, capture_output=True, text=True, timeout=8 * LONG, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Trainers on 1, generators on 1 of 2 nodes" in done.stdout
    assert len(re.findall(r"^Version \d: .*, bit-exact$", done.stdout, re.MULTILINE)) == 2


def _cross_and_kill(near: str, far: str, namespace: str) -> None:
    pool = etha_ray.launch_agents("auto", namespace=namespace)
    agents = {agent["node_id"]: agent for agent in pool.describe(60.0)}
    assert {(node, agent["device"], agent["state"]) for node, agent in agents.items()} == {
        (near, "cpu", "running"),
        (far, "cpu", "running"),
    }
    assert len(pool.ranks) == 2
    here, there = (Worker.options(scheduling_strategy=at(node)).remote(namespace) for node in (near, far))
    _meet(here, there, agents[near], agents[far])
    for step in range(3):
        _cross(here, there, 2 * step)
        _cross(there, here, 2 * step + 1)

    victim = agents[far]["pid"]
    _both(here.fill.remote(99), there.fill.remote(98))
    ray.get(here.start.remote("send"), timeout=LONG)
    call(far, os.kill, victim, signal.SIGKILL)
    ray.get(there.start.remote("recv"), timeout=LONG)
    size = sum(len(bits) for bits in _bits(99))
    assert _both(here.finish.remote(), there.finish.remote()) == [size, size]  # the next agent took up what that one served
    assert ray.get(there.holds.remote(99), timeout=LONG)
    _cross(here, there, 100)
    _cross(there, here, 101)
    eventually(lambda: all(agent["state"] == "running" for agent in pool.describe(60.0)))
    successor = next(agent["pid"] for agent in pool.describe(60.0) if agent["node_id"] == far)
    assert successor != victim

    both = (near, [agents[near]["pid"]]), (far, [victim, successor])
    assert all(call(node, left_behind, namespace, pids) for node, pids in both)
    for worker in (here, there):
        ray.kill(worker)
    pool.shutdown()
    assert [call(node, left_behind, namespace, pids) for node, pids in both] == [[], []]


def _both(near: Any, far: Any) -> list[Any]:
    return ray.get([near, far], timeout=4 * LONG)


def _meet(here: Any, there: Any, agent_here: dict[str, Any], agent_there: dict[str, Any]) -> None:
    """Have both register, each with the agent of its node."""
    found = _both(here.join.remote("a", "b"), there.join.remote("b", "a"))
    assert found == [(agent_here["rank"], "ray"), (agent_there["rank"], "ray")]


def _cross(source: Any, target: Any, seed: int) -> None:
    """Move tensors from one worker to the other, and compare every bit."""
    _both(source.fill.remote(seed), target.fill.remote(seed + 1000))
    _both(source.start.remote("send"), target.start.remote("recv"))
    size = sum(len(bits) for bits in _bits(seed))
    assert _both(source.finish.remote(), target.finish.remote()) == [size, size]
    assert _both(source.holds.remote(seed), target.holds.remote(seed)) == [True, True]
