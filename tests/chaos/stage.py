"""What is played on: an etcd, agents and players on three hosts that share no memory, and somebody who starts again what dies."""

from __future__ import annotations

import contextlib
import faulthandler
import os
import secrets
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from etha_ray.config import agent_paths
from etha_ray.testing import eventually
from etha_ray.testing.etcd_server import EtcdServer, free_ports
from tests.chaos.journal import Reader
from tests.chaos.player import Seat
from tests.chaos.process import run
from tests.chaos.strikes import Seats
from tests.chaos.traces import traces
from tests.cluster.hosts import enter
from tests.fresh import fresh
from tests.net.namespaces import Cable, End, cable, join
from tests.tensor_bus.cluster import LONG

_OWN_SHM = "mount --make-rprivate / && mount -t tmpfs tmpfs /dev/shm && exec sleep infinity"


def _run_agent(host: int | None, log: str, arguments: list[str]) -> None:
    if host is not None:
        enter(host)
    with open(log, "a") as file:
        os.dup2(file.fileno(), 2)
    faulthandler.register(signal.SIGUSR1)
    from etha_ray.tensor_bus.agent import main

    main(arguments)


@dataclass
class Part:
    """A process that is started again whenever it has died."""

    name: str
    start: Callable[[int], Any]
    process: Any = None
    lives: int = 0

    @property
    def pid(self) -> int:
        """Of its present life."""
        return int(self.process.pid)

    def lives_still(self, life: int) -> bool:
        """Whether it is in its life of that number."""
        return self.lives == life and bool(self.process.is_alive())


SEATS = (("a", 0, 0), ("a", 1, 1), ("b", 0, 0), ("b", 1, 1), ("b", 2, 2), ("b", 3, 2))
"""Side, index and host of each player, in the order of their agents' ranks."""


