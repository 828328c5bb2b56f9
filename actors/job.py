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
    """The Ray actors of one side, each on its seat's node, taking no share of its logical CPUs."""

    def __init__(self, worker: type[Worker], seats: Sequence[Seat], argument: Any) -> None:
        remote: Any = ray.remote(worker)
        places = (NodeAffinitySchedulingStrategy(seat.node_id, soft=False) for seat in seats)
        options = (remote.options(num_cpus=0, scheduling_strategy=place) for place in places)
        self._actors = [option.remote(seat, argument) for option, seat in zip(options, seats, strict=True)]

    def start(self, method: str, *arguments: Any) -> list[Any]:
        """Call a method of every rank at once; the answers to come, by rank."""
        return [getattr(actor, method).remote(*arguments) for actor in self._actors]

    def call(self, method: str, *arguments: Any) -> list[Any]:
        """Call a method of every rank at once and wait; the answers by rank. Raises what a rank raises."""
        return list(ray.get(self.start(method, *arguments)))

    def form(self) -> list[Any]:
        """Begin to make the actors one gloo group with what they hold; the answers to come."""
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

    Agents 0 to `trainers` - 1 serve the trainers, the following ones the generators. In this order they fill the nodes of the
    cluster, as many on each, this process's first. The pool has a name of its own: two jobs may run at once.
    """
    namespace = f"weight-sync-{os.getpid()}-{secrets.token_hex(4)}"
    places = spread(trainers + generators)
    sources = [Seat("source", rank, trainers, node, rank, namespace) for rank, node in enumerate(places[:trainers])]
    targets = [Seat("target", rank, generators, node, trainers + rank, namespace) for rank, node in enumerate(places[trainers:])]
    with (
        etha_ray.launch_agents({node: ["cpu"] * places.count(node) for node in places}, namespace=namespace),
        Group(workload.trainer, sources, workload.argument) as trainer_group,
        Group(workload.generator, targets, workload.argument) as generator_group,
    ):
        groups = (trainer_group, generator_group)
        ray.get([answer for group in groups for answer in group.form()])
        ray.get([answer for group in groups for answer in group.start("connect")])
        yield SyncJob(*groups)


def spread(workers: int) -> list[str]:
    """The node of each worker: neighbours in rank are on one node, or on the next one."""
    here = ray.get_runtime_context().get_node_id()
    known: list[dict[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call]
    nodes = [node for node in known if node["Alive"] and node["Resources"].get("CPU")]
    others = sorted((node["NodeManagerAddress"], node["NodeID"]) for node in nodes if node["NodeID"] != here)
    found = [here, *(node_id for _, node_id in others)]
    return [found[worker * len(found) // workers] for worker in range(workers)]


def _byte_map(sources: int, received: Sequence[Moved]) -> ByteMap:
    source, target = SIDE_NAMES["source"], SIDE_NAMES["target"]
    return ByteMap(
        sources=tuple(f"{source} {rank}" for rank in range(sources)),
        targets=tuple(f"{target} {rank}" for rank in range(len(received))),
        nbytes=tuple(tuple(moved.peers.get(f"{source}[{rank}]", 0) for moved in received) for rank in range(sources)),
    )
