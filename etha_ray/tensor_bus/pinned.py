"""The device that an agent is pinned to, what moves bytes there, and what carries them from there to other GPUs.

An agent on a GPU that it cannot use serves CPU tensors all the same: the nodes of a cluster may say that they have GPUs, and their torch
have no CUDA. Its record says what is wrong, so that a worker which comes with a tensor on that GPU hears it at once.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import cached_property

from etha_ray.accelerator import Accelerator, CudaAccelerator
from etha_ray.cuda.gpus import find_gpu
from etha_ray.errors import ConfigError, OptionalDependencyError
from etha_ray.transport.base import OneSidedTransport
from etha_ray.transport.kernels import KernelTransport
from etha_ray.transport.mapped import MappedTransport
from etha_ray.transport.nccl import Communicators
from etha_ray.transport.nccl.cupy_nccl import CupyCommunicators

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Pinned:
    """``ordinal``: which GPU of this process the agent works with, None for none; ``gpu``: its UUID; ``trouble``: why it cannot be used."""

    device: str
    ordinal: int | None = None
    gpu: str = ""
    trouble: str = ""

    @classmethod
    def to(cls, device: str, ordinal: int | None = None) -> Pinned:
        """The GPU of ``cuda:N``, which this process calls ``ordinal``, by default N; or none, for ``cpu``.

        Raises:
            ConfigError: it is neither.
        """
        kind, _, number = device.partition(":")
        if device == "cpu":
            return cls(device)
        if kind != "cuda" or not number.isdigit():
            raise ConfigError(f'device {device!r} is not understood: give "cpu" or "cuda:0", "cuda:1", ...')
        found = int(number) if ordinal is None else ordinal
        gpu = find_gpu(found)
        if not gpu.uuid:
            logger.warning("%s cannot be used, and its agent serves CPU tensors alone: %s", device, gpu.trouble)
        return cls(device, found if gpu.uuid else None, *gpu)

    @cached_property
    def accelerator(self) -> Accelerator | None:
        """The GPU, to work with.

        Raises:
            WrongDeviceError: torch does not see the GPU that CUDA's driver sees.
        """
        return None if self.ordinal is None else CudaAccelerator(self.ordinal)

    def transport(self, threads: int) -> OneSidedTransport:
        """What moves bytes between mapped tensors, those on the CPU with so many threads. Raises as `accelerator`."""
        accelerator, host = self.accelerator, MappedTransport(threads)
        return host if accelerator is None else KernelTransport(accelerator, host)

    def communicators(self) -> Communicators | str:
        """What carries bytes to other agents' GPUs; or why there is none, with what to install."""
        if self.accelerator is None:
            return self.trouble or f"it is pinned to {self.device!r}"
        try:
            return CupyCommunicators(self.accelerator)
        except OptionalDependencyError as error:
            return str(error)
