"""What worker processes do in the tests of publish and pull."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

import etha_ray
from tests.tensor_bus.cluster import LONG

SIZES = {"vocabulary": 257, "layers": 2, "heads": 4, "head_size": 8, "mlp": 37}


def publish_trainer(state: dict[str, Any], rank: int, size: int, rendezvous: str) -> None:
    """A transformer that FSDP2 trains."""
    # Here, because FSDP takes seconds to import, and not all workers need it.
    from torch.distributed.device_mesh import init_device_mesh

    from actors.model import ModelConfig, ShardedTrainer

    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=size)
    state["trainer"] = ShardedTrainer(ModelConfig(**SIZES), init_device_mesh("cpu", (size,)), total_steps=10)
    state["sender"] = etha_ray.publish(state["trainer"].weights, "policy", client=state["client"])


def train(state: dict[str, Any], rank: int, size: int, step: int) -> dict[str, Tensor]:
    """One step; all weights, whole."""
    from actors.text import load_corpus, train_batch

    state["trainer"].step(train_batch(load_corpus(), step=step, rank=rank, windows=1, length=16, seed=0))
    return {name: weight.full_tensor().detach() for name, weight in state["trainer"].weights.items()}


def publish_plain(state: dict[str, Any], value: float) -> None:
    state["sender"] = etha_ray.publish({"w": torch.full((3,), value)}, "plain", client=state["client"])


def pull_plain(state: dict[str, Any], replica: str) -> None:
    state["receiver"] = etha_ray.pull({"w": torch.zeros(3)}, "plain", client=state["client"], replica=replica, timeout=LONG)


def pull_rank(state: dict[str, Any], rank: int, size: int) -> None:
    state["receiver"] = etha_ray.pull({"w": torch.zeros(3)}, "plain", client=state["client"], rank=rank, world_size=size, timeout=LONG)


def push(state: dict[str, Any], rank: int, size: int) -> Any:
    return state["sender"].push(timeout=LONG)


def update(state: dict[str, Any]) -> int:
    return int(state["receiver"].update(LONG))


def close(state: dict[str, Any], rank: int, size: int) -> None:
    state["sender"].close()
