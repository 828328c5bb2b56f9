"""Tests on a GPU. They need no Ray, and are skipped where there is none."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from etha_ray.accelerator import CudaAccelerator
from etha_ray.cuda.extra import install_cupy
from etha_ray.cuda.gpus import let_streams_run

let_streams_run()


def lack() -> str | None:
    """Why nothing here can run."""
    if not torch.cuda.is_available():
        return f"torch {torch.__version__} sees no GPU"
    if importlib.util.find_spec("cupy") is None:
        return f"cupy is not installed: {install_cupy()}"
    return None


def pytest_collection_modifyitems(items: Sequence[pytest.Item]) -> None:
    """Skips what is in this folder where it cannot run."""
    if reason := lack():
        for item in items:
            if Path(__file__).parent in item.path.parents:
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def cuda() -> CudaAccelerator:
    """The first GPU."""
    return CudaAccelerator(0)
