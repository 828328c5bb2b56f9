"""Random shapes, layouts and sides for property tests, and how many of them.

``--hypothesis-profile=thorough`` runs 30 times as many cases, random ones: more than 100,000.
"""

from __future__ import annotations

import math
from dataclasses import replace
from unittest import mock

from hypothesis import HealthCheck, assume, settings
from hypothesis import strategies as st
from torch.distributed.tensor import Shard
from torch.distributed.tensor._dtensor_spec import DTensorSpec, ShardOrderEntry

from etha_ray.layout import Layout
from etha_ray.plan import Side

MAX_RANKS = 64
MAX_NUMEL = 20_000
SIZES = st.sampled_from([0, 1, 2, 3, 4, 5, 6, 7, 8, 11, 12, 13, 16, 17, 31, 32, 37, 64])

settings.register_profile("thorough", max_examples=30 * 100)


def cases(count: int) -> settings:
    """``count`` cases, the same in every run: a failure there is a change in the code, not luck."""
    usual = settings.get_profile("default").max_examples
    times = max(1, settings().max_examples // usual)
    return settings(
        max_examples=count * times, derandomize=times == 1, deadline=None, database=None, suppress_health_check=list(HealthCheck)
    )


@st.composite
def shapes(draw: st.DrawFn, max_dims: int = 4) -> tuple[int, ...]:
    shape = tuple(draw(st.lists(SIZES, max_size=max_dims)))
    assume(math.prod(shape) <= MAX_NUMEL)
    return shape


@st.composite
def meshes(draw: st.DrawFn, max_ranks: int = MAX_RANKS) -> tuple[int, ...]:
    mesh: list[int] = []
    for _ in range(draw(st.integers(1, 4))):
        mesh.append(draw(st.integers(1, max(1, min(8, max_ranks // math.prod(mesh))))))
    return tuple(draw(st.permutations(mesh)))


@st.composite
def layouts(draw: st.DrawFn, ndim: int, partial: tuple[str, ...] = (), max_ranks: int = MAX_RANKS) -> Layout:
    """Any placements on any mesh; with ``partial``, reduce operations, at least one dimension that is Partial by one of them."""
    mesh = draw(meshes(max_ranks))
    dims = st.integers(-ndim, ndim - 1)
    kinds = [st.just("R")]
    if ndim:
        kinds += [dims.map(lambda dim: f"S{dim}"), st.builds(lambda dim, factor: f"SS{dim}/{factor}", dims, factors(mesh))]
    tokens = [draw(st.one_of(kinds)) for _ in mesh]
    if partial:
        some = draw(st.sets(st.integers(0, len(mesh) - 1), min_size=1))
        tokens = [f"P({draw(st.sampled_from(partial))})" if dim in some else token for dim, token in enumerate(tokens)]
    return Layout.of(mesh, tokens)


def factors(mesh: tuple[int, ...]) -> st.SearchStrategy[int]:
    """Split factors: what FSDP with tensor parallelism makes, sizes of other mesh dimensions, and any others."""
    return st.one_of(st.sampled_from(mesh), st.sampled_from([1, 2, 3, 4, 5, 8, 50]))


@st.composite
def orders(draw: st.DrawFn) -> tuple[Layout, tuple[int, ...]]:
    """One tensor dimension that all mesh dimensions shard, in any order: as DTensor writes that down; read by order."""
    mesh = draw(meshes(max_ranks=24))
    order = ShardOrderEntry(0, tuple(draw(st.permutations(range(len(mesh))))))
    sizes = mock.Mock(size=mesh.__getitem__)
    placements = DTensorSpec._convert_shard_order_to_StridedShard((order,), (Shard(0),) * len(mesh), sizes)
    return replace(Layout.of(mesh, placements), by_order=True), (draw(st.integers(1, 60)), draw(st.integers(1, 2)))


@st.composite
def pairs_of_sides(draw: st.DrawFn, source: Layout, target: Layout) -> tuple[Side, Side]:
    """Agents in any order, with gaps and repeats, some or all or none of them on both sides; each agent on one host."""
    hosts = draw(st.integers(1, 9))
    apart = draw(st.sampled_from([0, 20, 1000]))
    found = []
    for layout, first in ((source, 0), (target, apart)):
        agents = draw(st.lists(st.integers(first, first + 40), min_size=layout.ranks, max_size=layout.ranks))
        found.append(Side(layout, tuple(agents), tuple(f"host{agent % hosts}" for agent in agents)))
    return found[0], found[1]
