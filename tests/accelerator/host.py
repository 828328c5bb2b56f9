"""An accelerator on the CPU: it compiles the very kernels that a GPU gets with the machine's C++ compiler, and runs them at once."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch

from etha_ray.accelerator import Accelerator, Kernel, KernelSource, Lane

_MOST_ARGUMENTS = 6

SHIM = """
struct Index { unsigned x; };
static thread_local Index threadIdx, blockIdx, gridDim, blockDim;
#define __global__
#define __device__
#define __launch_bounds__(...)
static inline unsigned long long atomicAdd(unsigned long long* place, unsigned long long value) {
    return __atomic_fetch_add(place, value, __ATOMIC_RELAXED);
}
#include KERNELS
typedef unsigned long long Word;
// Integers and addresses are passed alike, in as many registers as there are; a kernel reads those that it knows.
extern "C" void launch(void (*kernel)(Word, Word, Word, Word, Word, Word), unsigned blocks, unsigned threads, const Word* words) {
    gridDim.x = blocks;
    blockDim.x = threads;
    for (blockIdx.x = 0; blockIdx.x < blocks; ++blockIdx.x)
        for (threadIdx.x = 0; threadIdx.x < threads; ++threadIdx.x)
            kernel(words[0], words[1], words[2], words[3], words[4], words[5]);
}
"""


@functools.cache
def compiled(source: KernelSource) -> ctypes.CDLL:
    """``source`` for the CPU; kept for the other processes of the tests. Skips the test where there is no compiler."""
    compiler = shutil.which("g++") or shutil.which("clang++") or pytest.skip("no C++ compiler")
    digest = hashlib.sha256(repr((source.code, source.options, SHIM)).encode()).hexdigest()[:16]
    kept = Path(tempfile.gettempdir()) / f"etha_ray-test-kernels-{os.getuid()}-{digest}.so"
    if not kept.exists() or kept.stat().st_uid != os.getuid():
        with tempfile.TemporaryDirectory(dir=kept.parent) as folder:
            kernels, shim, library = (Path(folder) / name for name in ("kernels.cpp", "shim.cpp", "kernels.so"))
            kernels.write_text(source.code)
            shim.write_text(SHIM)
            command = [compiler, "-O2", "-fPIC", "-shared", "-fno-strict-aliasing", f'-DKERNELS="{kernels}"', *source.options]
            subprocess.run([*command, "-Wall", "-Wno-unknown-pragmas", "-Werror", str(shim), "-o", str(library)], check=True)
            library.replace(kept)
    return ctypes.CDLL(str(kept))


class HostLane(Lane):
    """Does everything at once."""

    pointer = 0

    @contextlib.contextmanager
    def current(self) -> Iterator[None]:
        yield

    def after(self, other: Lane) -> None:
        pass

    def done(self) -> bool:
        return True

    def wait(self) -> None:
        pass


class HostAccelerator(Accelerator):
    """``launched`` is what was launched, in order."""

    device = torch.device("cpu")
    launches = True
    width = 3  # so few that most blocks take several tiles

    def __init__(self) -> None:
        self.launched: list[str] = []

    def reaches(self, device: torch.device) -> bool:
        return device == self.device

    def lane(self, *, alone: bool = False) -> HostLane:
        return HostLane()

    def current(self) -> HostLane:
        return HostLane()

    def empty(self, nbytes: int) -> torch.Tensor:
        memory = torch.empty(nbytes + 256, dtype=torch.uint8)
        return memory[-memory.data_ptr() % 256 :][:nbytes]

    def load(self, kernel: Kernel) -> None:
        getattr(compiled(kernel.source), kernel.name)

    def launch(self, kernel: Kernel, blocks: int, arguments: Sequence[int | torch.Tensor], lane: Lane) -> None:
        assert isinstance(lane, HostLane)
        assert blocks > 0
        words = [each.data_ptr() if isinstance(each, torch.Tensor) else each for each in arguments]
        words += [0] * (_MOST_ARGUMENTS - len(words))
        library = compiled(kernel.source)
        library.launch(getattr(library, kernel.name), blocks, kernel.threads, (ctypes.c_uint64 * _MOST_ARGUMENTS)(*words))
        self.launched.append(kernel.name)
