"""Placing agents on a node that says it has GPUs. Ray believes it; no GPU is touched, as the tensors are on the CPU."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator

import pytest
import ray

import etha_ray
from etha_ray.testing import eventually
from etha_ray.testing.rays import start_ray


@pytest.fixture(scope="module", autouse=True)
def two_gpus() -> Iterator[None]:
    start_ray(num_cpus=8, num_gpus=2, log_to_driver=False, logging_level="error")
    yield
    ray.shutdown()


@ray.remote(num_cpus=0, num_gpus=1)
class GpuWorker:
    """Has one GPU, by Ray's count."""

    def find(self, namespace: str) -> tuple[list[int], int, str, str]:
        os.environ["ETHA_RAY_NAMESPACE"] = namespace
        client, info = etha_ray.bootstrap_client()
        client.close()
        return ray.get_gpu_ids(), info.agent_rank, info.device, info.method


def test_auto_gives_every_gpu_an_agent_that_its_workers_find() -> None:
    namespace = f"gpus-{uuid.uuid4().hex[:8]}"
    with etha_ray.launch_agents(namespace=namespace) as pool:
        agents = pool.describe(60)
        assert [(agent["rank"], agent["device"], agent["state"]) for agent in agents] == [
            (0, "cuda:0", "running"),
            (1, "cuda:1", "running"),
        ]
        eventually(lambda: ray.available_resources().get("GPU") == 2)  # the agents take no share
        workers = [GpuWorker.remote() for _ in range(2)]
        found = ray.get([worker.find.remote(namespace) for worker in workers])
    assert sorted(found) == [([0], 0, "cuda:0", "ray"), ([1], 1, "cuda:1", "ray")]
