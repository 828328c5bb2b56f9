"""Groups of workers in processes, for tests that send tensors between two of them.

What a member of a group holds is computed with `torch.chunk` alone, so that it says nothing about the code under test.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.distributed.tensor import Partial, Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard

from etha_ray.layout import MeshSpec
from etha_ray.tensor_bus.tensors import Piece
from tests.tensor_bus import cluster as acts
from tests.tensor_bus.cluster import LONG, ProcessCluster, Worker

Box = tuple[tuple[int, ...], tuple[int, ...]]
"""Offsets and sizes."""


@dataclass(frozen=True)
class Group:
    """One side of a pair: on which agents its workers are, and how they hold every tensor.

    ``boxes``: per tensor and worker the explicit piece it holds, None for nothing of it; instead of placements.
    """

    agents: Sequence[int]
    mesh: tuple[int, ...] | None = None
    placements: Sequence[Any] = ()
    dtype: torch.dtype | None = None
    boxes: Sequence[Sequence[Box | None]] | None = None
    allow_lossy: bool = False

    def spec(self, index: int) -> MeshSpec | None:
        """The mesh as one worker sees it."""
        if self.mesh is None:
            return None
        return MeshSpec(self.mesh, tuple(int(at) for at in torch.unravel_index(torch.tensor(index), self.mesh)))

    def part(self, whole: torch.Tensor, position: int, index: int) -> torch.Tensor:
        """What one worker holds of a tensor."""
        if self.boxes is not None:
            offsets, sizes = self.boxes[position][index] or ((0,) * whole.dim(), (0,) * whole.dim())
            return whole[tuple(slice(at, at + size) for at, size in zip(offsets, sizes, strict=True))].clone()
        spec = self.spec(index)
        if spec is None:
            return whole.clone()
        # _StridedShard is how DTensor says that a mesh dimension to the right has cut the tensor dimension before this one.
        order = sorted(range(len(spec.shape)), key=lambda dim: isinstance(self.placements[dim], _StridedShard))
        for dim in order:
            placement = self.placements[dim]
            if isinstance(placement, Shard | _StridedShard):
                chunks = whole.chunk(spec.shape[dim], placement.dim)
                at = spec.coordinate[dim]
                whole = chunks[at] if at < len(chunks) else whole.narrow(placement.dim, 0, 0)
            else:
                assert isinstance(placement, Replicate | Partial)
        return whole.clone()

    def registrable(self, whole: torch.Tensor, position: int, index: int) -> tuple[torch.Tensor, Box | None]:
        """What one worker registers: its tensor, and for an explicit piece (global shape, offsets)."""
        part = self.part(whole, position, index)
        if self.boxes is None:
            return part, None
        box = self.boxes[position][index]
        return part, (tuple(whole.shape), box[0] if box is not None else (0,) * whole.dim())


def contributions(whole: torch.Tensor, group: Group, op: str, seed: int) -> tuple[list[torch.Tensor], torch.Tensor]:
    """For each worker of a Partial group what it contributes to the whole; and what DTensor makes of all of them."""
    assert group.mesh is not None
    generator = torch.Generator().manual_seed(seed)
    partial = [isinstance(placement, Partial) for placement in group.placements]
    by_slot: dict[tuple[int, ...], torch.Tensor] = {}
    found = []
    for coordinate in itertools.product(*map(range, group.mesh)):
        slot = tuple(at for at, is_partial in zip(coordinate, partial, strict=True) if is_partial)
        if slot not in by_slot:
            by_slot[slot] = torch.randint(-4, 5, whole.shape, generator=generator).to(whole.dtype) / 2
        found.append(by_slot[slot])
    wide = [value.double() for value in by_slot.values()]
    combine: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] = {
        "sum": torch.add, "avg": torch.add, "product": torch.mul, "max": torch.maximum, "min": torch.minimum
    }[op]  # fmt: skip
    total = functools.reduce(combine, wide)
    return found, (total / len(wide) if op == "avg" else total).to(whole.dtype)


class Groups:
    """Runs one exchange after another over the agents of a cluster; workers are kept for the next one."""

    def __init__(self, cluster: ProcessCluster) -> None:
        self.cluster = cluster
        self._workers: dict[tuple[int, int], Worker] = {}
        self._count = itertools.count()

    def workers(self, *groups: Group) -> list[list[Worker]]:
        """A worker for each member of each group, connected to its agent."""
        used: dict[int, int] = {}
        found = []
        for group in groups:
            found.append([self._worker(agent, used) for agent in group.agents])
        return found

    def _worker(self, agent: int, used: dict[int, int]) -> Worker:
        number = used[agent] = used.get(agent, -1) + 1
        if (agent, number) not in self._workers:
            worker = self._workers[agent, number] = self.cluster.worker()
            worker.call(acts.connect, agent, self.cluster.paths[agent])
        return self._workers[agent, number]

    def send(
        self,
        source: Group,
        target: Group,
        wholes: Sequence[torch.Tensor],
        *,
        given: Sequence[Sequence[torch.Tensor]] | None = None,
    ) -> list[list[torch.Tensor]]:
        """Send ``wholes`` (or what each source worker is ``given``), and return what each target worker then holds."""
        batch = f"x{next(self._count)}"
        sides = self.workers(source, target)
        for group, workers, (name, other) in zip((source, target), sides, (("a", "b"), ("b", "a")), strict=True):
            for index, worker in enumerate(workers):
                worker.start(acts.join_pair, batch, name, other, len(workers), group.spec(index), list(group.placements) or None)
        finish(sides)
        for group, workers in zip((source, target), sides, strict=True):
            for index, worker in enumerate(workers):
                mine = wholes if given is None or group is target else given[index]
                parts = [group.registrable(whole if group is source else whole * 0, at, index) for at, whole in enumerate(mine)]
                parts = [(part if group.dtype is None else part.to(group.dtype), box) for part, box in parts]
                worker.start(register, batch, parts, group.allow_lossy)
        finish(sides)
        for workers, what in zip(sides, ("send", "recv"), strict=True):
            for worker in workers:
                worker.start(acts.transfer, batch, what)
        reports = finish(sides)
        assert sum(report.bytes for report in reports[0]) == sum(report.bytes for report in reports[1])
        held = [worker.call(acts.read, batch) for worker in sides[1]]
        for workers in sides:
            for worker in workers:
                worker.start(acts.close_batch, batch)
        finish(sides)
        return held

    def check(self, source: Group, target: Group, wholes: Sequence[torch.Tensor]) -> None:
        """Send, and compare with what each target worker should hold."""
        held = self.send(source, target, wholes)
        for index, tensors in enumerate(held):
            for position, (tensor, whole) in enumerate(zip(tensors, wholes, strict=True)):
                sent = whole if source.dtype is None else whole.to(source.dtype)
                wanted = target.part(sent if target.dtype is None else sent.to(target.dtype), position, index)
                assert tensor.dtype == wanted.dtype
                assert torch.equal(tensor.double(), wanted.double()), (position, index, tensor, wanted)


def finish(sides: Sequence[Sequence[Worker]]) -> list[list[Any]]:
    """Everyone's result; the first error is raised after all have answered."""
    results: list[list[Any]] = []
    errors: list[BaseException] = []
    for workers in sides:
        results.append([])
        for worker in workers:
            try:
                results[-1].append(worker.result(2 * LONG))
            except Exception as error:
                errors.append(error)
    if errors:
        raise errors[0]
    return results


# --- what workers do


def register(state: dict[str, Any], batch: str, parts: Sequence[tuple[torch.Tensor, Box | None]], allow_lossy: bool) -> None:
    tensors = [part.clone() for part, _ in parts]
    things: list[tuple[Any, str]] = [
        (tensor if box is None else Piece(tensor, global_shape=box[0], offsets=box[1]), batch)
        for tensor, (_, box) in zip(tensors, parts, strict=True)
    ]
    state["tensors"][batch] = tensors
    state["handlers"][batch] = state["client"].register_tensors(batch, things, timeout=LONG, allow_lossy=allow_lossy)
