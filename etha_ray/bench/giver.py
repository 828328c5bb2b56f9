"""The other process of a bench: it holds one side, and does what it is asked to over a pipe."""

from __future__ import annotations

import contextlib
import multiprocessing
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection as Pipe
from typing import Any

from etha_ray.bench.processes import BenchError

TIMEOUT = 60.0
"""Seconds that it may take to answer."""

_LEAVE_TIMEOUT = 10.0


@contextlib.contextmanager
def open_giver(life: Callable[..., None], *arguments: Any) -> Iterator[Pipe]:
    """A process that calls ``life`` with its end of a pipe and the arguments; it ends when the block is left, or when this process does."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=life, args=(there, *arguments), name="giver", daemon=True)
    process.start()
    there.close()
    try:
        with here:
            yield here
    finally:
        process.join(_LEAVE_TIMEOUT)
        if process.is_alive():
            process.kill()
            process.join()


def answer(giver: Pipe) -> str:
    """What the giving process says next. Raises `BenchError` when it says nothing, or has ended."""
    if not giver.poll(TIMEOUT):
        raise BenchError(f"the giving process has not answered for {TIMEOUT:g} s: the machine is overloaded, or it is stuck")
    try:
        return giver.recv_bytes().decode()
    except EOFError:
        raise BenchError("the giving process ended; see its log above") from None
