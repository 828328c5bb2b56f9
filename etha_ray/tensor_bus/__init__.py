"""The bus between workers and agents."""

from etha_ray.tensor_bus.bootstrap import BootstrapInfo, bootstrap_client
from etha_ray.tensor_bus.client import BatchHandler, TensorBusClient
from etha_ray.tensor_bus.command_queue import CommandQueue
from etha_ray.tensor_bus.commands import CleanupBatch, InitPair, QueryStatus, RegisterTensors, Transfer
from etha_ray.tensor_bus.messages import Message

__all__ = [
    "BatchHandler",
    "BootstrapInfo",
    "CleanupBatch",
    "CommandQueue",
    "InitPair",
    "Message",
    "QueryStatus",
    "RegisterTensors",
    "TensorBusClient",
    "Transfer",
    "bootstrap_client",
]
