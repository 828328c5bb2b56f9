"""``bench gpu``: shards that change their layout within one GPU, by one launch, against the GPU's own copy rate and torch's calls.

Then the first model's weights go from one process to another by NCCL (`gpu_nccl`).

Seconds are those of the clock, from before the first call until the GPU is done: what an agent's transfer would wait for.
"""

from __future__ import annotations

import contextlib
import gc
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch

from etha_ray.accelerator import Accelerator, CudaAccelerator
from etha_ray.bench.figures import BenchResult, Figure, Ratio, describe_machine, interleaved, median, progress
from etha_ray.bench.gpu_nccl import nccl_figures
from etha_ray.bench.processes import BenchError
from etha_ray.bench.reshard import Reshard
from etha_ray.bench.workload import Workload, model, uniform
from etha_ray.cuda.extra import install_cupy
from etha_ray.cuda.gpus import let_streams_run
from etha_ray.errors import ConfigError, OptionalDependencyError
from etha_ray.transport import MappedTransport
from etha_ray.transport.kernels import KernelTransport

_DTYPE, _WIDE_DTYPE = "bfloat16", "float32"
_BUFFER_BYTES = 1 << 30
_SMALL_BYTES = 4096
_WARM_UPS = 3
_SPARE_MEMORY = 6 << 30
"""The buffers of the copy rate, and tensors that are gathered."""

_Found = tuple[list[Figure], list[Ratio]]
"""What one section adds to the result."""

_Measures = Mapping[str, Callable[[], object]]


SHAPES = ("qwen3-0.6b", "qwen3-8b")


def run_gpu(
    shapes: Sequence[str] = SHAPES,
    src: int = 2,
    dst: int = 2,
    steps: int = 15,
    tensors: int = 10_000,
    accelerator: Accelerator | None = None,
) -> BenchResult:
    """Measure ``steps`` times each, in turns with the baselines; all that arrives is compared, before and after.

    ``accelerator``: the first GPU unless given.

    Raises `ConfigError` for a shape or number that is not possible, `WrongDeviceError` without a GPU, `OptionalDependencyError`
    without cupy, `BenchError` when the GPU has too little memory or wrong bytes arrive.
    """
    if steps < 1:
        raise ConfigError(f"{steps} steps: give at least 1")
    workloads = {shape: model(shape, src, dst, _DTYPE) for shape in shapes}
    small = uniform(tensors, _SMALL_BYTES)
    if accelerator is None:
        let_streams_run()  # as an agent has it; the other process inherits it
    gpu = accelerator or CudaAccelerator(0)
    if not gpu.launches:
        raise OptionalDependencyError(f"bench gpu measures kernels, which need cupy: {install_cupy()}")
    with contextlib.closing(KernelTransport(gpu, MappedTransport(1))) as transport:
        sections: list[Callable[[], _Found]] = [partial(_copy_rate, gpu, steps)]
        for shape, workload in workloads.items():
            sections.append(partial(_resharded, transport, steps, shape, workload, _DTYPE))
            sections.append(partial(_resharded, transport, steps, shape, workload, _WIDE_DTYPE))
        sections.append(partial(_many, transport, steps, small))
        if gpu.device.type == "cuda" and workloads:
            shape = next(iter(workloads))
            sections.append(partial(nccl_figures, steps, shape, workloads[shape]))
        found: list[_Found] = []
        for section in sections:
            _let_go(gpu)
            found.append(section())
    return BenchResult(
        bench="gpu",
        figures=[*(figure for figures, _ in found for figure in figures), Figure("steps_count", steps, "runs measured of each")],
        ratios=[ratio for _, ratios in found for ratio in ratios],
        machine=describe_machine() | _describe(gpu),
    )


# --------------------------------------------------------------------------------------------------------------- sections


def _copy_rate(gpu: Accelerator, steps: int) -> _Found:
    limit = _Copy(gpu, _BUFFER_BYTES)
    seconds = _measured(gpu, steps, "copy rate", {"copy": limit})["copy"]
    return [Figure("copy_gb_per_s", 2 * limit.nbytes / seconds / 1e9, "torch's copy within the GPU, bytes read and written, median")], []


