"""Tables of regions: what they come to, and that the kernel does with them what torch does."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from etha_ray.transport.kernels.source import CAST, COPY_REGIONS, DIMS, IN_PACKS, TILE
from etha_ray.transport.kernels.table import REGION, Region, regions_of, table_of
from tests.accelerator.host import HostAccelerator
from tests.contracts.transport import bits, numbers, random_bytes, random_tensor

PLAIN = [torch.uint8, torch.bool, torch.bfloat16, torch.float32, torch.float64, torch.complex128, torch.float8_e4m3fn]
FLOATS = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def moved(source: torch.Tensor, target: torch.Tensor) -> list[Region]:
    """Runs the kernel; the regions that it was given."""
    regions = regions_of(source, target)
    assert regions is not None
    rows, first = table_of(regions)
    accelerator = HostAccelerator()
    arguments = (accelerator.upload(rows), accelerator.upload(first), len(rows), int(first[-1]))
    accelerator.launch(COPY_REGIONS, 2, arguments, accelerator.lane())
    return regions


@st.composite
def views(draw: st.DrawFn, shape: list[int], dtype: torch.dtype, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A view of ``shape``, a random slice of a random permutation of its memory, and that memory."""
    margins = [draw(st.tuples(st.sampled_from([0, 0, 1, 8]), st.sampled_from([0, 0, 2]), st.sampled_from([1, 1, 1, 2]))) for _ in shape]
    order = draw(st.permutations(range(len(shape)))) if draw(st.booleans()) else list(range(len(shape)))
    held = [before + size * step + after for size, (before, after, step) in zip(shape, margins, strict=True)]
    memory = (numbers if dtype in FLOATS else random_tensor)(tuple(held[dim] for dim in order), dtype, seed)
    view = memory.permute([order.index(dim) for dim in range(len(shape))])
    for dim, (size, (before, _, step)) in enumerate(zip(shape, margins, strict=True)):
        view = view.narrow(dim, before, size * step)[(slice(None),) * dim + (slice(None, None, step),)]
    return view, memory


SHAPES = st.lists(st.sampled_from([1, 2, 3, 4, 5, 8, 16, 33]), min_size=0, max_size=4)


@settings(max_examples=250, deadline=None)
@given(st.data(), SHAPES, st.sampled_from(PLAIN))
def test_any_layouts(data: st.DataObject, shape: list[int], dtype: torch.dtype) -> None:
    (source, _), (target, memory) = (data.draw(views(shape, dtype, seed)) for seed in (0, 1))
    wanted = memory.clone()
    wanted.as_strided(target.shape, target.stride(), target.storage_offset()).copy_(source)
    regions = moved(source, target)
    assert bits(memory) == bits(wanted)
    assert sum(region.units << region.kind for region in regions) == source.nbytes
    for region in regions:
        width = 1 << region.kind
        steps = [step for _, *both in region.dims for step in both]
        assert all(place % width == 0 for place in (region.source, region.target, *steps))


@settings(max_examples=250, deadline=None)
@given(st.data(), SHAPES, st.sampled_from(FLOATS), st.sampled_from(FLOATS))
def test_any_casts(data: st.DataObject, shape: list[int], one: torch.dtype, other: torch.dtype) -> None:
    (source, _), (target, memory) = data.draw(views(shape, one, 0)), data.draw(views(shape, other, 1))
    wanted = memory.clone()
    wanted.as_strided(target.shape, target.stride(), target.storage_offset()).copy_(source)
    moved(source, target)
    assert bits(memory) == bits(wanted)


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 40), st.integers(0, 40), st.integers(0, 5 * TILE))
def test_bytes_at_any_address(lead: int, other: int, size: int) -> None:
    source, target = random_bytes(6 * TILE), random_bytes(6 * TILE, 1)
    wanted = target.clone()
    wanted[other : other + size] = source[lead : lead + size]
    moved(source[lead : lead + size], target[other : other + size])
    assert torch.equal(target, wanted)


def widths(source: torch.Tensor, target: torch.Tensor) -> list[int]:
    regions = regions_of(source, target)
    assert regions is not None
    return [1 << region.kind for region in regions]


