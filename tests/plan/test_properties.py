"""Any layout to any layout: the plan, applied to real data in one process, gives each target what DTensor says it holds."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch.distributed.tensor import Partial, Replicate

from etha_ray.errors import LayoutError
from etha_ray.layout import Layout, Piece, Pieces
from etha_ray.plan import Side, TensorPlan, plan, routes_into, routes_out_of
from tests.layout.dtensor import WORLD, as_torch, combined, cut, held, playing
from tests.layout.strategies import cases, layouts, orders, pairs_of_sides, shapes
from tests.plan.apply import filled, least_share, slices

Case = tuple[Side, Side, tuple[int, ...]]

OPS = [("sum",), ("avg",), ("max",), ("min",), ("product",), ("sum", "avg")]

SHARES = st.sampled_from([1, 1, 5, 1 << 17])
"""Elements below which demands are not divided: mostly few, since the tensors are small."""


@pytest.fixture(autouse=True, scope="module")
def _processes() -> Iterator[None]:
    with playing(0, WORLD):
        yield


@st.composite
def moves(draw: st.DrawFn) -> Case:
    shape = draw(shapes())
    source, target = draw(layouts(len(shape))), draw(layouts(len(shape)))
    if draw(st.integers(0, 9)) == 0:
        target = Layout.whole()  # one process without a mesh
    return *draw(pairs_of_sides(source, target)), shape


@st.composite
def reductions(draw: st.DrawFn, max_ranks: int = WORLD) -> Case:
    shape = draw(shapes())
    source = draw(layouts(len(shape), partial=draw(st.sampled_from(OPS)), max_ranks=max_ranks))
    return *draw(pairs_of_sides(source, draw(layouts(len(shape))))), shape


@cases(600)
@given(moves(), SHARES, st.integers(0, 9))
def test_every_target_gets_its_slice(case: Case, least: int, turn: int) -> None:
    source, target, shape = case
    whole = torch.arange(math.prod(shape)).reshape(shape)
    given = held(whole, source.layout)
    with least_share(least):
        for index, wanted in enumerate(held(whole, target.layout)):
            routes = routes_into(source, target, shape, index, turn)
            assert all(route.target == index and route.numel and not route.others for route in routes)
            assert torch.equal(filled(routes, given.__getitem__, wanted, None), wanted)


def contributions(shape: tuple[int, ...], layout: Layout) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """What the ranks of a layout that has Partial contribute to the whole tensor, and what of it each holds.

    Ranks at the same place along all Partial dimensions contribute the same.
    """
    assert layout.partial is not None
    base = 1 + torch.arange(math.prod(shape), dtype=torch.float32).reshape(shape) % 7
    whole = []
    for index in range(layout.ranks):
        number = sum(layout.coordinate(index)[dim] * 10**i for i, dim in enumerate(layout.partial.dims))
        whole.append(torch.where(base > number % 5, base - number % 3, -base / 2))
    unreduced = Layout(layout.mesh_shape, tuple("R" if token.startswith("P") else token for token in layout.placements))
    return whole, held(whole, unreduced)


@cases(200)
@given(reductions(), SHARES, st.integers(0, 9))
def test_contributions_are_combined_as_dtensor_does(case: Case, least: int, turn: int) -> None:
    source, target, shape = case
    whole, given = contributions(shape, source.layout)
    # What the ranks contribute to the whole tensor, reduced by DTensor: the reduction without the shards. The next test has both.
    unsharded = [placement if isinstance(placement, Partial) else Replicate() for placement in as_torch(source.layout)]
    truth = combined(source.layout, unsharded, shape, whole.__getitem__)
    with least_share(least):
        for index, wanted in enumerate(held(truth, target.layout)):
            got = filled(routes_into(source, target, shape, index, turn), given.__getitem__, wanted, source.layout.partial)
            torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)


@cases(80)
@given(reductions(max_ranks=16))
def test_full_tensor_of_partials_and_shards(case: Case) -> None:
    source, target, shape = case
    assume(not any(token.startswith("SS") for token in source.layout.placements))  # full_tensor itself may be wrong: see Layout
    _, given = contributions(shape, source.layout)
    truth = combined(source.layout, as_torch(source.layout.resolve(len(shape))), shape, given.__getitem__)
    for index, wanted in enumerate(held(truth, target.layout)):
        got = filled(routes_into(source, target, shape, index), given.__getitem__, wanted, source.layout.partial)
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)


@cases(80)
@given(st.data())
def test_a_gathered_target_is_the_whole_tensor(data: st.DataObject) -> None:
    """The other way round: `full_tensor` puts together what the plan gave to the targets."""
    shape = data.draw(shapes())
    target = data.draw(layouts(len(shape), max_ranks=16))
    assume(not any(token.startswith("SS") for token in target.placements))
    source, sink = data.draw(pairs_of_sides(data.draw(layouts(len(shape))), target))
    whole = torch.arange(math.prod(shape)).reshape(shape)
    given = held(whole, source.layout)
    got = [
        filled(routes_into(source, sink, shape, index), given.__getitem__, wanted, None) for index, wanted in enumerate(held(whole, target))
    ]
    assert torch.equal(combined(target, as_torch(target.resolve(len(shape))), shape, got.__getitem__), whole)


@cases(300)
@given(st.one_of(moves(), reductions()), SHARES, st.integers(0, 9))
def test_both_sides_see_one_plan_and_it_is_proved(case: Case, least: int, turn: int) -> None:
    source, target, shape = case
    with least_share(least):
        made = plan(source, target, shape, turn)
        made.verify()
        sent = [route for i in range(source.layout.ranks) for route in routes_out_of(source, target, shape, i, turn)]
        taken = [route for i in range(target.layout.ranks) for route in routes_into(source, target, shape, i, turn)]
    assert sorted(taken) == sorted(made.routes)
    assert sorted(sent) == sorted(route for route in made.routes for _ in route.sources), "each contributor has its copy"
    assert len({(route.sources, route.target) for route in taken}) == len(taken)
    contributors = 1 if source.layout.partial is None else source.layout.partial.count
    assert all(len(route.sources) == contributors for route in taken)
    assert sum(route.numel for route in taken) == sum(target.layout.region(i, shape).numel for i in range(target.layout.ranks))


@cases(100)
@given(orders(), st.data(), st.booleans())
def test_layouts_that_are_read_by_order(case: tuple[Layout, tuple[int, ...]], data: st.DataObject, source_is: bool) -> None:
    ordered, shape = case
    other = data.draw(layouts(len(shape)))
    source, target = data.draw(pairs_of_sides(*((ordered, other) if source_is else (other, ordered))))
    whole = torch.arange(math.prod(shape)).reshape(shape)
    mine, others = [cut(whole, ordered.region(index, shape)) for index in range(ordered.ranks)], held(whole, other)
    given, wanted = (mine, others) if source_is else (others, mine)
    plan(source, target, shape).verify()
    for index, expected in enumerate(wanted):
        assert torch.equal(filled(routes_into(source, target, shape, index), given.__getitem__, expected, None), expected)


@cases(200)
@given(st.one_of(moves(), reductions()))
def test_the_nearest_holder_is_asked(case: Case) -> None:
    source, target, shape = case
    for index in range(target.layout.ranks):
        for route in routes_into(source, target, shape, index):
            for giver in route.sources if route.relay is None else ():
                holders = source.layout.replicas(giver)
                if target.agents[index] in {source.agents[holder] for holder in holders}:
                    assert source.agents[giver] == target.agents[index]
                elif target.hosts[index] in {source.hosts[holder] for holder in holders}:
                    assert source.hosts[giver] == target.hosts[index]


@st.composite
def boxes(draw: st.DrawFn, shape: tuple[int, ...], count: int) -> Pieces:
    """``count`` ranks that hold any boxes, or none."""
    found = []
    for _ in range(count):
        ends = [sorted(draw(st.lists(st.integers(0, size), min_size=2, max_size=2))) for size in shape]
        box = tuple(start for start, _ in ends), tuple(stop - start for start, stop in ends)
        found.append(None if shape and draw(st.integers(0, 4)) == 0 else box)
    return Pieces(shape, tuple(found))


@st.composite
def tilings(draw: st.DrawFn, shape: tuple[int, ...]) -> Pieces:
    """Ranks that hold the tensor between them: boxes from cutting it again and again, some of them twice, in any order."""
    tiles = [(tuple(0 for _ in shape), shape)]
    for _ in range(draw(st.integers(0, 12)) if shape else 0):
        offsets, sizes = tiles.pop(draw(st.integers(0, len(tiles) - 1)))
        dim = draw(st.integers(0, len(shape) - 1))
        at = draw(st.integers(0, sizes[dim]))
        for start, size in ((0, at), (at, sizes[dim] - at)):
            tiles.append(((*offsets[:dim], offsets[dim] + start, *offsets[dim + 1 :]), (*sizes[:dim], size, *sizes[dim + 1 :])))
    held_by = [*tiles, *draw(st.lists(st.sampled_from(tiles), max_size=6))]
    return Pieces(shape, tuple(draw(st.permutations(held_by))))


@cases(300)
@given(st.data(), SHARES)
def test_explicit_pieces(data: st.DataObject, least: int) -> None:
    shape = data.draw(shapes())
    some = st.one_of(st.integers(1, 12).flatmap(lambda count: boxes(shape, count)), layouts(len(shape), max_ranks=16))
    source, target = data.draw(pairs_of_sides(data.draw(st.one_of(tilings(shape), layouts(len(shape), max_ranks=16))), data.draw(some)))
    whole = torch.arange(math.prod(shape)).reshape(shape)
    given, wanted = (
        held(whole, side.layout) if isinstance(side.layout, Layout) else [told(whole, piece) for piece in side.layout.pieces]
        for side in (source, target)
    )
    with least_share(least):
        made = plan(source, target, shape)
        made.verify()
        sent = [route for index in range(source.layout.ranks) for route in routes_out_of(source, target, shape, index)]
    assert sorted(sent) == sorted(made.routes)
    for index, mine in enumerate(wanted):
        into = [route for route in made.routes if route.target == index]
        assert torch.equal(filled(into, given.__getitem__, mine, None), mine)


def told(whole: torch.Tensor, piece: Piece | None) -> torch.Tensor:
    """A piece of the whole tensor; nothing of it for None."""
    offsets, sizes = piece or ((0,) * whole.ndim, (0,) * whole.ndim)
    return whole[slices(offsets, sizes)]


def changed(data: st.DataObject, made: TensorPlan) -> TensorPlan:
    """``made`` with one thing wrong."""
    number = data.draw(st.integers(0, len(made.routes) - 1), "route")
    route = made.routes[number]
    kinds = ["lose", "repeat", "shift source", "shift target", "shrink", *(["lose one", "repeat one", "swap"] if route.others else [])]
    kind = data.draw(st.sampled_from(kinds), "change")
    if kind == "lose":
        return replace(made, routes=made.routes[:number] + made.routes[number + 1 :])
    if kind == "repeat":
        return replace(made, routes=(*made.routes, route))
    if kind == "lose one":
        wrong = replace(route, others=route.others[1:])
    elif kind == "repeat one":
        wrong = replace(route, others=(*route.others, route.source))
    elif kind == "swap":
        wrong = replace(route, source=route.others[0], others=(route.source, *route.others[1:]))
    else:
        box = data.draw(st.sampled_from(route.boxes), "box")
        assume(box.size)
        dim = data.draw(st.integers(0, len(box.size) - 1), "dimension")
        step = data.draw(st.sampled_from([-1, 1]), "step")
        field = {"shift source": "source_start", "shift target": "target_start", "shrink": "size"}[kind]
        old = getattr(box, field)
        new = replace(box, **{field: (*old[:dim], old[dim] + (-1 if kind == "shrink" else step), *old[dim + 1 :])})
        others = tuple(other for other in route.boxes if other is not box)
        wrong = replace(route, boxes=(*others, new), numel=route.numel - box.numel + new.numel)
    return replace(made, routes=(*made.routes[:number], wrong, *made.routes[number + 1 :]))


@cases(200)
@given(st.one_of(moves(), reductions()), st.data())
def test_the_proof_fails_on_a_changed_plan(case: Case, data: st.DataObject) -> None:
    made = plan(*case)
    assume(made.routes)
    with pytest.raises(LayoutError):
        changed(data, made).verify()
