"""etha_ray moves tensors between two groups of processes, from any device mesh and placement to any other.

Start with `launch_agents`, then `publish` and `pull` for whole models, or `bootstrap_client` in each worker.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from etha_ray.explanation import explain
    from etha_ray.kvstore import create_store
    from etha_ray.layout import MeshSpec
    from etha_ray.replica import Replica
    from etha_ray.report import TransferReport
    from etha_ray.runtime import AgentPool, launch_agents
    from etha_ray.tensor_bus.bootstrap import BootstrapInfo, bootstrap_client
    from etha_ray.tensor_bus.client import BatchHandler, TensorBusClient
    from etha_ray.tensor_bus.tensors import Piece
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


_MODULES = {
    "AgentPool": "runtime",
    "BatchHandler": "tensor_bus.client",
    "BootstrapInfo": "tensor_bus.bootstrap",
    "MeshSpec": "layout",
    "Piece": "tensor_bus.tensors",
    "Replica": "replica",
    "TensorBusClient": "tensor_bus.client",
    "TransferReport": "report",
    "bootstrap_client": "tensor_bus.bootstrap",
    "create_store": "kvstore",
    "explain": "explanation",
    "launch_agents": "runtime",
    "publish": "weights",
    "pull": "weights",
}


def __getattr__(name: str) -> object:
    """Import what is asked for when it is: pytest loads this package for its plugin, and must not load torch and Ray with it."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