def test_units_are_as_wide_as_can_be() -> None:
    memory, other = (HostAccelerator().empty(1 << 20).view(torch.bfloat16) for _ in range(2))
    square, second = memory.view(512, 1024), other.view(512, 1024)
    assert widths(square, second) == [16]
    assert widths(square[:, :8], second[:, 8:16]) == [16]  # rows of one unit
    assert widths(square[:, :12], second[:, :12]) == [8]
    assert widths(square[:, 2:18], second[:, :16]) == [4]
    assert widths(square[:, :7], second[:, :7]) == [2]
    assert widths(memory[1:], other[1:]) == [2, 16]  # as far from a boundary on both sides
    assert widths(memory[1:-9], other[9:-1]) == [2, 16, 2]
    assert widths(memory[3:1003], other[3:1003]) == [2]  # not worth three regions
    assert widths(memory[1:], other[:-1]) == [2]
    assert widths(square.t(), second.t()) == [16]  # both transposed alike
    assert widths(square[:, ::2], second[:, ::2]) == [2]


def test_dimensions_are_merged() -> None:
    def dims(source: torch.Tensor, target: torch.Tensor) -> list[int]:
        regions = regions_of(source, target)
        assert regions is not None
        return [len(region.dims) for region in regions]

    cube, other = torch.zeros(8, 16, 32), torch.zeros(8, 16, 32)
    assert dims(cube, other) == [1]
    assert dims(cube[:, 2:9], other[:, :7]) == [2]
    assert dims(cube[1:, 2:9, 3:9], other[1:, 2:9, 3:9]) == [3]
    assert dims(torch.zeros(1, 32).expand(500, 32), torch.zeros(500, 32)) == [2]
    assert regions_of(torch.zeros(0, 3), torch.zeros(0, 3)) == []


def test_what_the_kernel_does_not_know() -> None:
    assert regions_of(torch.zeros(4), torch.zeros(4, dtype=torch.int32)) is None
    many = torch.zeros((3,) * (DIMS + 1))[(slice(None, None, 2),) * (DIMS + 1)]
    assert regions_of(many, torch.zeros(many.shape)) is None
    odd = torch.frombuffer(random_bytes(17).numpy(), dtype=torch.float32, offset=1)
    assert regions_of(odd, torch.zeros(4, dtype=torch.bfloat16)) is None
    assert regions_of(odd, torch.zeros(4)) is not None


def test_casts_go_in_packs_where_elements_lie_together() -> None:
    def kinds(source: torch.Tensor, target: torch.Tensor) -> list[bool]:
        regions = regions_of(source, target)
        assert regions is not None
        assert all(region.kind & CAST for region in regions)
        return [bool(region.kind & IN_PACKS) for region in regions]

    wide, narrow = torch.zeros(64, 64), torch.zeros(64, 64, dtype=torch.bfloat16)
    assert kinds(wide, narrow) == [True]
    assert kinds(wide[:, 4:32], narrow[:, 8:36]) == [True]
    assert kinds(wide[:, 4:31], narrow[:, 8:35]) == [False]
    assert kinds(wide[0, :31], narrow[0, :31]) == [True, False]
    assert kinds(wide[:, 1:33], narrow[:, 8:40]) == [False]


def test_more_units_than_the_kernel_counts() -> None:
    """On memory that is not there."""
    for shape in [(5 << 30,), (3, 1 << 31), (1 << 20, 1 << 13)]:
        source, target = (torch.empty(shape, dtype=torch.uint8, device="meta")[..., :-1] for _ in range(2))
        regions = regions_of(source, target)
        assert regions is not None
        assert all(region.units < 1 << 31 for region in regions)
        assert sum(region.units << region.kind for region in regions) == math.prod(source.shape)
        ends = sorted((region.target, region.target + sum((size - 1) * step for size, _, step in region.dims)) for region in regions)
        assert all(stop < start for (_, stop), (start, _) in itertools.pairwise(ends))


@pytest.mark.parametrize("count", [1, 5000])
def test_the_table(count: int) -> None:
    regions = [Region(16 * number, 32 * number, 4, ((TILE + number % 3, 16, 16),)) for number in range(count)]
    rows, first = table_of(regions)
    assert rows.dtype == REGION
    assert first[0] == 0
    assert [int(after - before) for before, after in itertools.pairwise(first)] == [1 if n % 3 == 0 else 2 for n in range(count)]
    assert rows["units"].tolist() == [region.units for region in regions]
