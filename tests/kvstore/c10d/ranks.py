"""What each process of a group of four does with a store of ours."""

from __future__ import annotations

import gc
import os
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from etha_ray.kvstore import create_store
from etha_ray.kvstore.c10d import C10dStore

RANKS = 4
TIMEOUT = timedelta(seconds=100)


def make_store(url: str, namespace: str) -> C10dStore:
    """One of `C10dStore` on the backend that the URL names."""
    return C10dStore(create_store(url, namespace=namespace), timeout=TIMEOUT)


def meet(rank: int, url: str, namespace: str) -> dict[str, object]:
    """Makes process groups on the store in every way torch has, and uses them. What each rank returns is in `expected`."""
    torch.set_num_threads(1)
    results: dict[str, object] = {}
    dist.init_process_group("gloo", store=make_store(url, namespace), rank=rank, world_size=RANKS, timeout=TIMEOUT)
    gc.collect()  # nothing here holds the store any more

    results["all_reduce"] = summed(rank)
    halves = [dist.new_group([0, 2], timeout=TIMEOUT), dist.new_group([1, 3], timeout=TIMEOUT)]
    results["new_group"] = summed(rank, halves[rank % 2])
    inner = dist.new_group([1, 2], use_local_synchronization=True, timeout=TIMEOUT) if rank in (1, 2) else None
    results["local new_group"] = None if inner is None else summed(rank, inner)

    sent: list[Any] = [{"from": rank, "text": "naïve"} if rank == 2 else None]
    dist.broadcast_object_list(sent, src=2)
    results["broadcast_object_list"] = sent[0]
    gathered: list[Any] = [None] * RANKS
    dist.all_gather_object(gathered, ("rank", rank))
    results["all_gather_object"] = gathered
    scattered: list[Any] = [None]
    dist.scatter_object_list(scattered, [f"for {n}" for n in range(RANKS)] if rank == 0 else None, src=0)
    results["scatter_object_list"] = scattered[0]

    # A second group, apart from the first by PrefixStore only.
    under = dist.PrefixStore("second", make_store(url, namespace))
    second = dist.ProcessGroupGloo(under, rank, RANKS, TIMEOUT)
    tensor = torch.tensor([float(rank)])
    second.allreduce([tensor]).wait()
    results["second group"] = tensor.item()

    dist.monitored_barrier(timeout=TIMEOUT)
    shared = dist.distributed_c10d._get_default_store()
    shared.barrier("meet", RANKS, TIMEOUT)
    results["store counter"] = shared.add("counted", rank)
    shared.barrier("counted", RANKS, TIMEOUT)
    results["store counter"] = shared.add("counted", 0)
    dist.barrier()
    return results


def enter(rank: int, url: str, namespace: str, folder: Path) -> None:
    """`meet`, in a process of its own, which ends."""
    assert meet(rank, url, namespace) == expected(rank)
    (folder / f"rank {rank}").touch()
    # Not by way of destroy_process_group: gloo's threads may abort a process whose peer has closed its connections first.
    os._exit(0)


def summed(rank: int, group: Any = None) -> float:
    """The sum of the ranks of a group, by its all_reduce."""
    tensor = torch.full((1000,), float(rank))
    dist.all_reduce(tensor, group=group)
    assert tensor.unique().numel() == 1
    return tensor[0].item()


def expected(rank: int) -> dict[str, object]:
    """What `meet` returns."""
    return {
        "all_reduce": 6.0,
        "new_group": [2.0, 4.0][rank % 2],
        "local new_group": 3.0 if rank in (1, 2) else None,
        "broadcast_object_list": {"from": 2, "text": "naïve"},
        "all_gather_object": [("rank", n) for n in range(RANKS)],
        "scatter_object_list": f"for {rank}",
        "second group": 6.0,
        "store counter": 6,
    }
