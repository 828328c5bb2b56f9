"""Worker processes of a benchmark: started, asked over their pipes, and ended on every way out.

A worker runs ``python -m etha_ray.bench.worker ROLE`` and answers each line of JSON on its standard input with one on its
standard output. It ends when its standard input closes, so it does not outlive a benchmark that was killed.
"""

from __future__ import annotations

import contextlib
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from types import FrameType, TracebackType
from typing import Any

import msgspec

from etha_ray.errors import EthaRayError

_ANSWER_TIMEOUT = 300.0
_LEAVE_TIMEOUT = 15.0
_TERMINATE_TIMEOUT = 3.0


class BenchError(EthaRayError, RuntimeError):
    """A benchmark could not be run, or moved wrong bytes."""


class Request(msgspec.Struct):
    """What a worker is asked: the method of its role, and the arguments."""

    call: str
    arguments: dict[str, Any]


class Answer(msgspec.Struct):
    """What it answers: the method's value, or the traceback of what it raised."""

    value: Any = None
    error: str = ""


class WorkerProcess:
    """One worker. Not for several threads."""

    def __init__(self, role: str, name: str) -> None:
        self.name = name
        self._process = subprocess.Popen(
            [sys.executable, "-m", "etha_ray.bench.worker", role], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )

    @property
    def pid(self) -> int:
        """The worker's process."""
        return self._process.pid

    def ask(self, call: str, **arguments: Any) -> None:
        """Have the worker start on ``call``; every `ask` needs its `answer` before the next."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(msgspec.json.encode(Request(call, arguments)) + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise BenchError(
                f"{self.name} ended with code {self._process.wait(_TERMINATE_TIMEOUT)} before it was asked to {call}"
            ) from None

    def answer(self, timeout: float = _ANSWER_TIMEOUT) -> Any:
        """What the worker answers. Raises `BenchError` when it fails, dies or takes longer than ``timeout`` seconds."""
        assert self._process.stdout is not None
        if not select.select([self._process.stdout], [], [], timeout)[0]:
            raise BenchError(f"{self.name} has not answered for {timeout:g} s: the machine is overloaded, or it is stuck")
        line = self._process.stdout.readline()
        if not line:
            raise BenchError(
                f"{self.name} ended with code {self._process.wait(_TERMINATE_TIMEOUT)} instead of answering; see its log above"
            )
        answer = msgspec.json.decode(line, type=Answer)
        if answer.error:
            raise BenchError(f"{self.name} failed:\n{answer.error}")
        return answer.value

    def call(self, call: str, **arguments: Any) -> Any:
        """`ask`, then `answer`."""
        self.ask(call, **arguments)
        return self.answer()

    def _exit_code(self) -> int:
        return self._process.wait(_TERMINATE_TIMEOUT)

    def leave(self) -> None:
        """Tell the worker to end; do not wait."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()

    def end(self, deadline: float) -> None:
        """Wait until the worker has ended; after ``deadline`` (monotonic) end it."""
        for stop in (self._process.terminate, self._process.kill):
            try:
                self._process.wait(max(0.1, deadline - time.monotonic()))
                break
            except subprocess.TimeoutExpired:
                stop()
                deadline = time.monotonic() + _TERMINATE_TIMEOUT
        else:
            self._process.wait()
        assert self._process.stdout is not None
        self._process.stdout.close()


class Workers:
    """Worker processes that end together when the ``with`` block is left, however it is left."""

    def __init__(self) -> None:
        self._workers: list[WorkerProcess] = []

    def start(self, role: str, name: str) -> WorkerProcess:
        """Start one more."""
        worker = WorkerProcess(role, name)
        self._workers.append(worker)
        return worker

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for worker in self._workers:
            worker.leave()
        deadline = time.monotonic() + _LEAVE_TIMEOUT
        for worker in self._workers:
            worker.end(deadline)


def call_all(workers: Sequence[WorkerProcess], call: str, **arguments: Any) -> list[Any]:
    """Have all workers do the same at the same time; their answers in order."""
    for worker in workers:
        worker.ask(call, **arguments)
    return [worker.answer() for worker in workers]


@contextlib.contextmanager
def leaving_on_sigterm() -> Iterator[None]:
    """Within the block SIGTERM unwinds as `SystemExit` does, so that every worker is ended. Main thread only."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def leave(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
