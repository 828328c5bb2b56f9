"""Transfers that belong together: what one side sent and the other received at the same time is one sync."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from etha_ray.tensor_bus.history import PastTransfer
from etha_ray.tensor_bus.inspection import SeenAgent


@dataclass(frozen=True)
class Part:
    """One worker's part of a sync, and the rank of its agent."""

    agent: int
    past: PastTransfer


@dataclass(frozen=True)
class Sync:
    """What crossed at one time, as far as it is still known; senders first. Times are in seconds since the epoch."""

    batch_id: str
    parts: tuple[Part, ...]

    @property
    def began(self) -> float:
        """When the first worker called."""
        return min(part.past.began for part in self.parts)

    @property
    def ended(self) -> float:
        """When the last worker's call was over."""
        return max(part.past.began + part.past.seconds for part in self.parts)

    @property
    def failed(self) -> bool:
        """Whether a worker got an error."""
        return any(part.past.report is None for part in self.parts)

    @property
    def bytes(self) -> int:
        """What all receivers got; what all senders gave where no receiver is known."""
        reports = [part.past.report for part in self.parts if part.past.report is not None]
        got = sum(report.bytes for report in reports if report.direction == "recv")
        return got or sum(report.bytes for report in reports)

    @property
    def move_seconds(self) -> float:
        """How long the slowest took to move its bytes."""
        return max((part.past.report.move_seconds for part in self.parts if part.past.report is not None), default=0.0)

    @property
    def gb_per_s(self) -> float:
        """All bytes over the time of the slowest, in 1e9 bytes a second; 0 when nothing moved."""
        return self.bytes / self.move_seconds / 1e9 if self.move_seconds > 0 else 0.0


def syncs(agents: Sequence[SeenAgent]) -> list[Sync]:
    """The syncs that these agents still know of, by when they ended. A transfer that met nobody is one by itself."""
    parts = [Part(agent.rank, past) for agent in agents for past in agent.past]
    group = list(range(len(parts)))

    def root(index: int) -> int:
        while group[index] != index:
            group[index] = index = group[group[index]]
        return index

    first: dict[str, int] = {}
    for index, part in enumerate(parts):
        for flow in part.past.flows:
            group[root(index)] = root(first.setdefault(flow.key, index))
    together: dict[int, list[Part]] = {}
    for index, part in enumerate(parts):
        together.setdefault(root(index), []).append(part)
    found = [
        Sync(
            members[0].past.batch_id, tuple(sorted(members, key=lambda part: (part.past.direction != "send", part.agent, part.past.began)))
        )
        for members in together.values()
    ]
    return sorted(found, key=lambda sync: sync.ended)
