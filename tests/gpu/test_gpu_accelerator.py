"""A GPU as an accelerator: its lanes, its memory, and what it says when something fails."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch

from etha_ray.accelerator import CudaAccelerator, Kernel, KernelSource
from etha_ray.errors import TransferError, WrongDeviceError
from etha_ray.transport.kernels.source import COPY_REGIONS, SOURCE


def test_lanes_are_ordered_only_where_asked(cuda: CudaAccelerator) -> None:
    one, two = cuda.lane(), cuda.lane()
    assert one.pointer != two.pointer
    with one.current():
        assert torch.cuda.current_stream(cuda.device).cuda_stream == one.pointer
        torch.cuda._sleep(1_000_000_000)
    two.wait()
    assert two.done()
    assert not one.done()
    two.after(one)
    assert not two.done() or one.done()
    two.wait()
    assert one.done()


def test_uploads(cuda: CudaAccelerator) -> None:
    data = np.arange(1000, dtype=np.int64)
    assert cuda.upload(data).cpu().numpy().tobytes() == data.tobytes()
    assert cuda.upload(np.zeros(0)).nbytes == 0
    assert cuda.empty(1000).data_ptr() % 256 == 0
    assert cuda.reaches(cuda.device)
    assert not cuda.reaches(torch.device("cpu"))
    assert cuda.launches


def test_too_much_memory_is_named(cuda: CudaAccelerator) -> None:
    with pytest.raises(TransferError, match=r"cuda:0 has too little memory: .* GiB are free"):
        cuda.empty(1 << 50)


def test_no_such_gpu() -> None:
    with pytest.raises(WrongDeviceError, match=r"cuda:99 is not there: .* CUDA_VISIBLE_DEVICES"):
        CudaAccelerator(99)


def test_a_kernel_that_does_not_compile(cuda: CudaAccelerator) -> None:
    broken = Kernel(KernelSource('extern "C" __global__ void broken() { nonsense; }', ()), "broken", 32)
    with pytest.raises(TransferError, match=r"(?s)cuda:0: kernel broken could not be compiled.*nonsense"):
        cuda.load(broken)
    with pytest.raises(TransferError, match="kernel missing could not"):
        cuda.load(Kernel(SOURCE, "missing", 32))
    cuda.load(COPY_REGIONS)


FAULT = """
import torch
from etha_ray.accelerator import CudaAccelerator
from etha_ray.errors import TransferError
from etha_ray.transport.kernels.source import COPY_REGIONS
cuda = CudaAccelerator(0)
lane = cuda.lane()
cuda.launch(COPY_REGIONS, 1, (64, 64, 1, 1), lane)  # tables that are not there
for call in (lane.wait, lane.done, lambda: cuda.upload(torch.zeros(4).numpy())):
    try:
        call()
    except TransferError as error:
        print(error)
"""


def test_what_fails_on_the_device_is_said(cuda: CudaAccelerator) -> None:
    """In a process of its own, as no other kernel runs there after."""
    out = subprocess.run([sys.executable, "-c", FAULT], capture_output=True, text=True, timeout=250)
    assert out.stdout.count("cuda:0 reports: ") == 3, out.stderr
    assert "illegal memory access" in out.stdout
