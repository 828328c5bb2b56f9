"""From a plan to bytes: who gets how much of this rank, and the copies that fill this rank's tensors.

A receiving agent opens the senders' memory once, at registration, and prepares one program of copies. A transfer only runs
that program.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from etha_ray.plan import Box, Route, paired_route, routes_into, routes_out_of
from etha_ray.tensor_bus.pair import Match
from etha_ray.transport.base import Copy

OpenRemote = Callable[[int, Sequence[int]], Sequence[torch.Tensor]]
"""Opens tensors of a remote mesh index: ``open_remote(index, positions)`` gives them in the order of ``positions``."""


@dataclass(frozen=True)
class Part:
    """The tensors of one batch that belong to one pair, as this rank holds them.

    ``shapes`` are the global shapes; in a pair without meshes, where every rank has tensors of its own, this rank's.
    """

    batch_id: str
    pair_name: str
    match: Match
    tensors: Sequence[torch.Tensor]
    shapes: Sequence[tuple[int, ...]]

    def routes_in(self, position: int) -> tuple[Route, ...]:
        """What this rank receives of the tensor at ``position``."""
        match, shape = self.match, self.shapes[position]
        if match.paired:
            return (paired_route(match.index, shape),)
        return routes_into(match.remote_side, match.local_side, shape, match.index)

    def routes_out(self, position: int) -> tuple[Route, ...]:
        """What this rank gives of the tensor at ``position``."""
        match, shape = self.match, self.shapes[position]
        if match.paired:
            return (paired_route(match.index, shape),)
        return routes_out_of(match.local_side, match.remote_side, shape, match.index)


def bytes_out(part: Part) -> dict[int, int]:
    """Bytes that this rank gives to each remote index that gets any."""
    total: dict[int, int] = defaultdict(int)
    for position, tensor in enumerate(part.tensors):
        for route in part.routes_out(position):
            if route.numel:
                total[route.target] += route.numel * tensor.element_size()
    return dict(total)


def copies_in(part: Part, open_remote: OpenRemote) -> tuple[list[Copy], dict[int, int]]:
    """The copies that fill this rank's tensors, and the bytes that each remote index gives."""
    wanted: dict[int, list[tuple[int, Route]]] = defaultdict(list)
    for position in range(len(part.tensors)):
        for route in part.routes_in(position):
            if route.numel:
                wanted[route.source].append((position, route))
    copies: list[Copy] = []
    total: dict[int, int] = {}
    for index, routes in sorted(wanted.items()):
        sources = open_remote(index, [position for position, _ in routes])
        total[index] = 0
        for (position, route), source in zip(routes, sources, strict=True):
            target = part.tensors[position]
            total[index] += route.numel * target.element_size()
            copies.extend((_cut(source, box.source_start, box), _cut(target, box.target_start, box)) for box in route.boxes)
    return copies, total


def _cut(tensor: torch.Tensor, start: tuple[int, ...], box: Box) -> torch.Tensor:
    if tuple(tensor.shape) == box.size:
        return tensor
    return tensor[tuple(slice(first, first + size) for first, size in zip(start, box.size, strict=True))]