def _resharded(transport: KernelTransport, steps: int, shape: str, workload: Workload, source_dtype: str) -> _Found:
    """A model's FSDP shards to tensor-parallel shards, cast from ``source_dtype``."""
    gpu, cast = transport.accelerator, source_dtype != workload.dtype
    name = f"{'cast' if cast else 'reshard'}_{shape.replace('-', '_').replace('.', '_')}"
    what = f"{shape}, {workload.src} FSDP to {workload.dst} tensor-parallel shards, {source_dtype} to {workload.dtype}"
    _check_memory(gpu, workload, source_dtype, what)
    reshard = Reshard(workload, gpu, source_dtype)
    start = time.perf_counter()
    program = reshard.prepare(transport)
    prepared = time.perf_counter() - start
    reshard.verified(what, program, version=1)
    moved = reshard.bytes_read + reshard.bytes_written
    measures: _Measures = {
        "ours": program.run,
        "limit": _Copy(gpu, moved // 2),
        "loop": reshard.copy_each,
        "gather": reshard.gather_and_slice,
    }
    seconds = _measured(gpu, steps, what, measures)
    reshard.verified(what, program, version=2)
    return [
        Figure(f"{name}_ms", seconds["ours"] * 1e3, f"{what}: {len(reshard.moves)} regions, median"),
        Figure(f"{name}_gb_per_s", moved / seconds["ours"] / 1e9, "the same, bytes read and written"),
        Figure(f"{name}_prepare_ms", prepared * 1e3, "the same: from layouts to the program, once"),
    ], [
        Ratio(f"{name}_copy_limit", seconds["limit"] / seconds["ours"], "copying as many bytes in one piece over it", reach=0.85),
        Ratio(f"{name}_torch_loop", seconds["loop"] / seconds["ours"], "torch, a call for each region, over it"),
        Ratio(f"{name}_gather", seconds["gather"] / seconds["ours"], "gathering each tensor, then slicing, over it"),
    ]


def _many(transport: KernelTransport, steps: int, workload: Workload) -> _Found:
    gpu, count = transport.accelerator, len(workload.tensors)
    what = f"{count} tensors of {_SMALL_BYTES} bytes"
    reshard = Reshard(workload, gpu)
    program = reshard.prepare(transport)
    reshard.verified(what, program, version=1)
    sources, targets = (shards[0].tensors for shards in (reshard.sources, reshard.targets))
    measures: _Measures = {"ours": program.run, "loop": reshard.copy_each, "foreach": partial(torch._foreach_copy_, targets, sources)}
    seconds = _measured(gpu, steps, what, measures)
    return [
        Figure("small_ms", seconds["ours"] * 1e3, f"{what}, median"),
        Figure("small_ns_per_tensor", seconds["ours"] / count * 1e9, "the same, of each"),
    ], [
        Ratio("small_torch_loop", seconds["loop"] / seconds["ours"], "torch, a call for each, over it"),
        Ratio("small_torch_foreach", seconds["foreach"] / seconds["ours"], "torch._foreach_copy_ over it"),
    ]


# -------------------------------------------------------------------------------------------------------------- measuring


class _Copy:
    """Copies ``nbytes`` bytes in one piece after the other, through buffers that no cache holds."""

    def __init__(self, gpu: Accelerator, nbytes: int) -> None:
        self.nbytes = nbytes
        self._source, self._target = (gpu.empty(min(nbytes, _BUFFER_BYTES)).zero_() for _ in range(2))

    def __call__(self) -> None:
        whole, rest = divmod(self.nbytes, len(self._source))
        for _ in range(whole):
            self._target.copy_(self._source)
        self._target[:rest].copy_(self._source[:rest])


def _measured(gpu: Accelerator, steps: int, what: str, measures: _Measures) -> dict[str, float]:
    """Of each, the median of its seconds until the GPU is done."""
    progress(f"measuring {what}")

    def timed(measure: Callable[[], object]) -> list[float]:
        gpu.current().wait()
        start = time.perf_counter()
        measure()
        gpu.current().wait()
        return [time.perf_counter() - start]

    for measure in measures.values():
        for _ in range(_WARM_UPS):
            timed(measure)
    samples = interleaved(steps, {name: partial(timed, measure) for name, measure in measures.items()})
    return {name: median(values) for name, values in samples.items()}


def _let_go(gpu: Accelerator) -> None:
    """Give back what earlier sections had of the GPU's memory, and torch keeps: the next one, or its other process, wants it."""
    gc.collect()
    if gpu.device.type == "cuda":
        torch.cuda.empty_cache()


def _check_memory(gpu: Accelerator, workload: Workload, source_dtype: str, what: str) -> None:
    """Raise `BenchError` where both sides and the baselines would not fit."""
    if gpu.device.type != "cuda":
        return
    itemsize = torch.empty(0, dtype=getattr(torch, source_dtype)).itemsize
    given = sum(workload.nbytes("src", index) for index in range(workload.src)) // workload.itemsize * itemsize
    needed, (free, _) = given + workload.moved_bytes + _SPARE_MEMORY, torch.cuda.mem_get_info(gpu.device)
    if needed > free:
        raise BenchError(
            f"{what} needs {needed / 2**30:.1f} GiB of {gpu.device}'s memory, and {free / 2**30:.1f} GiB are free: give a smaller --shape"
        )


def _describe(gpu: Accelerator) -> dict[str, str]:
    if gpu.device.type != "cuda":
        return {"gpu": str(gpu.device)}
    import cupy

    return {"gpu": torch.cuda.get_device_name(gpu.device), "cuda": torch.version.cuda or "", "cupy": cupy.__version__}
