"""Two hosts on one machine: this one, and a network namespace with a /dev/shm of its own, joined by a cable that can be cut."""

from __future__ import annotations

import contextlib
import ctypes
import os
import secrets
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from etha_ray.config import agent_paths
from etha_ray.kvstore.tcp import TorchTCPStore
from etha_ray.tensor_bus.leftovers import remove_files
from etha_ray.testing import eventually
from tests.fresh import fresh
from tests.net.namespaces import Cable, cable, join
from tests.tensor_bus import cluster as acts
from tests.tensor_bus.cluster import LONG, Worker

_CLONE_NEWNS = 0x20000


class TwoHosts:
    """Agents on two hosts, meeting in a TCP store on this one. Ranks ``0 .. near - 1`` are here, the rest over there."""

    run: Callable[[list[str]], None] = staticmethod(acts.run_agent)
    """What an agent does with its arguments."""

    def __init__(self, wire: Cable, near: int, far: int) -> None:
        self.cable = wire
        self.namespace = f"test-{os.getpid()}-{secrets.token_hex(4)}"
        self.master = TorchTCPStore(wire.here, 0, None, True, LONG, namespace=self.namespace)
        self.paths = [agent_paths(rank, self.namespace) for rank in range(near + far)]
        self.near, self.workers = near, list[Worker]()
        self.agents = list[Any]()
        for rank in range(near + far):
            self.agents.append(self._start(rank))

    def _start(self, rank: int) -> Any:
        # Every agent over there has a /dev/shm of its own: also among them no memory is shared.
        return self._started(rank, self.cable, *() if rank < self.near else (settle_over, self.cable.namespace))

    def _started(self, rank: int, cable: Cable, *go: Any) -> Any:
        """An agent that reaches the store by this cable, once it has gone where it is to live."""
        url = f"tcp://{cable.here}:{self.master.port}?master=0"
        agent = ["--store", url, "--rank", str(rank), "--namespace", self.namespace, "--threads", "1"]
        process = fresh.Process(target=_run, args=(self.run, agent, *go), daemon=True)
        process.start()
        return process

    def restart(self, rank: int) -> None:
        """Start an agent again that was killed."""
        eventually(lambda: remove_files(self.paths[rank]))  # of an agent of another host only its heartbeat tells
        self.agents[rank] = self._start(rank)

    def worker(self, rank: int) -> Worker:
        """A worker beside the agent of this rank, with a client."""
        worker = Worker()
        self.workers.append(worker)
        wait_for_client(self.paths[rank].state)
        if rank >= self.near:
            worker.call(go_over, self.agents[rank].pid)
        worker.call(acts.connect, rank, self.paths[rank])
        return worker

    def close(self) -> None:
        for worker in self.workers:
            worker.close()
        for agent in self.agents:
            agent.terminate()
        for agent in self.agents:
            agent.join(LONG)
            agent.kill()
            agent.join()
        self.master.close()
        for paths in self.paths:
            remove_files(paths)


class ManyHosts(TwoHosts):
    """As many hosts as ``counts`` says, with so many agents each: the first is this one. Agents of one host share memory.

    ``patient`` agents give one another all the time that is needed (`patient_agent`).
    """

    def __init__(self, cables: list[Cable], counts: list[int], *, patient: bool) -> None:
        if patient:
            self.run = patient_agent
        self.cables, self.host_of = cables, [host for host, count in enumerate(counts) for _ in range(count)]
        super().__init__(cables[0], counts[0], sum(counts[1:]))

    def _start(self, rank: int) -> Any:
        host = self.host_of[rank]
        cable, first = self.cables[max(0, host - 1)], self.host_of.index(host)
        if host == 0:
            return self._started(rank, cable)
        if rank == first:
            return self._started(rank, cable, settle_over, cable.namespace)
        wait_for_client(self.paths[first].state)
        return self._started(rank, cable, enter, self.agents[first].pid)


def _run(run: Callable[[list[str]], None], arguments: list[str], go: Callable[..., None] | None = None, *where: Any) -> None:
    if go is not None:
        go(*where)
    run(arguments)


def patient_agent(arguments: list[str]) -> None:
    """An agent that waits for relays, and for those that read from it, longer than a busy machine ever stands still. So who passes on to
    whom depends on nothing but who takes part."""
    from etha_ray.tensor_bus import relaying

    relaying._PATIENCE, relaying._LINGER = LONG, (LONG, LONG)
    acts.run_agent(arguments)


@contextlib.contextmanager
def many_hosts(*counts: int, patient: bool = False) -> Iterator[ManyHosts]:
    """Skips where network namespaces cannot be made."""
    with contextlib.ExitStack() as stack:
        cables = [stack.enter_context(cable()) for _ in counts[1:]]
        join(cables)
        yield stack.enter_context(contextlib.closing(ManyHosts(cables, list(counts), patient=patient)))


def wait_for_client(state_path: str) -> None:
    """Wait until the agent behind this state file is there."""
    eventually(Path(state_path).exists)


@contextlib.contextmanager
def two_hosts(near: int, far: int) -> Iterator[TwoHosts]:
    """Skips where network namespaces cannot be made."""
    with cable() as wire, contextlib.closing(TwoHosts(wire, near, far)) as hosts:
        yield hosts


def go_over(state: dict[str, Any], pid: int) -> None:
    """Have this worker live where the process ``pid`` lives."""
    enter(pid)


def enter(pid: int) -> None:
    """Have this process live where the process ``pid`` lives: in its network, and with its /dev/shm."""
    for kind in ("net", "mnt"):
        _join(f"/proc/{pid}/ns/{kind}")


def settle_over(namespace: str) -> None:
    """Have this process live in a network namespace, with a /dev/shm of its own."""
    _join(f"/run/netns/{namespace}")
    if _libc().unshare(_CLONE_NEWNS):
        raise OSError(ctypes.get_errno(), "cannot make a mount namespace")
    for mount in (["--make-rprivate", "/"], ["-t", "tmpfs", "tmpfs", "/dev/shm"]):
        subprocess.run(["mount", *mount], check=True)


def _join(namespace: str) -> None:
    descriptor = os.open(namespace, os.O_RDONLY)
    try:
        if _libc().setns(descriptor, 0):
            raise OSError(ctypes.get_errno(), f"cannot join {namespace}")
    finally:
        os.close(descriptor)


def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)
