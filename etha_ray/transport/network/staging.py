"""Host memory for what cannot go straight from or into a tensor: buffers that are lent, and a limit that is never passed."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from etha_ray.errors import ConfigError

MIN_BUCKET_SIZE = 4096
"""Bytes. Smaller ones would be headers more than data."""


def fitting(bucket_size: int, limit: int) -> int:
    """The size of buckets that are staged within ``limit`` bytes, half of a memory budget. Raises `ConfigError` below `MIN_BUCKET_SIZE`."""
    if bucket_size < MIN_BUCKET_SIZE:
        raise ConfigError(f"bucket_size of {bucket_size} bytes is too small: give {MIN_BUCKET_SIZE} at least")
    return min(bucket_size, limit)


def _allocate(nbytes: int) -> torch.Tensor:
    return torch.empty(nbytes, dtype=torch.uint8)


class Staging:
    """Lends buffers of at most ``limit`` bytes altogether, those kept for the next borrower among them.

    A thread must not borrow a second one while it has one. Then everybody gets theirs in the end, if what they do with it
    does not wait for another borrower; that is why sending and receiving have a staging each (see `NetworkTransport`).
    """

    def __init__(self, limit: int, allocate: Callable[[int], torch.Tensor] = _allocate) -> None:
        """``allocate``: makes a buffer of this host's memory (uint8)."""
        self.limit = limit
        self._allocate = allocate
        self.peak = 0
        """Most bytes that there were at a time, lent or kept."""
        self._lent = 0
        self._kept: list[torch.Tensor] = []
        self._changed = threading.Condition()

    @contextmanager
    def borrow(self, nbytes: int) -> Iterator[torch.Tensor]:
        """A buffer of at least ``nbytes`` bytes (uint8), aligned to 64; waits until there is one. ``nbytes`` within `limit`."""
        buffer = self._take(nbytes)
        try:
            yield buffer
        finally:
            with self._changed:
                self._lent -= buffer.nbytes
                self._kept.append(buffer)
                self._changed.notify_all()  # they may want different sizes

    def clear(self) -> None:
        """Give back what is not lent."""
        with self._changed:
            self._kept.clear()

    def _take(self, nbytes: int) -> torch.Tensor:
        size = 1 << max(12, (nbytes - 1).bit_length())  # few sizes, so that those kept fit
        size = min(size, self.limit)
        with self._changed:
            self._changed.wait_for(lambda: self._lent + size <= self.limit)
            for index, kept in enumerate(self._kept):
                if kept.nbytes == size:
                    self._lent += size
                    return self._kept.pop(index)
            while self._lent + size + sum(kept.nbytes for kept in self._kept) > self.limit:
                self._kept.pop(0)
            made = self._allocate(size)
            self._lent += size
            self.peak = max(self.peak, self._lent + sum(kept.nbytes for kept in self._kept))
            return made
