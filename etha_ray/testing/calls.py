"""Calls that wait for one another, made by one test: each on a thread of its own."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

PATIENCE = 60.0
"""Seconds that are never reached, unless something that must happen does not."""


def together(*calls: Callable[[], Any], timeout: float = PATIENCE) -> list[Any]:
    """Run the calls at the same time; what each returned, or the exception that it raised.

    Raises TimeoutError if one has not returned after so many seconds.
    """
    return _run_all(calls, timeout)[0]


def succeed(*calls: Callable[[], Any], timeout: float = PATIENCE) -> list[Any]:
    """Like `together`, but an exception is raised: the first one, as those after it often only follow from it."""
    results, raised = _run_all(calls, timeout)
    if raised:
        raise raised[0]
    return results


def eventually(condition: Callable[[], object], timeout: float = PATIENCE) -> None:
    """Wait until ``condition()`` is true. Raises TimeoutError if it is not after so many seconds."""
    deadline = time.monotonic() + timeout
    while not condition():
        if time.monotonic() >= deadline:
            raise TimeoutError(f"it did not happen within {timeout:g} s")
        time.sleep(0.002)


def _run_all(calls: Sequence[Callable[[], Any]], timeout: float) -> tuple[list[Any], list[BaseException]]:
    results: list[Any] = [None] * len(calls)
    raised: list[BaseException] = []

    def run(index: int) -> None:
        try:
            results[index] = calls[index]()
        except BaseException as error:
            raised.append(error)
            results[index] = error

    threads = [threading.Thread(target=run, args=(index,), daemon=True) for index in range(len(calls))]
    deadline = time.monotonic() + timeout
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))
    if any(thread.is_alive() for thread in threads):
        raise TimeoutError(f"a call has not returned after {timeout:g} s" + (f"; another raised {raised[0]!r}" if raised else ""))
    return results, raised
