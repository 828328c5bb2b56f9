"""Start an application of actors/ as a process of its own, the way a user does."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import psutil

from etha_ray.tensor_bus.leftovers import sweep
from etha_ray.testing import eventually
from tests.conftest import left_behind

ROOT = Path(__file__).parents[2]


def environment() -> dict[str, str]:
    """This process's environment, without a Ray cluster that it may name."""
    return {name: value for name, value in os.environ.items() if not name.startswith("RAY_") or name == "RAY_worker_niceness"}


def start(module: str, *arguments: str, cluster: str | None = None) -> subprocess.Popen[str]:
    """``python -m module arguments``, both outputs in one pipe; on the Ray ``cluster`` at this address, if one is given."""
    return subprocess.Popen(
        [sys.executable, "-u", "-m", module, *arguments],
        cwd=ROOT,
        env=environment() | ({} if cluster is None else {"RAY_ADDRESS": cluster}),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        # A shell that starts the tests in the background has them ignore interrupts, and this would inherit it.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def read_until(process: subprocess.Popen[str], text: str) -> str:
    """What the process prints up to the line that has this text. Fails when it ends before."""
    assert process.stdout is not None
    read = ""
    for line in process.stdout:
        read += line
        if text in line:
            return read
    raise AssertionError(f"{text!r} was never printed:\n{read}")


class Traces:
    """By what a main job is known on this host, looked for as long as it runs: its pool's name, and Ray's processes."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process
        self._namespaces, self._pids = set[str](), set[int]()
        self._looking = threading.Thread(target=self._look, daemon=True)
        self._looking.start()

    def _look(self) -> None:
        while self._process.poll() is None:
            self._namespaces |= {folder.name for folder in Path(f"/tmp/etha_ray_{os.getuid()}").glob(f"weight-sync-{self._process.pid}-*")}
            with contextlib.suppress(psutil.NoSuchProcess):
                self._pids |= {child.pid for child in psutil.Process(self._process.pid).children(recursive=True)}
            time.sleep(0.1)

    def assert_gone(self) -> None:
        """The job has ended. No file, no shared memory and no process is left, nor a semaphore once the next pool has swept the dead's."""
        self._looking.join()
        (namespace,) = self._namespaces

        def left() -> list[Any]:
            sweep()
            return [*left_behind(namespace, {self._process.pid, *self._pids}), *filter(psutil.pid_exists, self._pids)]

        with contextlib.suppress(TimeoutError):
            eventually(lambda: not left())  # Ray's processes end a moment after their driver
        assert left() == []
