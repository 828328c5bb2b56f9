"""What `CudaAccelerator` does where there is no GPU; what it does on one is in tests/gpu."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

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


class CompileError(Exception):
    """cupy's own is no RuntimeError."""


def fake_cupy(raw_module: Any) -> Any:
    """What is asked of cupy to compile."""
    cuda = SimpleNamespace(Device=lambda index: contextlib.nullcontext(), compiler=SimpleNamespace(CompileException=CompileError))
    return SimpleNamespace(cuda=cuda, RawModule=raw_module)


@pytest.mark.parametrize("error", [RuntimeError("Failed to find CUDA headers"), CompileError("no such architecture"), OSError("no NVRTC")])
def test_cupy_that_cannot_compile_is_as_none(error: Exception, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def raw_module(**_: object) -> None:
        raise error

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setitem(sys.modules, "cupy", fake_cupy(raw_module))
    accelerator = CudaAccelerator(0)
    assert not accelerator.launches
    assert not accelerator.launches
    assert [record.getMessage().count(str(error)) for record in caplog.records] == [1]
    assert "pip install 'etha-ray[gpu-cuda13]'" in caplog.text


def test_cupy_that_compiles(monkeypatch: pytest.MonkeyPatch) -> None:
    made = SimpleNamespace(get_function=lambda name: SimpleNamespace(num_regs=8))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setitem(sys.modules, "cupy", fake_cupy(lambda **_: made))
    assert CudaAccelerator(0).launches
    monkeypatch.setitem(sys.modules, "cupy", None)
    assert not CudaAccelerator(0).launches  # cannot be imported
