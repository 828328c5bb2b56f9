from __future__ import annotations

import os
from typing import Any

import pytest
import ray
import torch

import etha_ray
from etha_ray.config import worker_environment
from etha_ray.runtime import find_pool
from etha_ray.testing import RayUnderTest
from etha_ray.testing.rays import OPTIONS, running_ray
from tests.conftest import left_behind


@pytest.fixture(scope="module")
def ray_init_options() -> dict[str, Any]:
    return {**OPTIONS, "num_cpus": 3}


@ray.remote(num_cpus=0)
class Generator:
    def __init__(self) -> None:
        self.weights = {"w": torch.zeros(3)}
        self.receiver = etha_ray.pull(self.weights, "policy")

    def update(self) -> tuple[int, int, list[float]]:
        return os.getpid(), self.receiver.update(60.0), self.weights["w"].tolist()


def test_workers_find_the_agents_by_themselves(ray_cluster: RayUnderTest) -> None:
    assert not ray_cluster.local_mode
    with ray_cluster.launch_agents(2) as pool:
        assert (pool.namespace, pool.ranks) == (ray_cluster.namespace, [0, 1])
        assert find_pool().namespace == pool.namespace == worker_environment().namespace
        pids = [agent["pid"] for agent in pool.describe(60.0)]
        generator = Generator.remote()  # type: ignore[attr-defined]
        with etha_ray.publish({"w": torch.arange(3.0)}, "policy") as sender:
            updating = generator.update.remote()
            sender.push(timeout=60.0)
            pid, *rest = ray.get(updating, timeout=60)
        assert rest == [1, [0.0, 1.0, 2.0]]
        assert len({pid, os.getpid(), *pids}) == 4
    assert left_behind(pool.namespace, pids) == []


def test_options(ray_cluster: RayUnderTest) -> None:
    assert ray.cluster_resources()["CPU"] == 3


def test_a_second_ray_in_the_process_is_refused(ray_cluster: RayUnderTest) -> None:
    with pytest.raises(RuntimeError, match="either ray_local or ray_cluster"), running_ray(True, OPTIONS):
        pass
    assert ray.is_initialized()
