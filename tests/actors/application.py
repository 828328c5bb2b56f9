"""Start an application of actors/ as a process of its own, the way a user does."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import psutil

from etha_ray.tensor_bus.semaphores import sweep_dead
from tests.conftest import left_behind

ROOT = Path(__file__).parents[2]


def environment() -> dict[str, str]:
    """This process's environment, without a Ray cluster that it may name."""
    return {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}


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


@dataclass(frozen=True)
class Traces:
    """By what a running main job is known on this host: its pool's name, and the processes that Ray started for it."""

    namespace: str
    pids: tuple[int, ...]

    @classmethod
    def of(cls, process: subprocess.Popen[str]) -> Traces:
        """Those of a job that has synced its first version."""
        (folder,) = Path(f"/tmp/etha_ray_{os.getuid()}").glob(f"weight-sync-{process.pid}-*")
        children = psutil.Process(process.pid).children(recursive=True)
        return cls(folder.name, (process.pid, *(child.pid for child in children)))

    def assert_gone(self) -> None:
        """No file, no shared memory and no process is left, and no semaphore once the next pool has swept those of the dead."""
        deadline = time.monotonic() + 20
        while left := [*left_behind(self.namespace, self.pids), *filter(psutil.pid_exists, self.pids[1:])]:
            assert time.monotonic() < deadline, left  # Ray's processes end a moment after their driver
            time.sleep(0.1)
            sweep_dead()
