"""A device that works beside the calling thread: memory of its own, lanes on which work is done in order, kernels.

`transport/` stands on this interface and not on CUDA, so all but a device's own calls runs, and is tested, on machines without one.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager

import torch


class Lane(ABC):
    """Work that a device does in the order in which it was handed over, beside what is on its other lanes: a CUDA stream."""

    @property
    @abstractmethod
    def pointer(self) -> int:
        """What libraries call it by: a ``cudaStream_t``."""

    @abstractmethod
    def current(self) -> AbstractContextManager[None]:
        """Within, torch's own calls on this thread go to this lane."""

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

    @abstractmethod
    def lane(self) -> Lane:
        """A new lane."""

    @abstractmethod
    def empty(self, nbytes: int) -> torch.Tensor:
        """``nbytes`` bytes of its memory (uint8), aligned to 256.

        Raises:
            TransferError: it has not so much; the message says how much it has.
        """

    @abstractmethod
    def launch(self, kernel: str, blocks: int, arguments: Sequence[int | torch.Tensor], lane: Lane) -> None:
        """Hand a kernel of ``transport/kernels/kernels.cu`` over to ``lane``, with ``blocks`` blocks; tensors stand for their addresses.

        The caller keeps the tensors until it is done.
        """
