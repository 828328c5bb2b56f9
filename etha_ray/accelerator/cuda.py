"""A GPU through torch, whose streams are the lanes and whose allocator gives the memory, and through cupy, which launches kernels.

cupy is imported when a kernel is first wanted, and never without a GPU. Both use the device's primary context, so addresses
and streams of one mean the same to the other.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch

from etha_ray.accelerator.base import Accelerator, Kernel, KernelSource, Lane
from etha_ray.cuda.extra import install_cupy
from etha_ray.errors import TransferError, WrongDeviceError

logger = logging.getLogger(__name__)

_BLOCKS_A_MULTIPROCESSOR = 8
_GIB = 2**30
_NOTHING = Kernel(KernelSource('extern "C" __global__ void nothing() {}', ()), "nothing", 32)
"""What a compiler takes if there is one: cupy may be installed without NVRTC, or without CUDA's headers."""


class CudaLane(Lane):
    """A torch stream."""

    def __init__(self, stream: torch.cuda.Stream, holder: object = None) -> None:
        """``holder`` ends the stream when it is collected."""
        self._stream, self._holder = stream, holder

    @property
    def pointer(self) -> int:
        return int(self._stream.cuda_stream)

    @contextlib.contextmanager
    def current(self) -> Iterator[None]:
        """As in the interface; this device is torch's current one, too."""
        with _device_errors(self._stream.device), torch.cuda.stream(self._stream):
            yield

    def after(self, other: Lane) -> None:
        """As in the interface; ``other`` may be of another device."""
        assert isinstance(other, CudaLane)
        if other._stream != self._stream:
            with _device_errors(self._stream.device):
                self._stream.wait_stream(other._stream)

    def done(self) -> bool:
        with _device_errors(self._stream.device):
            return bool(self._stream.query())

    def wait(self) -> None:
        with _device_errors(self._stream.device):
            self._stream.synchronize()

    def __repr__(self) -> str:
        return f"CudaLane({self._stream.device}, {self.pointer:#x})"


