"""The second memory of an atomic receive: what is read there first, and then copied into the worker's tensors.

It is the agent's own, as large as all tensors of the batch that receive something, and made at the first atomic receive; it stays with
the batch until that is closed.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from functools import partial

import torch

from etha_ray.errors import TransferError
from etha_ray.tensor_bus.executor import Inflow
from etha_ray.tensor_bus.feeding import Fed, Feed, Prepare
from etha_ray.transport.base import CopyProgram
from etha_ray.transport.joint import Move


class Staging:
    """``read`` does what is ``fed`` into the second memory, ``swap`` copies that into the tensors.

    ``prepare`` makes programs; it is called when one is run first, on the thread that runs it.
    """

    def __init__(self, fed: Sequence[Fed], prepare: Prepare) -> None:
        memory = _SecondMemory()
        self.read = Feed(fed, memory.within, prepare)
        self.swap: CopyProgram = _AtFirstRun(partial(_swap, [each.inflow for each in fed], memory, prepare))


class _SecondMemory:
    """As large as the tensors, and on their devices. Nothing of it refers to who uses it: it goes with the batch, and not at some later
    time when Python collects what refers to itself."""

    def __init__(self) -> None:
        self._tensors: dict[int, torch.Tensor] = {}
        self._lock = threading.Lock()

    def of(self, inflow: Inflow) -> torch.Tensor:
        """For the whole tensor of an inflow."""
        with self._lock:  # several programs of a feed may be prepared at a time
            if inflow.place not in self._tensors:
                try:
                    self._tensors[inflow.place] = torch.empty_like(inflow.tensor, memory_format=torch.contiguous_format)
                except torch.OutOfMemoryError as error:
                    raise TransferError(
                        f"tensor {inflow.place}: an atomic receive takes as much memory again as the tensors do, and there are no"
                        f" {inflow.tensor.nbytes} bytes more on {inflow.tensor.device} ({error}): free some, or receive in place"
                    ) from error
            return self._tensors[inflow.place]

    def within(self, inflow: Inflow) -> torch.Tensor:
        """For what an inflow fills."""
        return inflow.within(self.of(inflow))


def _swap(inflows: Sequence[Inflow], memory: _SecondMemory, prepare: Prepare) -> CopyProgram:
    tensors = {inflow.place: inflow for inflow in inflows}
    return prepare([Move((memory.of(inflow),), inflow.tensor) for inflow in tensors.values()])


class _AtFirstRun(CopyProgram):
    """A program that is prepared when it is run first."""

    def __init__(self, prepare: Callable[[], CopyProgram]) -> None:
        self._prepare = prepare
        self._program: CopyProgram | None = None

    @property
    def nbytes(self) -> int:
        return 0 if self._program is None else self._program.nbytes

    def run(self) -> int:
        if self._program is None:
            self._program = self._prepare()
        return self._program.run()
