"""Trainers and generators that find each other by a name: each side is a job of its own, which comes and goes.

`actors.weight_sync` starts both sides and so can tell them of one another; here a pool of agents (`actors.agents`) is all that they share.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack

import ray

import etha_ray
from actors.generator import Generator
from actors.sharding import Side
from actors.trainer import Trainer
from actors.worker import Seat

# Seconds. Long ones: they only end a job whose other side never comes.
_TIMEOUT = 300.0
_POOL_TIMEOUT = 120.0


class NamedTrainer(Trainer):
    """A trainer whose weights are offered by a name."""

    def offer(self, name: str) -> None:
        """Offer the weights, which are DTensors and say themselves how they lie. Waits for the pool, and for nobody else."""
        self._client = _join(self.seat)
        self._leaving = ExitStack()
        self._publisher = self._leaving.enter_context(etha_ray.publish(self.weights, name, client=self._client))

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
        """Wait for the pool and the trainers, and be connected with them. A collective."""
        self._client = _join(self.seat)
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
                client=self._client,
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
    """The seats of a side on this node, whose workers take the agents there in turn. Needs an initialised Ray."""
    here = ray.get_runtime_context().get_node_id()
    return [Seat(side, rank, ranks, here, None, namespace) for rank in range(ranks)]


def digest(of_ranks: Sequence[Mapping[str, str]]) -> str:
    """One short digest of what `Worker.digests` of all ranks of a side says: two sides that hold the same bits print the same.

    Raises ValueError when the ranks of a side differ.
    """
    first, *others = of_ranks
    if any(other != first for other in others):
        raise ValueError("The ranks of one side hold different bits.")
    return hashlib.sha256(repr(sorted(first.items())).encode()).hexdigest()[:16]


def _join(seat: Seat) -> etha_ray.TensorBusClient:
    """A client of an agent of this node. Waits for the pool, whose job may have been submitted later, or be starting still."""
    os.environ["ETHA_RAY_NAMESPACE"] = seat.namespace
    deadline = time.monotonic() + _POOL_TIMEOUT
    while True:
        try:
            return etha_ray.bootstrap_client()[0]
        except ValueError as error:
            if time.monotonic() > deadline:
                raise ConnectionError(
                    f"no pool {seat.namespace!r} has agents on this node after {_POOL_TIMEOUT:g} s: submit python -m actors.agents, too"
                ) from error
            time.sleep(0.5)
