"""Weights cross again and again between two workers beside two agents, in four processes, whose memory and open files are looked at."""

from __future__ import annotations

import os
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tests.tensor_bus import cluster as acts
from tests.tensor_bus.cluster import LONG, ProcessCluster, Worker

LOOKS = 40
"""How often the processes are looked at; the first quarter, in which caches fill, does not count."""


@dataclass(frozen=True)
class Course:
    """What one process had at each look: open files, and memory in KiB: its own, whoever else had it when they forked, and its part of
    what is shared; but no mapped files, whose sharers come and go."""

    name: str
    kib: list[int]
    files: list[int]

    def slope(self, syncs: int) -> float:
        """KiB that it grew in a thousand syncs, by the line that fits best."""
        counted = self.kib[LOOKS // 4 :]
        return statistics.linear_regression(range(len(counted)), counted).slope * LOOKS / syncs * 1000

    def noise(self, syncs: int) -> float:
        """Two standard errors of that slope."""
        counted = self.kib[LOOKS // 4 :]
        line = statistics.linear_regression(range(len(counted)), counted)
        left = [value - line.slope * at - line.intercept for at, value in enumerate(counted)]
        spread = sum((at - (len(counted) - 1) / 2) ** 2 for at in range(len(counted)))
        return 2 * (sum(each**2 for each in left) / (len(counted) - 2) / spread) ** 0.5 * LOOKS / syncs * 1000


def soak(cluster: ProcessCluster, syncs: int) -> list[Course]:
    """So many syncs, every second one atomic, what arrives compared at each look; the course of each process."""
    workers = [cluster.worker(), cluster.worker()]
    for rank, worker in enumerate(workers):
        worker.call(acts.connect, rank, cluster.paths[rank])
    tensors = [(torch.ones(64, 1024), "pair"), (torch.ones(1000, dtype=torch.bfloat16), "pair")]
    _both(workers, lambda rank: (acts.join_pair, "pair", "ab"[rank], "ba"[rank], 1, None, None))
    _both(workers, lambda rank: (acts.register, "batch", tensors))
    pids = {"agent 0": cluster.pids[0], "agent 1": cluster.pids[1], "sender": workers[0].pid, "receiver": workers[1].pid}
    courses = [Course(name, [], []) for name in pids]
    for look in range(LOOKS):
        count = syncs * (look + 1) // LOOKS - syncs * look // LOOKS
        _both(workers, lambda rank: (_cross, ("send", "recv")[rank], count))  # noqa: B023
        sent, received = (worker.call(_digest) for worker in workers)
        assert sent == received
        for course, pid in zip(courses, pids.values(), strict=True):
            course.kib.append(_memory(pid))
            course.files.append(len(os.listdir(f"/proc/{pid}/fd")))
    return courses


def _both(workers: list[Worker], what: Any) -> None:
    for rank, worker in enumerate(workers):
        worker.start(*what(rank))
    for worker in workers:
        worker.result(20 * LONG)


def _cross(state: dict[str, Any], direction: str, count: int) -> None:
    for number in range(count):
        if direction == "send":
            for tensor in state["tensors"]["batch"]:
                tensor.add_(1)
        more = {"atomic": True} if direction == "recv" and number % 2 else {}
        state["handlers"]["batch"].transfer(direction, blocking=True, timeout=LONG, **more).result(0)


def _digest(state: dict[str, Any]) -> list[str]:
    found: list[str] = state["handlers"]["batch"].digest(LONG)  # the tensors themselves, sent here, would take memory each time
    return found


def _memory(pid: int) -> int:
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith(("Anonymous:", "Pss_Shmem:")))
