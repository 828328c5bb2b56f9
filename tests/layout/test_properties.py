"""What a rank holds is what DTensor gives it, for any placements, on any mesh, of any shape."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed.tensor._utils import _compute_local_shape_and_global_offset

from etha_ray.layout import Axis, Layout
from tests.layout.dtensor import WORLD, as_torch, combined, coordinate, cut, held, playing
from tests.layout.strategies import cases, layouts, orders, shapes


@pytest.fixture(autouse=True, scope="module")
def _processes() -> Iterator[None]:
    with playing(0, WORLD):
        yield


@st.composite
def layouts_and_shapes(draw: st.DrawFn) -> tuple[Layout, tuple[int, ...]]:
    shape = draw(shapes())
    return draw(layouts(len(shape))), shape


@cases(500)
@given(layouts_and_shapes())
def test_region_is_dtensors(case: tuple[Layout, tuple[int, ...]]) -> None:
    layout, shape = case
    whole = torch.arange(math.prod(shape)).reshape(shape)
    for index, truth in enumerate(held(whole, layout)):
        region = layout.region(index, shape)
        assert region.shape == tuple(truth.shape)
        assert torch.equal(cut(whole, region), truth)
        for spans in region.intervals:
            assert all(start < stop for start, stop in spans)
            assert all(one[1] < other[0] for one, other in itertools.pairwise(spans)), "joined, disjoint and ascending"
    assert layout.global_shape({index: layout.region(index, shape).shape for index in range(layout.ranks)}) == shape


@cases(200)
@given(layouts_and_shapes())
def test_shapes_and_offsets_are_those_that_dtensor_computes(case: tuple[Layout, tuple[int, ...]]) -> None:
    layout, shape = case
    placements = as_torch(layout.resolve(len(shape)))
    for index in range(layout.ranks):
        region = layout.region(index, shape)
        size, start = _compute_local_shape_and_global_offset(shape, layout.mesh_shape, coordinate(layout, index), placements)
        assert region.shape == size
        if not region.is_empty:  # where nothing is held, an offset means nothing
            assert tuple(spans[0][0] for spans in region.intervals) == start


@cases(300)
@given(st.integers(0, 200), st.lists(st.tuples(st.integers(1, 6), st.integers(1, 9)), max_size=3), st.data())
def test_an_axis_finds_what_its_pieces_hold(size: int, cuts: list[tuple[int, int]], data: st.DataObject) -> None:
    axis = Axis(size, tuple(cuts))
    held = [[i for start, stop in axis.held(piece) for i in range(start, stop)] for piece in range(axis.count)]
    assert sorted(i for part in held for i in part) == list(range(size))
    low, high = sorted(data.draw(st.lists(st.integers(0, size), min_size=2, max_size=2)))
    found = list(axis.find([(low, high)]))
    assert [i for _, _, start, stop in found for i in range(start, stop)] == list(range(low, high))
    for piece, at, start, stop in found:
        assert held[piece][at : at + stop - start] == list(range(start, stop))


@cases(60)
@given(orders())
def test_full_tensor_reads_by_order(case: tuple[Layout, tuple[int, ...]]) -> None:
    ordered, shape = case
    layout = replace(ordered, by_order=False)
    assert Layout.decode(ordered.encode()) == ordered
    whole = torch.arange(math.prod(shape)).reshape(shape)
    regions = [ordered.region(index, shape) for index in range(layout.ranks)]
    assert torch.equal(combined(layout, as_torch(layout), shape, lambda index: cut(whole, regions[index])), whole)
    fitted, found = layout.fit({index: region.shape for index, region in enumerate(regions)})
    assert found == shape
    assert [fitted.region(index, shape) for index in range(layout.ranks)] == regions, "equal shapes in both readings, equal elements"
