"""GPUs of the host's own memory (`fake_cuda.c`), for tests of what is around them: torch's CPU tensors stand for those on them."""

from __future__ import annotations

import atexit
import ctypes
import functools
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from etha_ray.cuda import arrays, driver

SOURCE = Path(__file__).with_name("fake_cuda.c")
CHUNK = 64 << 10
"""Bytes of a chunk of an expandable segment here."""


def uuid(host_number: int) -> str:
    """Of the GPU that the host counts so."""
    byte = f"{0xA0 + host_number:02x}"
    return "GPU-" + "-".join(byte * count for count in (4, 2, 2, 2, 6))


@functools.cache
def library() -> str:
    """The fake, compiled. Skips the test where there is no compiler."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("needs a C compiler")
    folder = tempfile.mkdtemp(prefix="etha-fake-cuda-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    path = f"{folder}/libcuda.so.1"
    subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-o", path, str(SOURCE), "-lpthread"], check=True)
    return path


class _Prop(ctypes.Structure):
    _fields_ = [
        ("kind", ctypes.c_int),
        ("types", ctypes.c_int),
        ("place", ctypes.c_int),
        ("id", ctypes.c_int),
        ("more", ctypes.c_char * 16),
    ]


class FakeGpus:
    """This process with GPUs, from `install` on."""

    def __init__(self, path: str) -> None:
        self.driver = driver.use(path)
        self.library = ctypes.CDLL(path)
        self.library.fake_device_of.argtypes = [ctypes.c_uint64]
        self._own = int(self.library.fake_held())

    def call(self, name: str, *arguments: Any, ordinal: int = 0) -> None:
        with self.driver.current(ordinal):
            assert getattr(self.library, name)(*arguments) == 0, name

    def fail(self, call: str, code: int) -> None:
        """Have the next call of that function return an error."""
        self.library.fake_fail(call.encode(), code)

    @property
    def held(self) -> int:
        """What this process has mapped of others, or reserved for it, and chunks of theirs that it holds on to."""
        return int(self.library.fake_held()) - self._own

    def allocate(self, size: int, ordinal: int = 0, kind: str = "malloc") -> int:
        """Address of new memory, as cudaMalloc gives it, or cudaMallocAsync ("async")."""
        at = ctypes.c_uint64()
        if kind == "malloc":
            self.call("cuMemAlloc_v2", ctypes.byref(at), ctypes.c_size_t(size), ordinal=ordinal)
        else:
            self.call("cuMemAllocAsync", ctypes.byref(at), ctypes.c_size_t(size), None, ordinal=ordinal)
        return at.value

    def free(self, address: int) -> None:
        self.call("cuMemFree_v2", ctypes.c_uint64(address))

    def expandable(self, chunks: int, ordinal: int = 0, types: int = 1) -> int:
        """Address of chunks side by side, as in one of torch's expandable segments. ``types``: what they may be exported as."""
        before = self.held
        with self.driver.current(ordinal):
            base = self.driver.reserve(chunks * CHUNK)
            for number in range(chunks):
                chunk, prop = ctypes.c_uint64(), _Prop(1, types, 1, ordinal)
                self.call(
                    "cuMemCreate", ctypes.byref(chunk), ctypes.c_size_t(CHUNK), ctypes.byref(prop), ctypes.c_uint64(0), ordinal=ordinal
                )
                self.driver.map(base + number * CHUNK, CHUNK, chunk.value)
                self.driver.release(chunk.value)
            self.driver.allow(base, chunks * CHUNK, ordinal)
        self._own += self.held - before
        return base

    def tensor(self, address: int, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """A tensor of its own storage there."""
        count = max(1, torch.Size(shape).numel())
        return torch.empty(0, dtype=dtype).set_(_storage_at(address, count * dtype.itemsize, 0, None)).view(shape)

    def empty(self, *shape: int, dtype: torch.dtype = torch.float32, ordinal: int = 0, offset: int = 0) -> torch.Tensor:
        """A tensor in memory of its own, ``offset`` bytes from where that begins."""
        size = torch.Size(shape).numel() * dtype.itemsize
        return self.tensor(self.allocate(offset + size, ordinal) + offset, shape, dtype)


def _gpu_of(library: ctypes.CDLL, tensor: torch.Tensor) -> int | None:
    if tensor.device.type != "cpu" or not tensor.untyped_storage().nbytes():
        return None
    found = int(library.fake_device_of(ctypes.c_uint64(tensor.untyped_storage().data_ptr())))
    return None if found < 0 else found


def _storage_at(address: int, nbytes: int, ordinal: int, owner: object) -> torch.UntypedStorage:
    class Memory(ctypes.c_ubyte * nbytes):  # type: ignore[misc]
        """Lives as long as the storage does."""

    if not nbytes:
        return torch.empty(0).untyped_storage()
    memory = Memory.from_address(address)
    memory.owner = owner
    return torch.frombuffer(memory, dtype=torch.uint8).untyped_storage()


def install(devices: str = "0", path: str | None = None, patch: Callable[[object, str, object], None] = setattr) -> FakeGpus:
    """Give this process the GPUs that the host counts so, in this order."""
    os.environ["FAKE_CUDA_DEVICES"] = devices
    gpus = FakeGpus(path or library())
    patch(arrays, "gpu_of", functools.partial(_gpu_of, gpus.library))
    patch(arrays, "storage_at", _storage_at)
    patch(torch.version, "cuda", "13.0")
    return gpus


__all__ = ["CHUNK", "FakeGpus", "install", "library", "uuid"]
