"""What the demo's processes do: agents, trainers that hold FSDP shards, and generators that hold tensor-parallel shards."""

from __future__ import annotations

import os
from multiprocessing.connection import Connection
from typing import Literal

import msgspec
import torch
from torch.distributed.tensor import Shard

from etha_ray.config import agent_paths
from etha_ray.layout import MeshSpec
from etha_ray.tensor_bus.agent import main as run_agent
from etha_ray.tensor_bus.client import TensorBusClient

TRAINERS, GENERATORS = 2, 2
"""Workers of each side; each has an agent of its own."""

LAYERS = 8
"""Layers of the model. Each has a weight that engines cut by rows, and one that they cut by columns."""

BATCH = "policy"
_START_TIMEOUT = 60.0

Side = Literal["trainer", "generator"]


def agent(rank: int, url: str, namespace: str) -> None:
    """One agent, until SIGTERM."""
    torch.set_num_threads(1)
    # Its log would stand between the demo's lines.
    devnull = os.open(os.devnull, os.O_WRONLY)
    os.dup2(devnull, 2)
    run_agent(["--store", url, "--rank", str(rank), "--namespace", namespace, "--threads", "1", "--host", "127.0.0.1"])


def worker(side: Side, rank: int, namespace: str, width: int, pipe: Connection) -> None:
    """One worker: registers, then makes a step, a transfer and a check for each step number that comes in, until 0 comes.

    It says b"1" when it is ready for the next thing, or when every byte was right; and after a transfer its `TransferReport`.
    """
    torch.set_num_threads(1)
    agent_rank = rank + (TRAINERS if side == "generator" else 0)
    paths = agent_paths(agent_rank, namespace)
    client = TensorBusClient(agent_rank, paths.command_queue, paths.state, _START_TIMEOUT)
    other, size = ("generator", TRAINERS) if side == "trainer" else ("trainer", GENERATORS)
    for pair, dim in (("rows", 0), ("columns", 1)):
        held = Shard(0) if side == "trainer" else Shard(dim)
        client.init_pair(pair, side, other, size, MeshSpec((size,), (rank,)), [held], timeout=_START_TIMEOUT)
    tensors = [torch.zeros_like(part(side, layer, rank, width, 0)) for layer in range(2 * LAYERS)]
    entries = [(tensor, "rows" if layer % 2 == 0 else "columns") for layer, tensor in enumerate(tensors)]
    batch = client.register_tensors(BATCH, entries, timeout=_START_TIMEOUT)
    pipe.send_bytes(b"1")
    while step := int(pipe.recv_bytes()):
        wanted = [part(side, layer, rank, width, step) for layer in range(2 * LAYERS)]
        if side == "trainer":
            for tensor, new in zip(tensors, wanted, strict=True):
                tensor.copy_(new)
        pipe.send_bytes(b"1")
        pipe.recv_bytes()
        done = batch.transfer("send" if side == "trainer" else "recv", blocking=True, timeout=_START_TIMEOUT)
        pipe.send_bytes(msgspec.msgpack.encode(done.result()))
        exact = all(torch.equal(tensor, expected) for tensor, expected in zip(tensors, wanted, strict=True))
        pipe.send_bytes(b"1" if exact else b"0")
    client.close()


def part(side: Side, layer: int, rank: int, width: int, step: int) -> torch.Tensor:
    """What a worker must hold of a layer's weight after a step: its chunk of numbers that differ in every layer and step."""
    whole = torch.arange(width * width, dtype=torch.float32).mul_(step).add_(layer).view(width, width)
    dim = 1 if side == "generator" and layer % 2 == 1 else 0
    return whole.chunk(TRAINERS if side == "trainer" else GENERATORS, dim)[rank].contiguous()
