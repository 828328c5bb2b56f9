"""Processes with tensors on a GPU, for the tests here: what they do, beside `tests.tensor_bus.cluster.Worker`."""

from __future__ import annotations

import os
from typing import Any

import torch

from etha_ray.config import AgentPaths
from etha_ray.cuda.gpus import uuid_of
from etha_ray.cuda.marks import Mark
from etha_ray.memory import ForAgent, decode_handle, encode_handle, export_tensors, open_tensors
from etha_ray.tensor_bus.bootstrap import setup_ptrace
from tests.tensor_bus.cluster import LONG, connect

LONG_TIME = 300_000_000
"""Clock cycles that a GPU spins for, so that what is launched after it is late for sure: a fifth of a second or so."""


def begin(state: dict[str, Any]) -> str:
    """Before all else; the UUID of its first GPU."""
    torch.cuda.init()
    return uuid_of(0)


def see(state: dict[str, Any], visible: str) -> str:
    """Before all else: see these GPUs alone; the UUID of the first."""
    os.environ["CUDA_VISIBLE_DEVICES"] = visible
    return begin(state)


def use_expandable(state: dict[str, Any]) -> None:
    """Allocate what comes in expandable segments, with handles for other processes."""
    os.environ["TORCH_CUDA_EXPANDABLE_SEGMENTS_IPC"] = "1"  # read when the first one is made
    torch.cuda.memory._set_allocator_settings("expandable_segments:True")


def make(state: dict[str, Any], rows: int, columns: int, value: float = 0.0, dtype: torch.dtype = torch.float32, ordinal: int = 0) -> None:
    """The tensor is on the GPU."""
    state["tensor"] = torch.full((rows, columns), value, dtype=dtype, device=f"cuda:{ordinal}")


def make_random(state: dict[str, Any], rows: int, columns: int) -> None:
    """The same, with values that differ; a view of some strides."""
    state["tensor"] = torch.randn(columns, rows, device="cuda:0").t()


def export(state: dict[str, Any]) -> list[bytes]:
    """Handles of the tensor, and of its rows 1 to 3."""
    tensor = state["tensor"]
    agent = ForAgent("cuda:0", uuid_of(tensor.device.index))
    state["exported"] = export_tensors([tensor, tensor[1:3]], ["tensor", "rows"], agent)
    return [encode_handle(handle) for handle in state["exported"].handles]


def open_sum(state: dict[str, Any], handles: list[bytes], fill: float | None = None) -> float:
    """Open another process's tensors, the sum of the first, and what is written there then; they stay open."""
    state["opened"] = open_tensors([decode_handle(handle) for handle in handles], gpu=0)
    tensor = state["opened"].tensors[0]
    found = float(tensor.double().sum())
    if fill is not None:
        tensor.fill_(fill)
        torch.cuda.synchronize()
    return found


def close_opened(state: dict[str, Any]) -> None:
    """Let go of what `open_sum` opened."""
    state.pop("opened").close()


def sum_of(state: dict[str, Any]) -> float:
    """Of the tensor's elements, as they are when its GPU has done all."""
    torch.cuda.synchronize()
    return float(state["tensor"].double().sum())


def values(state: dict[str, Any]) -> torch.Tensor:
    """The tensor, on the CPU."""
    torch.cuda.synchronize()
    return state["tensor"].cpu()  # type: ignore[no-any-return]


def set_mark(state: dict[str, Any], cycles: int) -> bytes:
    """Have the GPU spin, and set the mark behind that, without waiting for it."""
    torch.cuda._sleep(cycles)
    return state.setdefault("mark", Mark(0)).set()  # type: ignore[no-any-return]


# --- on the bus


def join(state: dict[str, Any], rank: int, paths: AgentPaths, name: str, other: str) -> str:
    """Be a client of this agent, and one side of the pair; the UUID of the agent's GPU."""
    connect(state, rank, paths)
    setup_ptrace(state["client"].agent_pid)  # as bootstrap_client does
    state["client"].init_pair("pair", name, other, 1, timeout=LONG)
    return str(state["client"].gpu)


def register(state: dict[str, Any], batch_id: str = "batch") -> None:
    """The tensor, as one batch."""
    state["handler"] = state["client"].register_tensors(batch_id, [(state["tensor"], "pair")], timeout=LONG)


def use_cpu(state: dict[str, Any], rows: int, columns: int) -> None:
    """The tensor is on the CPU."""
    state["tensor"] = torch.zeros(rows, columns)


def transfer(state: dict[str, Any], direction: str, atomic: bool = False) -> None:
    """And wait for its end."""
    state["handler"].transfer(direction, blocking=True, timeout=LONG, atomic=atomic)


def late_send(state: dict[str, Any], value: float) -> None:
    """Have the GPU write the tensor in a while, and send it without waiting for that."""
    torch.cuda._sleep(LONG_TIME)
    state["tensor"].fill_(value)
    state["handler"].transfer("send").result(LONG)


def receive_after_reading(state: dict[str, Any]) -> float:
    """Have the GPU read the tensor in a while, and receive into it without waiting for that; the sum of what was read."""
    torch.cuda._sleep(LONG_TIME)
    before = state["tensor"].clone()
    state["handler"].transfer("recv").result(LONG)
    return float(before.double().sum())


def digest(state: dict[str, Any]) -> list[str]:
    """Of the batch's tensors."""
    return list(state["handler"].digest(timeout=LONG))


def close_batch(state: dict[str, Any]) -> None:
    """Close it, and let go of the tensor."""
    state.pop("handler").close()
    state.pop("tensor")
    torch.cuda.empty_cache()
