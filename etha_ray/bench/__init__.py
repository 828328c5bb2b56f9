"""Benchmarks, with their baselines in the same run: `run_roundtrip`, `run_sync`, `run_small`, `run_plan`, `run_store`."""

from etha_ray.bench.figures import BenchResult, Figure, Ratio
from etha_ray.bench.plan import run_plan
from etha_ray.bench.processes import BenchError
from etha_ray.bench.roundtrip import run_roundtrip
from etha_ray.bench.small import run_small
from etha_ray.bench.store import run_store
from etha_ray.bench.sync import run_sync

__all__ = ["BenchError", "BenchResult", "Figure", "Ratio", "run_plan", "run_roundtrip", "run_small", "run_store", "run_sync"]
