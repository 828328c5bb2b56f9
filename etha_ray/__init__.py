"""etha_ray moves tensors between two groups of processes, from any device mesh and placement to any other.

Start with `launch_agents`, then `publish` and `pull` for whole models, or `bootstrap_client` in each worker.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from etha_ray.explanation import explain
from etha_ray.kvstore import create_store
from etha_ray.layout import MeshSpec
from etha_ray.replica import Replica
from etha_ray.report import TransferReport
from etha_ray.tensor_bus.bootstrap import BootstrapInfo, bootstrap_client
from etha_ray.tensor_bus.client import BatchHandler, TensorBusClient
from etha_ray.tensor_bus.tensors import Piece

if TYPE_CHECKING:
    from etha_ray.runtime import AgentPool, launch_agents
    from etha_ray.weights import publish, pull

__version__ = "0.1.0"

__all__ = [
    "AgentPool",
    "BatchHandler",
    "BootstrapInfo",
    "MeshSpec",
    "Piece",
    "Replica",
    "TensorBusClient",
    "TransferReport",
    "bootstrap_client",
    "create_store",
    "explain",
    "launch_agents",
    "publish",
    "pull",
]


def __getattr__(name: str) -> Any:
    if name in ("AgentPool", "launch_agents"):  # these need Ray, which the engine does not
        from etha_ray import runtime

        return getattr(runtime, name)
    if name in ("publish", "pull"):
        from etha_ray import weights

        return getattr(weights, name)
    raise AttributeError(f"module 'etha_ray' has no attribute {name!r}")
