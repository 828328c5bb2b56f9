"""Both sides of a model in one process, without agents: tables, agreement, and what each rank would register.

`crossed` moves the numbers by the layouts alone, as the bus would.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from etha_ray.layout import Layout, MeshSpec
from etha_ray.tensor_bus.tensors import Piece
from etha_ray.weights.agreement import Agreement, agree
from etha_ray.weights.layouts import Layouts, Seat
from etha_ray.weights.names import named_tensors
from etha_ray.weights.session import part_of
from etha_ray.weights.tables import Table, decode_table, encode_table, make_table


@dataclass(frozen=True)
class Group:
    """One side: what each of its ranks holds, and what it is told."""

    ranks: Sequence[Mapping[str, torch.Tensor]]
    rename: Any = None
    only: tuple[str, ...] = ()
    strict: bool = True
    placements: Any = None
    mesh: tuple[int, ...] | None = None
    given: Mapping[str, Any] = field(default_factory=dict)

    def spec(self, rank: int) -> MeshSpec | None:
        return None if self.mesh is None else MeshSpec(self.mesh, Layout(self.mesh, ("R",) * len(self.mesh)).coordinate(rank))

    def tables(self) -> list[Table]:
        found = []
        for rank, tensors in enumerate(self.ranks):
            layouts = Layouts(Seat(rank, len(self.ranks)), self.spec(rank), self.placements)
            table = make_table(named_tensors(tensors, self.rename), layouts, self.only, self.strict)
            assert decode_table(encode_table(table)) == table
            found.append(table)
        return found

    def held(self, rank: int) -> dict[tuple[str, ...], torch.Tensor]:
        return {one.key: one.tensor for one in named_tensors(self.ranks[rank], self.rename)}


def agreed(sender: Group, receiver: Group) -> Agreement:
    return agree("policy", sender.tables(), receiver.tables())


def crossed(sender: Group, receiver: Group) -> Agreement:
    """Move what crosses: put each tensor together from what the senders register, and cut it as the receivers register it."""
    agreement = agreed(sender, receiver)
    parts = {
        direction: [
            {name: [thing for thing, pair in part.tensors if pair == name] for name in [seat.name for seat in part.pairs]}
            for part in (part_of(agreement, direction, rank, group.held(rank), "batch", "session") for rank in range(len(group.ranks)))
        ]
        for direction, group in (("send", sender), ("recv", receiver))
    }
    for number, plan in enumerate(agreement.pairs):
        name = f"batch/session/{number}"
        crossings = [crossing for crossing in agreement.crossings if crossing.pair == number]
        for at, crossing in enumerate(crossings):
            at += number == 0  # the seal
            whole = torch.full(crossing.source.shape, -1.0)
            for index, rank in enumerate(plan.source_ranks):
                place(parts["send"][rank][name][at], plan.source, index, whole, give=True)
            assert not (whole == -1).any()
            for index, rank in enumerate(plan.target_ranks):
                place(parts["recv"][rank][name][at], plan.target, index, whole, give=False)
    return agreement


def place(thing: Any, layout: Layout, index: int, whole: torch.Tensor, *, give: bool) -> None:
    """Copy what a rank registers into the whole tensor (``give``), or out of it."""
    if isinstance(thing, Piece):
        assert tuple(thing.global_shape) == tuple(whole.shape)
        boxes = [(tuple(thing.offsets), (0,) * whole.dim(), tuple(thing.tensor.shape))]
        local = thing.tensor
    else:
        boxes, local = list(layout.region(index, tuple(whole.shape)).boxes()), thing
        assert tuple(local.shape) == layout.region(index, tuple(whole.shape)).shape
    for start, here, size in boxes:
        there = whole[tuple(slice(at, at + length) for at, length in zip(start, size, strict=True))]
        mine = local[tuple(slice(at, at + length) for at, length in zip(here, size, strict=True))]
        (there if give else mine).copy_(mine if give else there)