class CudaAccelerator(Accelerator):
    """The GPU that torch calls ``cuda:index`` in this process."""

    def __init__(self, index: int = 0) -> None:
        """Raises `WrongDeviceError` where there is no such GPU."""
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if not 0 <= index < count:
            raise WrongDeviceError(
                f"cuda:{index} is not there: torch {torch.__version__} sees {count} GPUs; look at nvidia-smi, CUDA_VISIBLE_DEVICES and"
                " whether this torch was built for CUDA"
            )
        self._device = torch.device("cuda", index)
        self._lock = threading.Lock()
        self._modules: dict[KernelSource, Any] = {}
        self._functions: dict[Kernel, Any] = {}
        self._peers: dict[int, bool] = {index: True}

    @property
    def device(self) -> torch.device:
        return self._device

    @property
    def launches(self) -> bool:
        """As in the interface: whether cupy is there and finds what it compiles with. Logs once what to install if not."""
        return self._compiles

    @cached_property
    def _compiles(self) -> bool:
        try:
            self.load(_NOTHING)
        except Exception as error:  # cupy raises whatever its libraries do
            logger.warning(
                "%s: tensors are copied by torch, one at a time, as cupy compiles no kernels (%s): %s", self._device, error, install_cupy()
            )
            return False
        return True

    @cached_property
    def width(self) -> int:
        return int(torch.cuda.get_device_properties(self._device).multi_processor_count) * _BLOCKS_A_MULTIPROCESSOR

    def reaches(self, device: torch.device) -> bool:
        """As in the interface. Asking for a peer for the first time has it mapped."""
        if device.type != "cuda" or device.index is None:
            return False
        with self._lock:
            if device.index not in self._peers:
                self._peers[device.index] = self._map_peer(device)
            return self._peers[device.index]

    def _map_peer(self, peer: torch.device) -> bool:
        if not torch.cuda.can_device_access_peer(self._device, peer):
            return False
        # torch maps two devices' memory, what its allocator will map later too, when it first copies from one to the other.
        with _device_errors(self._device):
            here = torch.zeros(1, dtype=torch.uint8, device=self._device)
            there = here.to(peer)
            here.copy_(there)
        return True

    def lane(self, *, alone: bool = False) -> CudaLane:
        """As in the interface: torch hands out the same 32 streams again and again, so those that are to be alone are cupy's. They have
        another priority than torch's and NCCL's own, of which there are more than queues of the device."""
        with _device_errors(self._device):
            if not alone or not self.launches:
                return CudaLane(torch.cuda.Stream(self._device))  # type: ignore[no-untyped-call]
            import cupy

            with cupy.cuda.Device(self._device.index):
                stream = cupy.cuda.Stream(non_blocking=True, priority=-1)
            return CudaLane(torch.cuda.ExternalStream(stream.ptr, self._device), stream)  # type: ignore[no-untyped-call]

    def current(self) -> CudaLane:
        return CudaLane(torch.cuda.current_stream(self._device))

    def empty(self, nbytes: int) -> torch.Tensor:
        """As in the interface. Waits for torch's current lane: torch gives memory again that was let go of while what that lane was handed
        still used it, which is in order there, but not on the other lanes that this is for."""
        with _device_errors(self._device):
            memory = torch.empty(nbytes, dtype=torch.uint8, device=self._device)
            torch.cuda.current_stream(self._device).synchronize()
            return memory

    def load(self, kernel: Kernel) -> None:
        with self._cupy_errors(kernel):
            self._function(kernel)

    def launch(self, kernel: Kernel, blocks: int, arguments: Sequence[int | torch.Tensor], lane: Lane) -> None:
        values = tuple(np.int64(each.data_ptr() if isinstance(each, torch.Tensor) else each) for each in arguments)
        with self._cupy_errors(kernel):
            self._function(kernel)((blocks,), (kernel.threads,), values, stream=_Stream(lane.pointer))

    def _function(self, kernel: Kernel) -> Any:
        """``kernel`` as cupy has it, in the device's memory. This device is cupy's current one."""
        import cupy

        with self._lock:
            function = self._functions.get(kernel)
            if function is None:
                module = self._modules.get(kernel.source)
                if module is None:
                    module = cupy.RawModule(code=kernel.source.code, options=kernel.source.options, backend="nvrtc")
                    self._modules[kernel.source] = module
                function = module.get_function(kernel.name)
                _ = function.num_regs  # asking is what compiles it
                self._functions[kernel] = function
            return function

    @contextlib.contextmanager
    def _cupy_errors(self, kernel: Kernel) -> Iterator[None]:
        """Within, this device is cupy's current one, and its errors are ours."""
        import cupy

        try:
            with cupy.cuda.Device(self._device.index):
                yield
        except (cupy.cuda.compiler.CompileException, RuntimeError, OSError) as error:
            # CUDA's own errors are RuntimeErrors, and so is that of a compiler that is not there.
            raise TransferError(f"{self._device}: kernel {kernel.name} could not be compiled or launched: {error}") from error

    def __repr__(self) -> str:
        return f"CudaAccelerator({self._device})"


@dataclass(frozen=True, slots=True)
class _Stream:
    """All that a launch asks of a stream. One of cupy's own, made over torch's, has ended it in some versions when it was collected."""

    ptr: int


@contextlib.contextmanager
def _device_errors(device: torch.device) -> Iterator[None]:
    """Turns what torch raises for a device's own failures into `TransferError`."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        free, total = (count / _GIB for count in torch.cuda.mem_get_info(device))
        held = torch.cuda.memory_reserved(device) / _GIB
        raise TransferError(
            f"{device} has too little memory: {free:.2f} of its {total:.2f} GiB are free, and this process holds {held:.2f} GiB;"
            f" leave the agent more, or use a smaller bucket_size ({_first_line(error)})"
        ) from error
    except torch.AcceleratorError as error:
        raise TransferError(
            f"{device} reports: {_first_line(error)}. What ran there before may have failed too; restart the agent"
        ) from error


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]
