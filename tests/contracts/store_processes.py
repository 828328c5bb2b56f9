"""Processes of their own that open a store and do one job with it: what the contracts of the stores kill, stop and wait for."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import threading
from collections.abc import Callable
from functools import partial
from typing import Protocol

from etha_ray.errors import LeaseExpiredError
from etha_ray.kvstore import KVStore, Lease
from tests.fresh import fresh

Job = Callable[..., object]
"""Called with the store, then with the arguments that came with it. A function of a module, as it goes to another process."""


class StoreProcess(Protocol):
    """A process with a job."""

    @property
    def pid(self) -> int: ...

    def join(self) -> None:
        """Waits until the job is done; fails if it failed."""

    def kill(self) -> None:
        """Ends the process by SIGKILL, and waits until it has ended."""


StoreInAProcess = Callable[..., StoreProcess]
"""(namespace, job, *arguments): starts a process that opens a store of the namespace and does the job."""


def in_processes(open_store: Callable[[str], KVStore]) -> tuple[StoreInAProcess, Callable[[], None]]:
    """A `StoreInAProcess` of processes forked from a clean one, and what ends those that still run.

    ``open_store`` makes a store of a namespace there: a function of a module, or a partial of one.
    """
    started: list[_Forked] = []

    def start(namespace: str, job: Job, *arguments: object) -> StoreProcess:
        work = pickle.dumps((partial(open_store, namespace), job, arguments))
        process = fresh.Process(target=_do, args=(dict(os.environ), work), daemon=True)
        process.start()
        started.append(_Forked(process))
        return started[-1]

    def end() -> None:
        for process in started:
            process.kill()

    return start, end


def _do(settings: dict[str, str], work: bytes) -> None:
    os.environ.update(settings)  # the clean process may be older than these, and Ray reads its own when it is imported
    open_store, job, arguments = pickle.loads(work)
    store = open_store()
    job(store, *arguments)
    store.close(cleanup=False)


class _Forked:
    def __init__(self, process: multiprocessing.context.ForkServerProcess) -> None:
        self._process = process

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    def join(self) -> None:
        self._process.join(100)
        assert self._process.exitcode == 0

    def kill(self) -> None:
        if self._process.exitcode is None:
            os.kill(self.pid, signal.SIGKILL)
        self._process.join()


def add_often(store: KVStore, key: str, count: int) -> None:
    """Adds 1 ``count`` times."""
    for _ in range(count):
        store.add(key, 1)


def write_often(store: KVStore, prefix: str, count: int) -> None:
    """Sets, updates and deletes three keys under the prefix in turns, ``count`` times; says at the end that it is done."""
    for n in range(count):
        key = f"{prefix}/{n % 3}"
        if n % 5 == 4:
            store.delete(key)
        elif n % 2:
            store.set(key, str(n))
        else:
            store.compare_and_set(key, store.get(key), b"%d" % n)
    store.set(f"{prefix}/done", "1")


def leased(store: KVStore, ttl: float, *keys: str, value: str = "1", renew: bool = False) -> Lease:
    """A lease under which the keys are: of ``ttl`` seconds, or more where the machine was too slow to set them within these."""
    while True:
        lease = store.lease(ttl, renew=renew)
        try:
            for key in keys:
                lease.set(key, value)
        except LeaseExpiredError:
            ttl *= 2
        else:
            return lease


def hold_lease(store: KVStore, ttl: float) -> None:
    """Keeps the keys ``held/*`` under a lease, says so in ``ttl``, and sets another when told to in ``go``; its end is in ``outcome``."""
    lease = leased(store, ttl, "held/a", "held/b", renew=True)
    store.set("ttl", str(lease.ttl))
    store.wait_for_key("go", 100)
    try:
        lease.set("held/late", "1")
        store.set("outcome", "set")
    except LeaseExpiredError:
        store.set("outcome", "expired")
    threading.Event().wait(100)
