"""Agents on a cluster of several nodes, which Ray simulates on this machine, and on nodes that join later."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from typing import Any

import pytest
import ray
import torch
from ray.cluster_utils import Cluster
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

import etha_ray
from etha_ray.agent_actor import find_actor
from etha_ray.errors import AgentBusyError, AgentNotFoundError
from etha_ray.runtime import find_pool
from etha_ray.testing.calls import eventually
from tests.conftest import left_behind

pytestmark = pytest.mark.slow  # four raylets, and ten processes of their own

NODE = {"num_cpus": 1, "object_store_memory": 80_000_000}


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    """A head without GPUs, and a node that says it has two, which nobody touches."""
    cluster = Cluster(initialize_head=True, head_node_args={**NODE, "include_dashboard": False})
    try:
        cluster.add_node(**NODE, num_gpus=2)
        ray.init(address=cluster.address, log_to_driver=False, logging_level="error")
        cluster.wait_for_nodes()
        yield cluster
    finally:
        ray.shutdown()
        cluster.shutdown()


@ray.remote(num_cpus=0)
class Worker:
    """One side of a pair of 1 x 1, with the agent that serves its node."""

    def ready(self) -> None:
        """It is there."""

    def join(self, namespace: str, pair: str, local: str, remote: str, value: float) -> int:
        os.environ["ETHA_RAY_NAMESPACE"] = namespace
        self.tensor = torch.full((4,), value)
        self.client, info = etha_ray.bootstrap_client()
        self.client.init_pair(pair, local, remote, 1, timeout=60)
        self.handle = self.client.register_tensors(pair, [(self.tensor, pair)], timeout=60)
        return info.agent_rank

    def transfer(self, direction: Any) -> float:
        self.handle.transfer(direction, blocking=True, timeout=60).result()
        return self.tensor.sum().item()

    def close(self) -> None:
        self.client.close()


def worker_on(node_id: str) -> Any:
    return Worker.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node_id, soft=False)).remote()


def meet(namespace: str, pair: str, here: Any, there: Any, value: float) -> list[int]:
    """Have two workers register a tensor of this value and one of zeros; their agents."""
    return ray.get([here.join.remote(namespace, pair, "a", "b", value), there.join.remote(namespace, pair, "b", "a", 0.0)], timeout=120)


def cross(here: Any, there: Any) -> float:
    """Move the tensor; the sum of what arrived."""
    return ray.get([here.transfer.remote("send"), there.transfer.remote("recv")], timeout=120)[1]


def where(pool: etha_ray.AgentPool) -> dict[int, tuple[str, str, int]]:
    """Node, device and pid of each agent, by rank; all run."""
    described = pool.describe(60)
    assert {agent["state"] for agent in described} == {"running"}
    return {agent["rank"]: (agent["node_id"], agent["device"], agent["pid"]) for agent in described}


def test_nodes_that_join_get_agents_and_the_others_go_on(cluster: Cluster) -> None:
    namespace = f"nodes-{uuid.uuid4().hex[:8]}"
    pool = etha_ray.launch_agents("auto", namespace=namespace)
    agents = where(pool)
    head = ray.get_runtime_context().get_node_id()
    devices = [(node == head, device) for _, (node, device, _) in sorted(agents.items())]
    on_gpus = [(False, "cuda:0"), (False, "cuda:1")]
    assert devices in ([(True, "cpu"), *on_gpus], [*on_gpus, (True, "cpu")]), "by node, then device"
    of_head = next(rank for rank, (node, _, _) in agents.items() if node == head)
    elsewhere = next(node for node, _, _ in agents.values() if node != head)
    old = worker_on(head), worker_on(elsewhere)
    assert meet(namespace, "before", *old, 1.0)[0] == of_head
    assert cross(*old) == 4
    another_s = find_pool(namespace)
    assert pool.refresh() == []

    joined = cluster.add_node(**NODE).node_id
    cluster.wait_for_nodes()
    rival = Worker.options(name=f"{namespace}/agent3", namespace="etha_ray").remote()
    ray.get(rival.ready.remote(), timeout=60)
    with pytest.raises(AgentBusyError, match="by somebody else"):
        pool.refresh()
    assert where(pool) == agents
    ray.kill(rival)
    eventually(lambda: find_actor(namespace, 3) is None)
    assert pool.refresh() == [3]
    now = where(pool)
    assert now.pop(3)[:2] == (joined, "cpu")
    assert now == agents, "nobody was started anew"
    assert cross(*old) == 4
    new = worker_on(head), worker_on(joined)
    assert meet(namespace, "after", *new, 2.0) == [of_head, 3]
    assert cross(*new) == 8

    assert pool.refresh() == another_s.refresh() == []
    assert another_s.ranks == find_pool(namespace).ranks == [0, 1, 2, 3]
    pids = [pid for _, _, pid in where(another_s).values()]
    ray.get([worker.close.remote() for worker in (*old, *new)])
    another_s.shutdown()
    assert left_behind(namespace, pids) == []
    with pytest.raises(AgentNotFoundError, match="was shut down"):
        pool.refresh()

    with etha_ray.launch_agents(["cpu"], namespace=namespace) as of_one_node:
        assert of_one_node.refresh() == [], "only pools for all nodes grow"
