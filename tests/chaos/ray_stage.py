"""What is played on as a Ray application: agents and players are actors, and it is Ray that starts again what dies."""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import ray

import etha_ray
from etha_ray.config import agent_paths
from etha_ray.errors import AgentDiedError
from etha_ray.tensor_bus.inspection import inspect_agent
from etha_ray.testing import eventually
from etha_ray.testing.rays import start_ray
from tests.chaos.journal import Reader
from tests.chaos.player import Seat
from tests.chaos.strikes import Seats
from tests.chaos.traces import traces
from tests.chaos.weights import Life
from tests.tensor_bus.cluster import LONG

_PLAYERS = [(side, index) for side in "ab" for index in range(2)]


@ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1, max_concurrency=2)
class _Worker:
    """A player: Ray makes it again in a new process when it dies, and calls `play` again there."""

    def __init__(self, seat: Seat) -> None:
        lives = len(list(seat.folder.glob(f"{seat.who}.*.jsonl")))
        self._life = Life(seat, lives + 1)

    def play(self) -> None:
        self._life.play()

    def leave(self) -> None:
        self._life.leave()


@dataclass(frozen=True)
class RayPart:
    """An actor of Ray's."""

    name: str
    find: Callable[[], tuple[int, int]]
    """Its process now, and for a player how often it was started; 0 while nobody knows."""

    @property
    def pid(self) -> int:
        """Of its present life; 0 while it has none."""
        return self.find()[0]

    def lives_still(self, life: int) -> bool:
        """Whether it is in its life of that number."""
        pid, now = self.find()
        return now == life and psutil.pid_exists(pid)


class RayStage:
    """Four agents and, beside each, a sender or a receiver, on one host."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.reader = folder, Reader(folder)
        self.namespace = f"test-{os.getpid()}-{secrets.token_hex(4)}"
        self._before = traces()
        self.paths = [agent_paths(rank, self.namespace) for rank in range(4)]
        self.pool = etha_ray.launch_agents(["cpu"] * 4, namespace=self.namespace)
        self.agents = [RayPart(f"agent {rank}", lambda rank=rank: self._agent(rank)) for rank in range(4)]
        self.players = [RayPart(f"{side}{index}", lambda who=f"{side}{index}": self._player(who)) for side, index in _PLAYERS]
        self.odd_ends: list[str] = []
        self.dead: set[int] = set()
        """Processes that were killed."""
        self._logs = Path(ray._private.worker.global_worker.node.get_logs_dir_path())
        self._workers = [
            _Worker.remote(Seat(side, index, 2, 2, rank, self.paths[rank], None, folder)) for rank, (side, index) in enumerate(_PLAYERS)
        ]
        self._plays = [worker.play.remote() for worker in self._workers]
        eventually(lambda: self.reader.poll() is None and all(part.pid for part in self.parts), 2 * LONG)

    @property
    def seats(self) -> Seats:
        """Who sits where: all on one host."""
        pairs = list(zip(self.players, self.agents, strict=True))
        return Seats({player.name: agent.name for player, agent in pairs}, {player.name: 0 for player, _ in pairs})

    @property
    def parts(self) -> list[RayPart]:
        """All that Ray starts again."""
        return self.agents + self.players

    def part(self, name: str) -> RayPart:
        """By its name."""
        return next(part for part in self.parts if part.name == name)

    def _agent(self, rank: int) -> tuple[int, int]:
        with contextlib.suppress(AgentDiedError):
            seen = inspect_agent(rank, self.paths[rank])
            if seen is not None and seen.record is not None and psutil.pid_exists(seen.record.pid):
                return seen.record.pid, 0
        return 0, 0

    def _player(self, who: str) -> tuple[int, int]:
        latest = self.reader.latest.get(who)
        return (0, 0) if latest is None or not psutil.pid_exists(latest.pid) else (latest.pid, latest.life)

    def signal(self, part: RayPart, number: signal.Signals) -> int:
        """Send it to the present life, once there is one; returns which process that is."""
        eventually(lambda: self.reader.poll() is None and part.pid > 0, 2 * LONG)
        pid = part.pid
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)
        return pid

    def dump(self) -> None:
        """What each agent says of its workers, into the folder. What Ray's workers write is in its logs."""
        for rank, path in enumerate(self.paths):
            with contextlib.suppress(AgentDiedError):
                (self.folder / f"agent_{rank}.{time.monotonic():.0f}.txt").write_text(repr(inspect_agent(rank, path)))

    def kill(self, part: RayPart) -> None:
        """SIGKILL; Ray starts it again. Once this returns nobody takes the dead one for its present life."""
        pid = self.signal(part, signal.SIGKILL)
        self.dead.add(pid)
        eventually(lambda: not psutil.pid_exists(pid), LONG)

    def end(self) -> None:
        """Everybody leaves: players close, agents stop."""
        deadline = time.monotonic() + 2 * LONG
        while time.monotonic() < deadline:  # who was just started again is told again
            for worker in self._workers:
                worker.leave.remote()
            if len(ray.wait(self._plays, num_returns=len(self._plays), timeout=1.0)[0]) == len(self._plays):
                break
        else:
            self.odd_ends.append("players did not end")
        for play in self._plays:
            try:
                ray.get(play, timeout=1.0)
            except Exception as error:
                self.odd_ends.append(f"a player ended with {type(error).__name__}: {error}")
        for seen in self.pool.describe(LONG):
            if seen["state"] != "running":
                self.odd_ends.append(f"agent {seen['rank']} (pid {seen['pid']}) is {seen['state']}, though nobody strikes any more")
        self.pool.shutdown()

    def faults(self) -> list[str]:
        """What agents and players wrote into Ray's logs that is nobody's doing but theirs."""
        logs = sorted(self._logs.glob("worker-*.err"))
        assert logs, f"Ray writes its workers' logs into {self._logs} no more"
        return [f"{log} has a traceback" for log in logs if "Traceback (most recent call last)" in log.read_text(errors="replace")]

    def left(self) -> list[str]:
        """What is still there after `end`: files, shared memory, semaphores."""
        return sorted(traces() - self._before)


@contextlib.contextmanager
def ray_stage(folder: Path) -> Iterator[RayStage]:
    """Ends with everything stopped, and with Ray."""
    folder.mkdir(parents=True, exist_ok=True)
    start_ray(num_cpus=8, log_to_driver=False, logging_level="error")
    try:
        made = RayStage(folder)
        try:
            yield made
        finally:
            made.end()
    finally:
        ray.shutdown()
