"""Transfers by communicator that a device may have at a time in one direction, each with its lanes and its staging memory.

On a device a message waits for its other end while it keeps a part of the device busy. So there are few of them at a time, or they
would fill it and wait for what cannot start. Who reads takes a slot of its own first, and then has the owner take one: always in
this order, so nobody waits in a circle.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator

import torch

from etha_ray.accelerator import Accelerator, Lane

SLOTS = 2
"""Transfers at a time and direction."""

DEPTH = 2
"""Rounds of a transfer under way: while one is on the wire, the next is packed, or the one before unpacked."""

ALIGNMENT = 256
"""Bytes. Every message that is staged begins at a multiple of it, as memory of devices does."""

_LOOK_EVERY = 0.02


class Slot:
    """A lane and a buffer for each round under way."""

    def __init__(self, accelerator: Accelerator, round_size: int, number: int) -> None:
        self.number = number
        self.lanes: tuple[Lane, ...] = tuple(accelerator.lane(alone=True) for _ in range(DEPTH))
        self._accelerator = accelerator
        self._round_size = round_size
        self._buffers: tuple[torch.Tensor, ...] | None = None
        self._lock = threading.Lock()

    def buffer(self, side: int) -> torch.Tensor:
        """Staging memory of a round's bytes for the lane of this number: the same at every call.

        Raises:
            TransferError: the device has no more memory.
        """
        with self._lock:
            if self._buffers is None:
                whole = self._accelerator.empty(DEPTH * self._round_size)
                self._buffers = tuple(whole.view(DEPTH, self._round_size))
            return self._buffers[side]

    @property
    def nbytes(self) -> int:
        """Bytes of staging memory that it has."""
        return 0 if self._buffers is None else DEPTH * self._round_size


class Slots:
    """All slots of a direction.

    Args:
        limit: bytes of staging memory of all of them.
    """

    def __init__(self, accelerator: Accelerator, limit: int) -> None:
        self.round_size = max(ALIGNMENT, limit // (SLOTS * DEPTH) // ALIGNMENT * ALIGNMENT)
        """Bytes of messages that a round may have."""
        self._accelerator = accelerator
        self.all = tuple(Slot(accelerator, self.round_size, number) for number in range(SLOTS))
        self._free = list(self.all)
        self._changed = threading.Condition()

    @contextlib.contextmanager
    def take(self, check: Callable[[], None]) -> Iterator[Slot]:
        """A slot, the first one if it is free; waits until there is one, while ``check`` raises nothing.

        Its lanes come after what torch's current lane has been handed until then.
        """
        with self._changed:
            while not self._free:
                self._changed.wait(_LOOK_EVERY)
                check()
            slot = min(self._free, key=lambda slot: slot.number)
            self._free.remove(slot)
        try:
            for lane in slot.lanes:
                lane.after(self._accelerator.current())
            yield slot
        finally:
            with self._changed:
                self._free.append(slot)
                self._changed.notify()

    @property
    def nbytes(self) -> int:
        """Bytes of staging memory that they have."""
        return sum(slot.nbytes for slot in self.all)