class Stage:
    """Three hosts, this one and two over there: a sender and a receiver on each of the first two, and two receivers on the third.

    So what a sender gives to all is passed on: to the third host by the receiver on the other sender's host, and within the third.
    """

    def __init__(self, folder: Path, wires: list[Cable]) -> None:
        self.folder, self.reader = folder, Reader(folder)
        self.cables: dict[tuple[int, int], tuple[End, End]] = {(0, host): (wire.near, wire.far) for host, wire in enumerate(wires, 1)}
        self.cables |= {(one + 1, other + 1): ends for (one, other), ends in join(wires).items()}
        self.namespace = f"test-{os.getpid()}-{secrets.token_hex(4)}"
        self._before = traces()
        self.etcd = self._etcd(wires[0].here)
        self.far = [subprocess.Popen([*wire.over_there, "unshare", "--mount", "sh", "-c", _OWN_SHM]) for wire in wires]
        self.paths = [agent_paths(rank, self.namespace) for rank in range(len(SEATS))]
        self.agents = [Part(f"agent {rank}", self._agent(rank)) for rank in range(len(SEATS))]
        self.players = [Part(f"{side}{index}", self._player(rank)) for rank, (side, index, _) in enumerate(SEATS)]
        self.odd_ends: list[str] = []
        self.dead: set[int] = set()
        """Processes of agents and players that died, whoever killed them."""
        self._lock = threading.RLock()
        self._over = threading.Event()
        for far in self.far:
            eventually(lambda far=far: b"sleep" in Path(f"/proc/{far.pid}/cmdline").read_bytes())
        for part in self.parts:
            self._start(part)
        self._supervisor = threading.Thread(target=self._supervise)
        self._supervisor.start()

    @property
    def seats(self) -> Seats:
        """Who sits where."""
        players = [(player.name, agent.name, host) for player, agent, (*_, host) in zip(self.players, self.agents, SEATS, strict=True)]
        return Seats({player: agent for player, agent, _ in players}, {player: host for player, _, host in players})

    @property
    def parts(self) -> list[Part]:
        """All that is started again."""
        return self.agents + self.players

    def part(self, name: str) -> Part:
        """By its name."""
        return next(part for part in self.parts if part.name == name)

    def _etcd(self, here: str) -> EtcdServer:
        port, peer_port = free_ports(2)
        reached = ["--listen-client-urls", f"http://0.0.0.0:{port}", "--advertise-client-urls", f"http://{here}:{port}"]
        server = EtcdServer(self.folder / "etcd", reached, host=here, port=port, peer_port=peer_port)
        server.restart()
        return server

    def _over_there(self, rank: int) -> int | None:
        host = SEATS[rank][2]
        return self.far[host - 1].pid if host else None

    def _agent(self, rank: int) -> Callable[[int], Any]:
        arguments = ["--store", self.etcd.url, "--rank", str(rank), "--namespace", self.namespace, "--threads", "1", "--restarts"]
        log = str(self.folder / f"agent{rank}.log")
        return lambda _: fresh.Process(target=_run_agent, args=(self._over_there(rank), log, arguments), daemon=True)

    def _player(self, rank: int) -> Callable[[int], Any]:
        side, index, _ = SEATS[rank]
        size, senders = (sum(each == of for each, _, _ in SEATS) for of in (side, "a"))
        seat = Seat(side, index, size, senders, rank, self.paths[rank], self._over_there(rank), self.folder)
        return lambda life: fresh.Process(target=run, args=(seat, life), daemon=True)

    def _start(self, part: Part) -> None:
        part.lives += 1
        part.process = part.start(part.lives)
        part.process.start()

    def _supervise(self) -> None:
        while not self._over.wait(0.05):
            with self._lock:
                for part in self.parts:
                    if not part.process.is_alive():
                        part.process.join()
                        self.dead.add(part.pid)
                        # An agent that finds no store while it starts says so, and ends; what is worse leaves a traceback.
                        expected = (-signal.SIGKILL, 1) if part in self.agents else (-signal.SIGKILL,)
                        if part.process.exitcode not in expected:
                            self.odd_ends.append(f"{part.name} (pid {part.pid}) ended by itself with {part.process.exitcode}")
                        self._start(part)

    def signal(self, part: Part, number: signal.Signals) -> None:
        """Send it to the present life."""
        with self._lock, contextlib.suppress(ProcessLookupError):
            os.kill(part.pid, number)

    def dump(self) -> None:
        """Have all write their threads' stacks into their logs."""
        for part in self.parts:
            self.signal(part, signal.SIGUSR1)

    def kill(self, part: Part) -> None:
        """SIGKILL; the supervisor starts it again."""
        self.signal(part, signal.SIGKILL)

    def end(self) -> None:
        """Everybody leaves: players close, agents stop, the etcd too."""
        self._over.set()
        self._supervisor.join()
        try:
            for parts in (self.players, self.agents):
                for part in parts:
                    self.signal(part, signal.SIGTERM)
                deadline = time.monotonic() + 2 * LONG
                for part in parts:
                    part.process.join(max(0.0, deadline - time.monotonic()))
                    if part.process.is_alive():
                        self.odd_ends.append(f"{part.name} (pid {part.pid}) did not end")
                        part.process.kill()
                        part.process.join()
        finally:
            self._left_over_there = [f"{name} over there" for far in self.far for name in os.listdir(f"/proc/{far.pid}/root/dev/shm")]
            for far in self.far:
                far.kill()
                far.wait()
            self.etcd.stop()

    def faults(self) -> list[str]:
        """What agents wrote into their logs that is nobody's doing but theirs."""
        logs = (self.folder / f"agent{rank}.log" for rank in range(len(SEATS)))
        return [f"{log} has a traceback" for log in logs if log.exists() and "Traceback (most recent call last)" in log.read_text()]

    def left(self) -> list[str]:
        """What is still there after `end`: files, shared memory, semaphores."""
        return sorted(traces() - self._before) + self._left_over_there


@contextlib.contextmanager
def stage(folder: Path) -> Iterator[Stage]:
    """Ends with everything stopped. Skips where network namespaces cannot be made."""
    folder.mkdir(parents=True, exist_ok=True)
    with cable() as first, cable() as second:
        made = Stage(folder, [first, second])
        try:
            yield made
        finally:
            made.end()
