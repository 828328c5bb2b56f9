"""A device that works beside the calling thread: memory of its own, lanes on which work is done in order, kernels.

`transport/` stands on this interface and not on CUDA, so all but a device's own calls runs, and is tested, on machines without one.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch


@dataclass(frozen=True, slots=True)
class KernelSource:
    """CUDA C++ that includes nothing, and the constants that it is compiled with (``-DNAME=VALUE``)."""

    code: str = field(repr=False)
    constants: tuple[tuple[str, int], ...]

    @property
    def options(self) -> tuple[str, ...]:
        """What a compiler is given; every one takes the same."""
        return ("-std=c++17", *(f"-D{name}={value}" for name, value in self.constants))


@dataclass(frozen=True, slots=True)
class Kernel:
    """An ``extern "C"`` function of a source. All its parameters are 8 bytes wide: integers and addresses."""

    source: KernelSource
    name: str
    threads: int
    """Of each block."""


class Lane(ABC):
    """Work that a device does in the order in which it was handed over, beside what is on its other lanes: a CUDA stream."""

    @property
    @abstractmethod
    def pointer(self) -> int:
        """What libraries call it by: a ``cudaStream_t``."""

    @abstractmethod
    def current(self) -> AbstractContextManager[None]:
        """Within, torch's own calls on this thread go to this lane, and what the device finds wrong with them is a `TransferError`."""

    @abstractmethod
    def after(self, other: Lane) -> None:
        """Have what is handed over from now on wait for what ``other`` has been handed until now. Does not wait itself."""

    @abstractmethod
    def done(self) -> bool:
        """Whether all that was handed over is done. Does not wait.

        Raises:
            TransferError: the device reports that something on it failed.
        """

    @abstractmethod
    def wait(self) -> None:
        """Return once all that was handed over is done; lets go of the GIL.

        Raises:
            TransferError: the device reports that something on it failed.
        """


class Accelerator(ABC):
    """One device. All methods may be called from any thread."""

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """As torch calls it in this process."""

    @property
    @abstractmethod
    def launches(self) -> bool:
        """Whether it can compile and launch kernels. Without that, torch's own calls still work on its lanes."""

    @property
    @abstractmethod
    def width(self) -> int:
        """How many blocks keep it busy."""

    @abstractmethod
    def reaches(self, device: torch.device) -> bool:
        """Whether its kernels may read and write the memory of ``device``: its own, or that of a peer that it can map."""

    @abstractmethod
    def lane(self, *, alone: bool = False) -> Lane:
        """A lane. A device has few, so some may be the same; one that is ``alone`` is not.

        Whatever waits on its lane for something outside the device must have it alone, or unrelated work waits behind it.
        """

    @abstractmethod
    def current(self) -> Lane:
        """The lane that torch's own calls on this thread go to now."""

    @abstractmethod
    def empty(self, nbytes: int) -> torch.Tensor:
        """``nbytes`` bytes of its memory (uint8), aligned to 256, for any lane: nothing that was handed over before uses them.

        Raises:
            TransferError: it has not so much; the message says how much it has.
        """

    def upload(self, data: np.ndarray[Any, Any]) -> torch.Tensor:
        """The bytes of ``data`` in its memory (uint8), all there when this returns.

        Raises:
            TransferError: as `empty`.
        """
        memory = self.empty(data.nbytes)
        if data.nbytes:
            with self.current().current():
                memory.copy_(torch.from_numpy(np.ascontiguousarray(data).reshape(-1).view(np.uint8)))
        return memory

    @abstractmethod
    def load(self, kernel: Kernel) -> None:
        """Compile ``kernel``, so that its first launch takes no longer than any other.

        Raises:
            TransferError: it cannot be compiled for this device; the message has the compiler's own.
        """

    @abstractmethod
    def launch(self, kernel: Kernel, blocks: int, arguments: Sequence[int | torch.Tensor], lane: Lane) -> None:
        """Hand ``kernel`` over to ``lane``, with ``blocks`` blocks; tensors stand for their addresses.

        The caller keeps the tensors until it is done.

        Raises:
            TransferError: the device does not take it.
        """
