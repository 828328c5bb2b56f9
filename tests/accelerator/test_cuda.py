"""What `CudaAccelerator` does where there is no GPU; what it does on one is in tests/gpu."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from etha_ray.accelerator import CudaAccelerator
from etha_ray.errors import WrongDeviceError


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so() -> None:
    with pytest.raises(WrongDeviceError, match=r"cuda:0 is not there: torch .* sees 0 GPUs.*CUDA_VISIBLE_DEVICES"):
        CudaAccelerator(0)


def test_cupy_is_not_imported_before_it_is_needed() -> None:
    code = "import sys, etha_ray.accelerator, etha_ray.transport.kernels; print('cupy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"
