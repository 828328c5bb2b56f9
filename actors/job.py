"""The main job without its screen: agents, a group of trainers, a group of generators, and syncs between them."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

import etha_ray
from actors.checkpoint import TensorEntry
from actors.generator import CheckpointGenerator, Generator, Receiver
from actors.model import crossings
from actors.report import ByteMap
from actors.sharding import Crossing, differences
from actors.spread import spread
from actors.trainer import CheckpointTrainer, Trainer, Training
from actors.worker import SIDE_NAMES, Moved, Seat, Worker

_LEAVE_TIMEOUT = 10.0


@dataclass(frozen=True)
class Workload:
    """What crosses, and the classes that hold it: both are called with a `Seat` and `argument`."""

    crossings: tuple[Crossing, ...]
    trainer: type[Worker]
    generator: type[Receiver]
    argument: Training | tuple[TensorEntry, ...]


@dataclass(frozen=True)
class Sync:
    """One version's way across.

    `seconds` are those of the generator that took longest, from its call until it holds everything; `nbytes` counts each copy
    of a replicated tensor. `differences` says what is not bit-exact, a line a tensor and rank.
    """

    nbytes: int
    seconds: float
    byte_map: ByteMap
    differences: tuple[str, ...]


def training_workload(training: Training) -> Workload:
    """A model that the trainers train and the generators use."""
    return Workload(crossings(training.model), Trainer, Generator, training)


def checkpoint_workload(entries: tuple[TensorEntry, ...]) -> Workload:
    """A checkpoint that crosses as it is."""
    return Workload(entries, CheckpointTrainer, CheckpointGenerator, entries)


class Group:
    """The Ray actors of one side, each on its seat's node, with a GPU if the seat has one, and no share of the logical CPUs."""

    def __init__(self, worker: type[Worker], seats: Sequence[Seat], argument: Any) -> None:
        remote: Any = ray.remote(worker)
        self._actors = []
        for seat in seats:
            place = NodeAffinitySchedulingStrategy(seat.node_id, soft=False)
            options = remote.options(num_cpus=0, num_gpus=int(seat.gpu), scheduling_strategy=place)
            self._actors.append(options.remote(seat, argument))

    def start(self, method: str, *arguments: Any) -> list[Any]:
        """Call a method of every rank at once; the answers to come, by rank."""
        return [getattr(actor, method).remote(*arguments) for actor in self._actors]

    def call(self, method: str, *arguments: Any) -> list[Any]:
        """Call a method of every rank at once and wait; the answers by rank. Raises what a rank raises."""
        return list(ray.get(self.start(method, *arguments)))

    def form(self) -> list[Any]:
        """Begin to make the actors one process group with what they hold; the answers to come."""
        host, port = ray.get(self._actors[0].open_rendezvous.remote())
        return self.start("join", host, port)

    def __enter__(self) -> Group:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if error is None:
            ray.wait(self.start("close"), num_returns=len(self._actors), timeout=_LEAVE_TIMEOUT)
        # After an error workers may be waiting for one another, and would not leave by themselves.
        for actor in self._actors:
            ray.kill(actor)


class SyncJob:
    """Both groups, connected. Made by `sync_job`."""

    def __init__(self, trainers: Group, generators: Group) -> None:
        self.trainers = trainers
        self.generators = generators

    def sync(self) -> Sync:
        """Bring the trainers' weights to the generators, and compare every bit of every tensor afterwards."""
        self.generators.call("spoil")
        sends, receives = self.trainers.start("sync"), self.generators.start("sync")
        moves: list[Moved] = ray.get([*sends, *receives])  # together: the first failure of either side is raised
        received = moves[len(sends) :]
        digests = self.trainers.start("digests"), self.generators.start("digests")
        return Sync(
            nbytes=sum(moved.nbytes for moved in received),
            seconds=max(moved.seconds for moved in received),
            byte_map=_byte_map(len(sends), received),
            differences=tuple(differences(ray.get(digests[0]), ray.get(digests[1]))),
        )


@contextmanager
def sync_job(workload: Workload, trainers: int, generators: int) -> Iterator[SyncJob]:
    """Launch agents and both groups, connect them, and end them again. Needs an initialised Ray.

    Trainers, then generators, fill the nodes of the cluster: a GPU each, where there are as many (`spread`). The pool has a name
    of its own: two jobs may run at once.
    """
    namespace = f"weight-sync-{os.getpid()}-{secrets.token_hex(4)}"
    spread_over = spread(trainers + generators)
    sources = spread_over.seats("source", 0, trainers, namespace)
    targets = spread_over.seats("target", trainers, generators, namespace)
    with (
        etha_ray.launch_agents(spread_over.devices, namespace=namespace),
        Group(workload.trainer, sources, workload.argument) as trainer_group,
        Group(workload.generator, targets, workload.argument) as generator_group,
    ):
        groups = (trainer_group, generator_group)
        ray.get([answer for group in groups for answer in group.form()])
        ray.get([answer for group in groups for answer in group.start("connect")])
        yield SyncJob(*groups)


def _byte_map(sources: int, received: Sequence[Moved]) -> ByteMap:
    source, target = SIDE_NAMES["source"], SIDE_NAMES["target"]
    return ByteMap(
        sources=tuple(f"{source} {rank}" for rank in range(sources)),
        targets=tuple(f"{target} {rank}" for rank in range(len(received))),
        nbytes=tuple(tuple(moved.peers.get(f"{source}[{rank}]", 0) for moved in received) for rank in range(sources)),
    )
