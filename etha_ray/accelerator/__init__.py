"""Devices that work beside the calling thread, and their lanes."""

from __future__ import annotations

from etha_ray.accelerator.base import Accelerator, Lane

__all__ = ["Accelerator", "Lane"]
