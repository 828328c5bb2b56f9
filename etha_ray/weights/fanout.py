"""One push to several replicas at a time: each on a thread of its own, and nobody waits for stragglers longer than was said."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from typing import Generic, TypeVar

T = TypeVar("T")

_AGAIN = 0.5
"""Seconds after which stragglers are hurried again: their transfer may not have reached their agent yet, or be at another one by now."""


class Fanout(Generic[T]):
    """Does the same with each replica.

    Args:
        straggler_timeout: seconds that all others get once ``enough`` replicas are done; None for no limit.
        hurry: called with each of the others after that, again and again, until it is done. It may end at once, with an error.
    """

    def __init__(self, enough: int, straggler_timeout: float | None, hurry: Callable[[str], None]) -> None:
        self._enough, self._straggler_timeout, self._hurry = enough, straggler_timeout, hurry
        self._changed = threading.Condition()
        self._open: set[str] = set()
        self.done: dict[str, T] = {}
        self.failed: dict[str, BaseException] = {}
        self.late = False
        """Whether stragglers have had their time."""

    def run(self, replicas: Mapping[str, str], call: Callable[[str, str], T]) -> None:
        """Call ``call`` with each replica and what goes with it; returns when all are `done` or `failed`."""

        def settle(replica: str, more: str) -> None:
            try:
                self.done[replica] = call(replica, more)
            except Exception as error:
                self.failed[replica] = error
            finally:
                with self._changed:
                    self._open.discard(replica)
                    self._changed.notify_all()

        if not replicas:
            return
        self._open = set(replicas)
        (first, more), *others = replicas.items()
        threads = [threading.Thread(target=settle, args=each, name=f"etha-ray push {each[0]}", daemon=True) for each in others]
        if self._straggler_timeout is not None and others:
            threads.append(threading.Thread(target=self._see_to_stragglers, name="etha-ray stragglers", daemon=True))
        for thread in threads:
            thread.start()
        settle(first, more)
        for thread in threads:
            thread.join()

    def _see_to_stragglers(self) -> None:
        with self._changed:
            self._changed.wait_for(lambda: not self._open or len(self.done) >= self._enough)
            self._changed.wait_for(lambda: not self._open, self._straggler_timeout)
            self.late = True
        while self._open:
            for replica in tuple(self._open):
                self._hurry(replica)
            with self._changed:
                self._changed.wait_for(lambda: not self._open, _AGAIN)
