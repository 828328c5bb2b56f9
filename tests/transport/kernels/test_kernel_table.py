"""Tables of regions: what copies come to."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from etha_ray.transport.kernels.source import CAST, DIMS, IN_PACKS, TILE
from etha_ray.transport.kernels.table import REGION, Region, regions_of, table_of
from tests.accelerator.host import HostAccelerator
from tests.contracts.transport import random_bytes


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
