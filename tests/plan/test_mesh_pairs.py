"""Eight pairs of four-dimensional meshes, with the placements of a benchmark for transfers between them."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from torch.distributed.tensor import Partial, Replicate, Shard
from torch.distributed.tensor.placement_types import Placement, _StridedShard

from etha_ray.layout import Layout
from etha_ray.plan import plan, routes_out_of
from tests.layout.dtensor import WORLD, as_torch, combined, held, playing
from tests.plan.apply import far, filled, side

PAIRS = [
    ((1, 1, 4, 2), (4, 2, 1, 1)),
    ((8, 1, 1, 1), (1, 2, 2, 2)),
    ((1, 2, 4, 1), (8, 1, 1, 1)),
    ((2, 2, 2, 1), (1, 1, 4, 2)),
    ((2, 4, 1, 1), (1, 2, 4, 1)),
    ((4, 1, 1, 2), (2, 1, 1, 4)),
    ((4, 1, 2, 1), (1, 1, 1, 8)),
    ((4, 2, 1, 1), (1, 1, 2, 4)),
]


@pytest.fixture(autouse=True, scope="module")
def _processes() -> Iterator[None]:
    with playing(0, WORLD):
        yield


@pytest.mark.parametrize("shape", [(64, 16), (37, 5), (3, 1)], ids=str)
@pytest.mark.parametrize("second", [Shard(0), Replicate(), Partial("sum")], ids=str)
@pytest.mark.parametrize(("source_mesh", "target_mesh"), PAIRS, ids=str)
def test_mesh_pairs(source_mesh: tuple[int, ...], target_mesh: tuple[int, ...], second: Placement, shape: tuple[int, ...]) -> None:
    source = side(Layout.of(source_mesh, [Replicate(), second, Replicate(), Shard(1)]).encode())
    strided = _StridedShard(0, split_factor=target_mesh[3])  # as FSDP2 has it with tensor parallelism
    target = far(Layout.of(target_mesh, [Replicate(), Replicate(), strided, Shard(0)]).encode())
    assert isinstance(source.layout, Layout)
    assert isinstance(target.layout, Layout)
    whole = torch.arange(math.prod(shape)).reshape(shape)
    sharded = Layout(source_mesh, tuple("R" if token.startswith("P") else token for token in source.layout.placements))
    given = held(
        [whole + 1000 * source.layout.coordinate(index)[1] if second == Partial() else whole for index in range(sharded.ranks)], sharded
    )
    truth = combined(source.layout, as_torch(source.layout), shape, given.__getitem__)
    made = plan(source, target, shape)
    made.verify()
    for index, wanted in enumerate(held(truth, target.layout)):
        into = [route for route in made.routes if route.target == index]
        assert torch.equal(filled(into, given.__getitem__, wanted, made.reduction), wanted)
    sent = [route for index in range(sharded.ranks) for route in routes_out_of(source, target, shape, index)]
    assert sorted(sent) == sorted(route for route in made.routes for _ in route.sources)
