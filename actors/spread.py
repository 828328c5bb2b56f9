"""On which nodes of a cluster, and on which devices, trainers and generators sit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ray

from actors.sharding import Side
from actors.worker import Seat


@dataclass(frozen=True)
class Spread:
    """The node of each worker, trainers first, and the devices of the agents on each node.

    With GPUs the agent of a worker is that of the GPU which Ray gives it; without, workers have the agents in their order.
    """

    nodes: tuple[str, ...]
    devices: Mapping[str, list[str]]
    gpus: bool

    def seats(self, side: Side, first: int, ranks: int, namespace: str) -> list[Seat]:
        """The seats of a side whose first worker is `first`."""
        agents = [None if self.gpus else first + rank for rank in range(ranks)]
        return [Seat(side, rank, ranks, self.nodes[first + rank], agents[rank], namespace, self.gpus) for rank in range(ranks)]


def spread(workers: int) -> Spread:
    """`spread_over` the cluster that this process is connected to."""
    nodes: list[dict[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call]
    return spread_over(nodes, ray.get_runtime_context().get_node_id(), workers)


def spread_over(nodes: Sequence[Mapping[str, Any]], here: str, workers: int) -> Spread:
    """Neighbours in rank are on one node, or on the next one, beginning with `here`; `nodes` as `ray.nodes()` has them.

    If the cluster has as many GPUs as there are workers, its nodes are filled, a GPU a worker; else all nodes that have CPUs get as
    many workers.
    """
    alive = sorted((node for node in nodes if node["Alive"]), key=lambda node: (node["NodeID"] != here, node["NodeManagerAddress"]))
    gpus = {node["NodeID"]: int(node["Resources"].get("GPU", 0)) for node in alive}
    slots = [node_id for node_id, count in gpus.items() for _ in range(count)]
    if len(slots) >= workers:
        filled = slots[:workers]
        return Spread(tuple(filled), {node: [f"cuda:{index}" for index in range(gpus[node])] for node in filled}, True)
    able = [node["NodeID"] for node in alive if node["Resources"].get("CPU")] or [here]
    shared = [able[worker * len(able) // workers] for worker in range(workers)]
    return Spread(tuple(shared), {node: ["cpu"] * shared.count(node) for node in shared}, False)
