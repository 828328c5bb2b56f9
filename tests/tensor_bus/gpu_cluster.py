"""Agents on GPUs that are threads of the test's process."""

from __future__ import annotations

from etha_ray.tensor_bus.agent import TensorBusAgent
from etha_ray.transport.base import OneSidedTransport
from tests.tensor_bus.cluster import LocalCluster


class GpuCluster(LocalCluster):
    """Agents on the GPUs that this process calls by their ranks. ``mapped``: what moves bytes, instead of what suits a GPU."""

    def start_agent(self, rank: int, mapped: OneSidedTransport | None = None, threads: int = 1) -> TensorBusAgent:
        agent = TensorBusAgent(rank, self.store, paths=self.paths[rank], device=f"cuda:{rank}", threads=threads, mapped=mapped)
        agent.start()
        return agent
