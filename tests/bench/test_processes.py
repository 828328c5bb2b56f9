"""Worker processes answer, fail aloud, and end with their benchmark."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

from etha_ray.bench.processes import BenchError, Workers, leaving_on_sigterm

_WAIT = 30.0


def _gone(pid: int) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        psutil.wait_procs([psutil.Process(pid)], timeout=_WAIT)
    return not psutil.pid_exists(pid)


def test_a_worker_answers_fails_aloud_and_ends_with_its_block() -> None:
    with Workers() as workers:
        worker = workers.start("copy", "copier 7")
        worker.call("hold", nbytes=4096, threads=1)
        times = worker.call("copy", at=0.0, how="torch")
        assert len(times) == 1
        assert times[0][0] <= times[0][1]
        with pytest.raises(BenchError, match=r"(?s)copier 7 failed:.*AttributeError"):
            worker.call("no_such_method")
        worker.call("copy", at=0.0, how="memmove")
    assert _gone(worker.pid)


def test_workers_end_when_the_block_is_left_by_an_error() -> None:
    pids = []

    def fail() -> None:
        with Workers() as workers:
            pids.append(workers.start("queue", "queue worker").pid)
            raise RuntimeError("on purpose")

    with pytest.raises(RuntimeError, match="on purpose"):
        fail()
    assert _gone(pids[0])


def test_a_worker_that_died_is_named() -> None:
    with Workers() as workers:
        worker = workers.start("copy", "copier 8")
        os.kill(worker.pid, signal.SIGKILL)
        with pytest.raises(BenchError, match="copier 8 ended with code -9"):
            worker.call("hold", nbytes=1, threads=1)


def test_sigterm_unwinds() -> None:
    def terminated() -> None:
        with leaving_on_sigterm():
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(_WAIT)

    with pytest.raises(SystemExit) as left:
        terminated()
    assert left.value.code == 128 + signal.SIGTERM


def test_workers_end_when_the_benchmark_is_killed() -> None:
    program = (
        "from etha_ray.bench.processes import Workers\n"
        "import time\n"
        "with Workers() as workers:\n"
        "    worker = workers.start('copy', 'copier')\n"
        "    worker.call('hold', nbytes=1, threads=1)\n"
        "    print(worker.pid, flush=True)\n"
        "    time.sleep(60)\n"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        parent.kill()
    assert _gone(pid)
