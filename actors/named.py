"""Trainers and generators that find each other by a name: each side is a job of its own, which comes and goes.

`actors.weight_sync` starts both sides and so can tell them of one another; here a pool of agents (`actors.agents`) is all that they share.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack

import etha_ray
from actors.generator import Generator
from actors.sharding import Side
from actors.trainer import Trainer
from actors.worker import Seat

_TIMEOUT = 300.0


class NamedTrainer(Trainer):
    """A trainer whose weights are offered by a name."""

    def offer(self, name: str) -> None:
        """Offer the weights, which are DTensors and say themselves how they lie. Waits for nobody."""
        _choose_pool(self.seat)
        self._leaving = ExitStack()
        self._publisher = self._leaving.enter_context(etha_ray.publish(self.weights, name))

    def push(self, version: int) -> list[str]:
        """Send the weights to all replicas there are, at least one; the names of those that have them. A collective."""
        return sorted(self._publisher.push(version, timeout=_TIMEOUT).replicas)

    def close(self) -> None:
        """Withdraw the offer: the generators are told."""
        self._leaving.close()
        super().close()


class NamedGenerator(Generator):
    """A generator whose weights come from whoever offers them by a name."""

    def take(self, name: str, replica: str) -> None:
        """Wait for the trainers, and be connected with them. A collective."""
        _choose_pool(self.seat)
        placements = {each.name: each.target for each in self.crossings}
        self._leaving = ExitStack()
        self._receiver = self._leaving.enter_context(
            etha_ray.pull(
                self.weights,
                name,
                replica=replica,
                placements=lambda tensor, _: placements[tensor],
                world_size=self.seat.ranks,
                rank=self.seat.rank,
                timeout=_TIMEOUT,
            )
        )

    def update(self) -> int:
        """Wait for the next version, and take it; its number. A collective. Raises BatchClosedError once the trainers have left."""
        return self._receiver.update(_TIMEOUT)

    def close(self) -> None:
        """Leave: the trainers go on without this replica."""
        self._leaving.close()
        super().close()


def seats(side: Side, ranks: int, namespace: str) -> list[Seat]:
    """The seats of a side whose workers take the agents of their node in turn."""
    return [Seat(side, rank, ranks, None, namespace) for rank in range(ranks)]


def digest(of_ranks: Sequence[Mapping[str, str]]) -> str:
    """One short digest of what `Worker.digests` of all ranks of a side says: two sides that hold the same bits print the same.

    Raises ValueError when the ranks of a side differ.
    """
    first, *others = of_ranks
    if any(other != first for other in others):
        raise ValueError("The ranks of one side hold different bits.")
    return hashlib.sha256(repr(sorted(first.items())).encode()).hexdigest()[:16]


def _choose_pool(seat: Seat) -> None:
    os.environ["ETHA_RAY_NAMESPACE"] = seat.namespace
