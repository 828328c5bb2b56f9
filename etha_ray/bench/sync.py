"""``bench sync``: a model's weights from FSDP shards to tensor-parallel shards, against the copy limit and Ray's objects."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from functools import partial

import psutil

from etha_ray.bench.bus import MemoryWatch, open_bus, spans
from etha_ray.bench.figures import BenchResult, Figure, Ratio, interleaved, median, progress
from etha_ray.bench.processes import BenchError, WorkerProcess, Workers, call_all
from etha_ray.bench.ray_baseline import RayObjects, open_ray
from etha_ray.bench.workload import Workload, model
from etha_ray.errors import ConfigError

_BATCH = "model"
_HEAD_START = 0.02
_SPARE_MEMORY = 2 << 30
_COPY_METHODS = ("torch", "memmove")
_TENSOR_ROUNDS = 3
"""Rounds of Ray's slow way: seconds each."""


def run_sync(shape: str = "qwen3-0.6b", src: int = 2, dst: int = 2, dtype: str = "bfloat16", steps: int = 15) -> BenchResult:
    """Register a model once, then measure ``steps`` syncs, in turns with the baselines.

    The first and the last sync are compared bit for bit.

    Raises `ConfigError` for a shape, dtype or number that is not possible, `BenchError` when there is too little memory, a
    worker fails or wrong bytes arrive.
    """
    if steps < 1:
        raise ConfigError(f"{steps} steps: give at least 1")
    workload = model(shape, src, dst, dtype)
    given = sum(workload.nbytes("src", index) for index in range(src))
    _check_memory(workload, given)
    with open_bus(src + dst) as bus, open_copiers(workload) as copiers, open_ray(src + dst, 2 * given):
        progress(f"registering {len(workload.tensors)} tensors, {workload.moved_bytes / 1e9:.2f} GB to move")
        with MemoryWatch([agent.pid for agent in bus.agents]) as memory:
            register_s = bus.register(_BATCH, workload)
            bus.verified_sync(_BATCH, workload, version=1)
            bus.sync(_BATCH, workload)
        objects = RayObjects(workload)
        samples = interleaved(
            steps,
            {
                "bus": partial(bus.sync, _BATCH, workload),
                **{how: partial(copy_together, copiers, how) for how in _COPY_METHODS},
                "ray": objects.sync,
            },
        )
        samples |= interleaved(min(steps, _TENSOR_ROUNDS), {"ray tensors": partial(objects.sync, as_tensors=True)})
        bus.verified_sync(_BATCH, workload, version=2)
    seconds = {name: median(values) for name, values in samples.items()}
    gigabytes = workload.moved_bytes / 1e9
    return BenchResult(
        bench="sync",
        figures=[
            Figure("sync_s", seconds["bus"], "one sync, first call to last completion, median"),
            Figure("sync_min_s", min(samples["bus"]), "the fastest"),
            Figure("sync_max_s", max(samples["bus"]), "the slowest"),
            Figure("gb_per_s", gigabytes / seconds["bus"], "bytes that arrive over the median"),
            Figure("moved_gb", gigabytes, f"bytes that arrive in one sync, {len(workload.tensors)} tensors of {shape}"),
            Figure("extra_peak_mib_per_agent", memory.extra_mib, "most private memory of an agent above its start", reach=64.0),
            Figure("register_s", register_s, "registering, once"),
            Figure("copy_limit_s", seconds["torch"], f"{dst} processes copying as many bytes in shared memory, by torch"),
            Figure("memmove_limit_s", seconds["memmove"], "the same by libc, each process in one call: the machine's own limit"),
            Figure("ray_objects_s", seconds["ray tensors"], "the same sync through Ray's object store: put shards, get, slice, copy"),
            Figure("ray_numpy_s", seconds["ray"], "the same, tuned: NumPy views instead of tensors, into a store that is warm"),
            Figure("steps_count", steps, "syncs measured"),
        ],
        ratios=[
            Ratio("copy_limit", seconds["torch"] / seconds["bus"], "copying by torch over our sync", reach=0.90),
            Ratio("memmove_limit", seconds["memmove"] / seconds["bus"], "copying by libc over our sync"),
            Ratio("ray_objects", seconds["ray tensors"] / seconds["bus"], "Ray's object store over our sync", reach=4.0),
            Ratio("ray_numpy", seconds["ray"] / seconds["bus"], "the same, tuned by hand"),
        ],
    )


@contextlib.contextmanager
def open_copiers(workload: Workload) -> Iterator[list[WorkerProcess]]:
    """One process for each target rank that copies as many bytes as that rank receives, over its share of the cores."""
    threads = max(1, (psutil.cpu_count() or 1) // workload.dst)
    with Workers() as workers:
        copiers = [workers.start("copy", f"copier {index}") for index in range(workload.dst)]
        for index, copier in enumerate(copiers):
            copier.ask("hold", nbytes=workload.nbytes("dst", index), threads=threads)
        for copier in copiers:
            copier.answer()
        yield copiers


def copy_together(copiers: Sequence[WorkerProcess], how: str) -> list[float]:
    """Have all copiers copy at the same time; seconds from the first start to the last end."""
    return spans(call_all(copiers, "copy", at=time.monotonic() + _HEAD_START, how=how))


def _check_memory(workload: Workload, given: int) -> None:
    # Both sides on the bus, both of the copiers, and with Ray both sides and the objects in between.
    needed = 4 * given + 4 * workload.moved_bytes + _SPARE_MEMORY
    available = psutil.virtual_memory().available
    if needed > available:
        raise BenchError(
            f"this needs {needed / 2**30:.1f} GiB of memory for the model and its baselines, and {available / 2**30:.1f} GiB are"
            " available: free some, or give a smaller --shape or fewer ranks"
        )
