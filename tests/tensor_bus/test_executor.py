"""From routes to moves: which bytes, and what errors call them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch

from etha_ray.plan import Box, Route
from etha_ray.tensor_bus.executor import Part, inflows


class _Part(Part):
    """Of one tensor, with these routes."""

    routes: tuple[Route, ...]

    def routes_in(self, position: int) -> tuple[Route, ...]:
        return self.routes


def _part(target: torch.Tensor, *routes: Route) -> Part:
    def member(peer: str, rank: int) -> Any:
        return SimpleNamespace(peer=peer, agent=SimpleNamespace(rank=rank, incarnation=f"{peer} {rank}"))

    match: Any = SimpleNamespace(index=0, local=[member("b", 10), member("b", 11)], remote=[member("a", 0), member("a", 1)])
    held: Any = SimpleNamespace(side=None, dtype=target.dtype)
    agreed: Any = SimpleNamespace(local=held, remote=held, shape=target.shape)
    part = _Part("batch", "pair", match, [7], [target], [agreed])
    object.__setattr__(part, "routes", routes)
    return part


def test_each_box_of_a_relayed_route_is_called_by_whom_it_comes_from() -> None:
    boxes = (Box((0,), (0,), (2,)), Box((4,), (2,), (2,)))
    target, source, lent = torch.zeros(4), torch.arange(8.0), torch.arange(4.0)
    found = inflows(_part(target, Route(1, 0, boxes, 4, relay=1)), lambda index, positions: [source], lambda index, positions: [lent])
    assert [each.move.name for each in found.moves] == ["tensor 7 of batch 'batch', from a[1] at agent 1 to b[0] at agent 10"] * 2
    assert [each.relayed and each.relayed.name for each in found.moves] == [
        "tensor 7 of batch 'batch', from b[1] at agent 11 to b[0] at agent 10"
    ] * 2
    assert [each.move.sources[0].tolist() for each in found.moves] == [[0.0, 1.0], [4.0, 5.0]]  # type: ignore[union-attr]
    assert [each.relayed and each.relayed.sources[0].tolist() for each in found.moves] == [[0.0, 1.0], [2.0, 3.0]]  # type: ignore[union-attr]
    assert (dict(found.direct), dict(found.relayed), {k: dict(v) for k, v in found.instead.items()}) == ({1: 0}, {1: 16}, {1: {1: 16}})
