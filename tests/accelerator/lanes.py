"""A host accelerator whose lanes do their work later, each on a thread of its own: what is handed over is not done when a call returns."""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from etha_ray.accelerator import Kernel, Lane
from tests.accelerator.host import HostAccelerator, HostLane


class QueuedLane(HostLane):
    """Has a thread while it has work."""

    def __init__(self) -> None:
        self._work: deque[Callable[[], object]] = deque()
        self._changed = threading.Condition()
        self._busy = False

    def hand_over(self, work: Callable[[], object]) -> None:
        with self._changed:
            self._work.append(work)
            if not self._busy:
                self._busy = True
                threading.Thread(target=self._run, name="lane", daemon=True).start()

    def _run(self) -> None:
        while True:
            with self._changed:
                if not self._work:
                    self._busy = False
                    self._changed.notify_all()
                    return
                work = self._work.popleft()
            work()

    @contextlib.contextmanager
    def current(self) -> Iterator[None]:
        with _Deferred(self):
            yield

    def after(self, other: Lane) -> None:
        if isinstance(other, QueuedLane):
            reached = threading.Event()
            other.hand_over(reached.set)
            self.hand_over(reached.wait)

    def done(self) -> bool:
        with self._changed:
            return not self._busy

    def wait(self) -> None:
        with self._changed:
            self._changed.wait_for(lambda: not self._busy)


class _Deferred(TorchDispatchMode):
    """What writes to memory is handed over; views are made at once."""

    def __init__(self, lane: QueuedLane) -> None:
        super().__init__()
        self._lane = lane

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if not func._schema.is_mutable:
            return func(*args, **(kwargs or {}))
        self._lane.hand_over(lambda: func(*args, **(kwargs or {})))
        return args[0]


class QueuedAccelerator(HostAccelerator):
    def lane(self, *, alone: bool = False) -> QueuedLane:
        return QueuedLane()

    def launch(self, kernel: Kernel, blocks: int, arguments: Sequence[int | torch.Tensor], lane: Lane) -> None:
        if not isinstance(lane, QueuedLane):
            return super().launch(kernel, blocks, arguments, lane)
        lane.hand_over(lambda: super(QueuedAccelerator, self).launch(kernel, blocks, arguments, HostLane()))
        return None
