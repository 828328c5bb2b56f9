"""Any process made to stand still, as a debugger or an overloaded host does it."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator
from pathlib import Path

from etha_ray.testing import eventually


@contextlib.contextmanager
def standing_still(pid: int) -> Iterator[None]:
    """SIGSTOP for the block, which begins when all its threads stand still; then SIGCONT."""
    os.kill(pid, signal.SIGSTOP)
    try:
        eventually(lambda: all(_state(task) in "Tt" for task in Path(f"/proc/{pid}/task").iterdir()))
        yield
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)


def _state(task: Path) -> str:
    return (task / "stat").read_text().rpartition(")")[2].split()[0]


def gcs_pid() -> int:
    """Of the cluster that this process has started."""
    from ray._private import worker  # here, as not all who stop processes have Ray

    return int(worker._global_node.all_processes["gcs_server"][0].process.pid)
