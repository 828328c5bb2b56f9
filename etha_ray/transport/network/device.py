"""What the network transport has of its agent's device: what copies there, what may be under way, and NCCL or why there is none."""

from __future__ import annotations

import threading
from typing import Literal, TypeAlias

import torch

from etha_ray.accelerator import Accelerator
from etha_ray.errors import WrongDeviceError
from etha_ray.transport.base import Copy
from etha_ray.transport.kernels import KernelTransport, MessageSums
from etha_ray.transport.mapped import MappedTransport
from etha_ray.transport.nccl import Communicators
from etha_ray.transport.network.slots import Slots

_WARM_BYTES = 512

Path: TypeAlias = Literal["auto", "nccl", "tcp"]
"""How tensors on devices go between two agents: by NCCL where both can and by TCP where not, or always the one."""


class Device:
    """One agent's.

    Args:
        communicators: or why there are none, with what to install.
        memory_budget: bytes of staging memory on the device, half of it for each direction.
    """

    def __init__(self, accelerator: Accelerator, communicators: Communicators | str, memory_budget: int) -> None:
        self.accelerator = accelerator
        self.copier = KernelTransport(accelerator, MappedTransport(threads=1))
        self.communicators = None if isinstance(communicators, str) else communicators
        self.lacks = communicators if isinstance(communicators, str) else ""
        self.sending = Slots(accelerator, memory_budget // 2)
        self.receiving = Slots(accelerator, memory_budget // 2)
        self._lane = accelerator.lane()
        self._lock = threading.Lock()
        self._warm = False

    def holds(self, tensor: torch.Tensor) -> bool:
        """Whether the tensor is in the device's memory."""
        return tensor.device == self.accelerator.device

    def host_memory(self, nbytes: int) -> torch.Tensor:
        """Memory of this host (uint8) that is copied to the device and from it without a detour."""
        with self._lane.current():  # memory is pinned in the current device's context
            return torch.empty(nbytes, dtype=torch.uint8, pin_memory=self.accelerator.device.type == "cuda")

    def warm(self) -> None:
        """Have the device do once, for the first time, what a run has it do.

        It loads a kernel when it is first launched, and may wait then for all that it has under way: for messages, too, that wait for
        another device, which may be waiting for this one.
        """
        with self._lock:
            if self._warm:
                return
            memory, lane = self.accelerator.empty(_WARM_BYTES), self._lane
            whole_words_and_a_part, rest = memory.view(2, -1)[0, :-1], memory.view(2, -1)[1, :-1]
            sums = MessageSums(self.accelerator, [[whole_words_and_a_part]])
            copies = self.copier.prepare([Copy((whole_words_and_a_part,), rest)])
            sums.enqueue(lane)
            copies.enqueue(lane)
            lane.wait()
            self._warm = True

    @property
    def staging_nbytes(self) -> int:
        """Bytes of its memory that the slots have taken."""
        return self.sending.nbytes + self.receiving.nbytes


def check_device(tensor: torch.Tensor, device: Device | None, name: str) -> None:
    """Raise `WrongDeviceError`, which calls the tensor ``name``, unless it is in the memory of this host or of the agent's device."""
    if tensor.device.type == "cpu" or (device is not None and device.holds(tensor)):
        return
    has = "only the CPU" if device is None else f"the CPU and {device.accelerator.device}"
    raise WrongDeviceError(f"{name} is on {tensor.device}, and this agent has {has}: register it with the agent of its device")
