"""Benchmarks, each with its baselines in the same run: ``run_`` and what ``etha-ray bench`` calls it."""

from etha_ray.bench.faults import run_faults
from etha_ray.bench.figures import BenchResult, Figure, Ratio
from etha_ray.bench.gpu import run_gpu
from etha_ray.bench.network import run_network
from etha_ray.bench.plan import run_plan
from etha_ray.bench.processes import BenchError
from etha_ray.bench.roundtrip import run_roundtrip
from etha_ray.bench.small import run_small
from etha_ray.bench.store import run_store
from etha_ray.bench.sync import run_sync

__all__ = [
    "BenchError",
    "BenchResult",
    "Figure",
    "Ratio",
    "run_faults",
    "run_gpu",
    "run_network",
    "run_plan",
    "run_roundtrip",
    "run_small",
    "run_store",
    "run_sync",
]
