"""Two hosts on one machine: this one, and a network namespace with a /dev/shm of its own, joined by a cable that can be cut."""

from __future__ import annotations

import contextlib
import ctypes
import os
import secrets
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from etha_ray.config import agent_paths
from etha_ray.kvstore.tcp import TorchTCPStore
from etha_ray.tensor_bus.leftovers import remove_files
from etha_ray.testing import eventually
from tests.net.namespaces import Cable, cable, join
from tests.tensor_bus import cluster as acts
from tests.tensor_bus.cluster import LONG, Worker

_ROOT = Path(__file__).parents[2]
_OWN_SHM = 'mount --make-rprivate / && mount -t tmpfs tmpfs /dev/shm && exec "$@"'


class TwoHosts:
    """Agents on two hosts, meeting in a TCP store on this one. Ranks ``0 .. near - 1`` are here, the rest over there."""

    program = "etha_ray.tensor_bus.agent"

    def __init__(self, wire: Cable, near: int, far: int) -> None:
        self.cable = wire
        self.namespace = f"test-{os.getpid()}-{secrets.token_hex(4)}"
        self.master = TorchTCPStore(wire.here, 0, None, True, LONG, namespace=self.namespace)
        self.paths = [agent_paths(rank, self.namespace) for rank in range(near + far)]
        self.near, self.workers = near, list[Worker]()
        self.agents: list[subprocess.Popen[bytes]] = []
        for rank in range(near + far):
            self.agents.append(self._start(rank))

    def _start(self, rank: int) -> subprocess.Popen[bytes]:
        agent = self._command(rank, self.cable)
        if rank >= self.near:
            # Every agent over there has a /dev/shm of its own: also among them no memory is shared.
            agent = [*self.cable.over_there, "unshare", "--mount", "sh", "-c", _OWN_SHM, "sh", *agent]
        return subprocess.Popen(agent)

    def _command(self, rank: int, cable: Cable) -> list[str]:
        """An agent that reaches the store by this cable."""
        url = f"tcp://{cable.here}:{self.master.port}?master=0"
        agent = [sys.executable, "-m", self.program, "--store", url, "--rank", str(rank)]
        return [*agent, "--namespace", self.namespace, "--threads", "1"]

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
            try:
                agent.wait(LONG)
            except subprocess.TimeoutExpired:
                agent.kill()
                agent.wait()
        self.master.close()
        for paths in self.paths:
            remove_files(paths)


class ManyHosts(TwoHosts):
    """As many hosts as ``counts`` says, with so many agents each: the first is this one. Agents of one host share memory.

    ``patient`` agents give one another all the time that is needed (`tests.cluster.patient_agent`).
    """

    def __init__(self, cables: list[Cable], counts: list[int], *, patient: bool) -> None:
        if patient:
            self.program = "tests.cluster.patient_agent"
        self.cables, self.host_of = cables, [host for host, count in enumerate(counts) for _ in range(count)]
        super().__init__(cables[0], counts[0], sum(counts[1:]))

    def _start(self, rank: int) -> subprocess.Popen[bytes]:
        host = self.host_of[rank]
        cable = self.cables[max(0, host - 1)]
        agent = self._command(rank, cable)
        first = self.host_of.index(host)
        if host and rank == first:
            agent = [*cable.over_there, "unshare", "--mount", "sh", "-c", _OWN_SHM, "sh", *agent]
        elif host:
            wait_for_client(self.paths[first].state)
            agent = ["nsenter", "--target", str(self.agents[first].pid), "--mount", "--net", *agent]
        # Whoever joins a mount namespace is in its root directory: `tests` is found by its path.
        return subprocess.Popen(agent, env=os.environ | {"PYTHONPATH": str(_ROOT)})


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
    libc = ctypes.CDLL(None, use_errno=True)
    for kind in ("net", "mnt"):
        descriptor = os.open(f"/proc/{pid}/ns/{kind}", os.O_RDONLY)
        try:
            if libc.setns(descriptor, 0):
                raise OSError(ctypes.get_errno(), f"cannot join the {kind} namespace of {pid}")
        finally:
            os.close(descriptor)
