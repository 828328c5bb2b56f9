"""Any layout to any layout: the plan, applied to real data in one process, gives each target exactly its slice."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor._utils import _compute_local_shape_and_global_offset

from etha_ray.errors import LayoutError
from etha_ray.layout import Layout
from etha_ray.plan import Side, TensorPlan, plan, routes_into, routes_out_of

MAX_RANKS = 32
MAX_NUMEL = 20_000
SIZES = st.sampled_from([0, 1, 2, 3, 4, 5, 6, 7, 8, 11, 12, 13, 16, 17, 31, 32, 37])


def fixed(cases: int) -> settings:
    """The same cases in every run: a failure here is a change in the code, not luck."""
    return settings(max_examples=cases, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck))


@st.composite
def shapes(draw: st.DrawFn) -> tuple[int, ...]:
    shape = tuple(draw(st.lists(SIZES, max_size=4)))
    assume(math.prod(shape) <= MAX_NUMEL)
    return shape


@st.composite
def layouts(draw: st.DrawFn, ndim: int) -> Layout:
    mesh: list[int] = []
    for _ in range(draw(st.integers(1, 4))):
        mesh.append(draw(st.integers(1, max(1, min(8, MAX_RANKS // math.prod(mesh))))))
    shards = [f"S{dim}" for dim in range(-ndim, ndim)]
    return Layout.of(mesh, [draw(st.sampled_from(["R", *shards])) for _ in mesh])


@st.composite
def sides(draw: st.DrawFn, ndim: int) -> Side:
    """Agents in any order, with gaps and repeats; one host an agent; the two sides of a case share both at random."""
    layout = draw(layouts(ndim))
    agents = draw(st.lists(st.integers(0, 40), min_size=layout.ranks, max_size=layout.ranks))
    hosts = draw(st.integers(1, 9))
    return Side(layout, tuple(agents), tuple(f"host{agent % hosts}" for agent in agents))


@st.composite
def cases(draw: st.DrawFn) -> tuple[Side, Side, tuple[int, ...]]:
    shape = draw(shapes())
    return draw(sides(len(shape))), draw(sides(len(shape))), shape


def held(whole: torch.Tensor, layout: Layout, index: int) -> torch.Tensor:
    """What DTensor says that a position holds, cut from the whole tensor."""
    placements = [Replicate() if token == "R" else Shard(int(token[1:]) % whole.ndim) for token in layout.placements]
    size, start = _compute_local_shape_and_global_offset(tuple(whole.shape), layout.mesh_shape, list(layout.coordinate(index)), placements)
    return whole[tuple(slice(at, at + n) for at, n in zip(start, size, strict=True))]


def slices(start: tuple[int, ...], size: tuple[int, ...]) -> tuple[slice, ...]:
    return tuple(slice(at, at + n) for at, n in zip(start, size, strict=True))


@fixed(350)
@given(st.data())
def test_region_is_dtensors(data: st.DataObject) -> None:
    shape = data.draw(shapes())
    layout = data.draw(layouts(len(shape)))
    whole = torch.arange(math.prod(shape)).reshape(shape)
    for index in range(layout.ranks):
        region = layout.region(index, shape)
        truth = held(whole, layout, index)
        assert region.shape == tuple(truth.shape)
        assert torch.equal(whole[tuple(slice(*(spans[0] if spans else (0, 0))) for spans in region.intervals)], truth)
    assert layout.global_shape({index: layout.region(index, shape).shape for index in range(layout.ranks)}) == shape


@fixed(500)
@given(cases())
def test_plan_moves_each_element_once_and_right(case: tuple[Side, Side, tuple[int, ...]]) -> None:
    source, target, shape = case
    whole = torch.arange(math.prod(shape)).reshape(shape)
    given = [held(whole, source.layout, index) for index in range(source.layout.ranks)]
    for index in range(target.layout.ranks):
        wanted = held(whole, target.layout, index)
        got, writes = torch.full(wanted.shape, -1), torch.zeros(wanted.shape, dtype=torch.int64)
        for route in routes_into(source, target, shape, index):
            assert route.target == index
            for box in route.boxes:
                here = slices(box.target_start, box.size)
                got[here] = given[route.source][slices(box.source_start, box.size)]
                writes[here] += 1
        assert torch.equal(got, wanted)
        assert bool((writes == 1).all())


@fixed(250)
@given(cases())
def test_both_sides_see_one_plan_and_it_is_proved(case: tuple[Side, Side, tuple[int, ...]]) -> None:
    source, target, shape = case
    made = plan(source, target, shape)
    made.verify()
    sent = [route for index in range(source.layout.ranks) for route in routes_out_of(source, target, shape, index)]
    taken = [route for index in range(target.layout.ranks) for route in routes_into(source, target, shape, index)]
    assert sorted(sent) == sorted(taken) == sorted(made.routes)
    assert len({(route.source, route.target) for route in sent}) == len(sent)
    assert sum(route.numel for route in sent) == sum(target.layout.region(i, shape).numel for i in range(target.layout.ranks))
    assert all(len(route.boxes) == 1 for route in sent), "regions of Shard are boxes, so a route is one box"


@fixed(150)
@given(cases())
def test_the_nearest_holder_is_asked(case: tuple[Side, Side, tuple[int, ...]]) -> None:
    source, target, shape = case
    for index in range(target.layout.ranks):
        for route in routes_into(source, target, shape, index):
            holders = source.layout.replicas(route.source)
            if target.agents[index] in {source.agents[holder] for holder in holders}:
                assert source.agents[route.source] == target.agents[index]
            elif target.hosts[index] in {source.hosts[holder] for holder in holders}:
                assert source.hosts[route.source] == target.hosts[index]


def changed(data: st.DataObject, made: TensorPlan) -> TensorPlan:
    """``made`` with one thing wrong."""
    number = data.draw(st.integers(0, len(made.routes) - 1), "route")
    route = made.routes[number]
    kind = data.draw(st.sampled_from(["lose", "repeat", "shift source", "shift target", "shrink"]), "change")
    if kind == "lose":
        return replace(made, routes=made.routes[:number] + made.routes[number + 1 :])
    if kind == "repeat":
        return replace(made, routes=(*made.routes, route))
    box = route.boxes[0]
    assume(box.size)
    dim = data.draw(st.integers(0, len(box.size) - 1), "dimension")
    step = data.draw(st.sampled_from([-1, 1]), "step")
    if kind == "shift source":
        box = replace(box, source_start=(*box.source_start[:dim], box.source_start[dim] + step, *box.source_start[dim + 1 :]))
    elif kind == "shift target":
        box = replace(box, target_start=(*box.target_start[:dim], box.target_start[dim] + step, *box.target_start[dim + 1 :]))
    else:
        box = replace(box, size=(*box.size[:dim], box.size[dim] - 1, *box.size[dim + 1 :]))
    wrong = replace(route, boxes=(box,), numel=box.numel)
    return replace(made, routes=(*made.routes[:number], wrong, *made.routes[number + 1 :]))


@fixed(150)
@given(cases(), st.data())
def test_the_proof_fails_on_a_changed_plan(case: tuple[Side, Side, tuple[int, ...]], data: st.DataObject) -> None:
    made = plan(*case)
    assume(made.routes)
    with pytest.raises(LayoutError):
        changed(data, made).verify()


def test_every_pair_of_small_layouts() -> None:
    """No chance involved: all pairs of 1-D and 2-D layouts of up to 4 ranks, on a shape that divides by nothing."""
    meshes = [(1,), (2,), (3,), (2, 2)]
    found = [Layout.of(mesh, tokens) for mesh in meshes for tokens in itertools.product(["R", "S0", "S1"], repeat=len(mesh))]
    everyone = [Side(layout, tuple(range(layout.ranks)), ("host",) * layout.ranks) for layout in found]
    for source, target in itertools.product(everyone, repeat=2):
        made = plan(source, target, (5, 7))
        made.verify()
        sent = {route for index in range(source.layout.ranks) for route in routes_out_of(source, target, (5, 7), index)}
        assert sent == set(made.routes)
