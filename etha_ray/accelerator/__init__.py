"""Devices that work beside the calling thread, and their lanes: `CudaAccelerator`."""

from __future__ import annotations

from etha_ray.accelerator.base import Accelerator, Kernel, KernelSource, Lane
from etha_ray.accelerator.cuda import CudaAccelerator

__all__ = ["Accelerator", "CudaAccelerator", "Kernel", "KernelSource", "Lane"]
