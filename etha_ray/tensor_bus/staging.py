"""The second memory of an atomic receive: what is read there first, and then copied into the worker's tensors.

It is the agent's own, as large as all tensors of the batch that receive something, and made at the first atomic receive; it stays with
the batch until that is closed.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

import torch

from etha_ray.tensor_bus.executor import Inflow
from etha_ray.tensor_bus.feeding import Fed, Feed, Prepare
from etha_ray.transport.base import CopyProgram
from etha_ray.transport.joint import Move


class Staging:
    """``read`` does what is ``fed`` into the second memory, ``swap`` copies that into the tensors.

    ``prepare`` makes programs; it is called when one is run first, on the thread that runs it.
    """

    def __init__(self, fed: Sequence[Fed], prepare: Prepare) -> None:
        self._inflows, self._prepare = [each.inflow for each in fed], prepare
        self._memory: dict[int, torch.Tensor] = {}
        self._lock = threading.Lock()
        self.read = Feed(fed, self._staged, prepare)
        self.swap: CopyProgram = _AtFirstRun(self._prepare_swap)

    def _staged(self, inflow: Inflow) -> torch.Tensor:
        with self._lock:  # several programs of a feed may be prepared at a time
            if inflow.place not in self._memory:
                self._memory[inflow.place] = torch.empty(inflow.tensor.shape, dtype=inflow.tensor.dtype)
            return inflow.within(self._memory[inflow.place])

    def _prepare_swap(self) -> CopyProgram:
        tensors = {inflow.place: inflow.tensor for inflow in self._inflows}
        return self._prepare([Move((self._memory[place],), tensor) for place, tensor in tensors.items()])


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
