"""Marks on a GPU's streams that another process can see being passed: CUDA's interprocess events.

A worker marks its stream, and goes on; its agent sees when the GPU has come there, and so has done all that was launched before.
"""

from __future__ import annotations

import logging
import threading
import weakref
from typing import Any

import torch

from etha_ray.errors import TransferError

logger = logging.getLogger(__name__)


class Mark:
    """A mark that this process sets on its streams of GPU ``ordinal``, again and again. Others see the last time it was set."""

    def __init__(self, ordinal: int) -> None:
        self._device = torch.device("cuda", ordinal)
        self._event: Any = torch.cuda.Event(interprocess=True)  # type: ignore[no-untyped-call]
        self._handle = b""
        self._alone = False  # nobody else can see it

    def set(self) -> bytes:
        """Put it behind all that was launched on this thread's current stream; what others see it by. Does not wait.

        Where the system has no interprocess events it does wait, until there is nothing to wait for, and gives nothing.
        """
        with torch.cuda.device(self._device):
            self._event.record(torch.cuda.current_stream(self._device))
            if not self._handle and not self._alone:
                try:
                    self._handle = bytes(self._event.ipc_handle())
                except RuntimeError as error:
                    logger.warning("the GPU is waited for here rather than by the agent: %s", error)
                    self._alone = True
                else:
                    with _lock:
                        _own[self._handle] = self
            if self._alone:
                self._event.synchronize()
        return self._handle

    def passed(self) -> bool:
        """Whether the GPU has come to where it was set last."""
        return bool(self._event.query())


class MarksOfOthers:
    """Marks that other processes set, opened on GPU ``ordinal`` of this one, each once.

    From any thread. One process opens no mark of its own: that one is taken as it is.
    """

    def __init__(self, ordinal: int) -> None:
        self._device = torch.device("cuda", ordinal)
        self._opened: dict[bytes, Any] = {}
        self._opening = threading.Lock()

    def passed(self, handle: bytes) -> bool:
        """Whether the GPU has come to where the mark was set last.

        Raises:
            TransferError: there is no such mark (any more), or the GPU failed on its way there.
        """
        try:
            with _lock:
                own = _own.get(handle)
            if own is not None:
                return own.passed()
            with self._opening:
                if handle not in self._opened:
                    self._opened[handle] = torch.cuda.Event.from_ipc_handle(self._device, handle)  # type: ignore[no-untyped-call]
                event = self._opened[handle]
            return bool(event.query())
        except (RuntimeError, ValueError, TypeError) as error:
            raise TransferError(f"what the worker's GPU is to do first cannot be waited for: {error}") from error

    def forget(self, handle: bytes) -> None:
        """Nothing waits for this mark again."""
        with self._opening:
            self._opened.pop(handle, None)


_lock = threading.Lock()
_own: weakref.WeakValueDictionary[bytes, Mark] = weakref.WeakValueDictionary()


def settle(ordinal: int) -> None:
    """Wait until a GPU has done all that was launched on this thread's current stream."""
    torch.cuda.current_stream(ordinal).synchronize()
