"""Run one function in several processes that share a gloo group."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import start_processes


def run_group(function: Callable[[int, Path], None], ranks: int, folder: Path) -> None:
    """Call `function(rank, folder)` on every rank; raises the first rank's failure, with its traceback."""
    start_processes(_enter, (function, ranks, folder), nprocs=ranks, start_method="spawn")  # type: ignore[no-untyped-call]


def _enter(rank: int, function: Callable[[int, Path], None], ranks: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=ranks)
    function(rank, folder)
    dist.barrier()
    # Not by way of destroy_process_group: gloo's threads may abort a process whose peer has closed its connections first.
    # Nothing is left to do, and a rank that failed has raised above.
    os._exit(0)
