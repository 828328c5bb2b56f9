"""A trainer and an engine in small, on this machine's CPUs and without Ray: see a model's weights cross."""

from etha_ray.demo.show import Demo, SyncResult, run_demo

__all__ = ["Demo", "SyncResult", "run_demo"]
