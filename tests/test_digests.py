"""Digests of tensors in any layout: the same for all layouts of one tensor, and others for others."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.tensor import Replicate, Shard

from etha_ray.digests import digest, elements, owned, sums
from etha_ray.dtypes import DTYPES
from etha_ray.layout import Layout, Pieces
from tests.contracts.transport import random_tensor

SAMPLES = [torch.bool, torch.bfloat16, torch.float32, torch.int64, torch.complex64, torch.complex128, torch.float8_e4m3fn]


def of(whole: torch.Tensor, layout: Layout | Pieces, order: list[int] | None = None) -> str:
    """The digest from each rank's own part."""
    shape, total = tuple(whole.shape), np.zeros(3, dtype=np.uint64)
    for index in order or range(layout.ranks):
        region = layout.region(index, shape)
        local = torch.empty(region.shape, dtype=whole.dtype)
        for first, at, size in region.boxes():
            cut = [tuple(slice(a, a + n) for a, n in zip(start, size, strict=True)) for start in (at, first)]
            local[cut[0]] = whole[cut[1]]
        if index % 2 and local.dim() > 1:
            local = local.t().contiguous().t() if local.dim() == 2 else local
        total += sums(local, shape, owned(layout, index, shape))
    assert int(total[2]) == elements(whole.dtype, shape)
    return digest(total, whole.dtype, shape)


@st.composite
def cases(draw: st.DrawFn) -> tuple[torch.Tensor, Layout, list[int]]:
    shape = tuple(draw(st.lists(st.integers(0, 9), max_size=3)))
    mesh = draw(st.lists(st.integers(1, 4), min_size=1, max_size=2))
    choices = [Replicate(), *(Shard(dim) for dim in range(len(shape)))]
    layout = Layout.of(mesh, [draw(st.sampled_from(choices)) for _ in mesh])
    return (
        random_tensor(shape, draw(st.sampled_from(SAMPLES)), draw(st.integers(0, 99))),
        layout,
        draw(st.permutations(range(layout.ranks))),
    )


@settings(max_examples=200, deadline=None)
@given(cases())
def test_it_does_not_depend_on_the_layout(case: tuple[torch.Tensor, Layout, list[int]]) -> None:
    whole, layout, order = case
    assert of(whole, layout, list(order)) == of(whole, Layout.whole())


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_pieces_may_overlap_in_any_way(data: st.DataObject) -> None:
    shape = (data.draw(st.integers(1, 9)), data.draw(st.integers(1, 9)))
    pieces: list[tuple[tuple[int, ...], tuple[int, ...]] | None] = [None]
    for _ in range(data.draw(st.integers(0, 4))):
        at = tuple(data.draw(st.integers(0, size - 1)) for size in shape)
        pieces.append((at, tuple(data.draw(st.integers(1, size - a)) for a, size in zip(at, shape, strict=True))))
    layout = Pieces(shape, (*pieces, ((0, 0), shape)))  # the last one has what no other has
    whole = random_tensor(shape, torch.bfloat16, 3)
    assert of(whole, layout) == of(whole, Layout.whole())


@pytest.mark.parametrize("dtype", sorted(DTYPES.values(), key=str), ids=str)
def test_any_dtype_and_any_single_bit(dtype: torch.dtype) -> None:
    if dtype.itemsize not in (1, 2, 4, 8, 16):
        pytest.skip("no memory of its own")
    raw = torch.randint(0, 255, (3 * 5 * dtype.itemsize,), dtype=torch.uint8, generator=torch.Generator().manual_seed(5))
    seen = set()
    for bit in [None, *range(0, raw.numel() * 8, 7)]:
        changed = raw.clone()
        if bit is not None:
            changed[bit // 8] ^= 1 << bit % 8
        seen.add(digest(sums(changed.view(dtype).view(3, 5), (3, 5), owned(Layout.whole(), 0, (3, 5))), dtype, (3, 5)))
    assert len(seen) == 1 + len(range(0, raw.numel() * 8, 7))


def test_what_is_swapped_reshaped_or_of_another_dtype_differs() -> None:
    tensor = torch.arange(1, 13, dtype=torch.int16).reshape(3, 4)
    swapped, zeros = tensor.flatten()[[1, 0, *range(2, 12)]].reshape(3, 4), torch.zeros(3, 4, dtype=torch.int16)
    others = [tensor, swapped, tensor.reshape(4, 3), tensor.view(torch.float16), tensor.flatten(), tensor.t().contiguous(), zeros]
    others += [torch.zeros(shape) for shape in ((0,), (0, 1), (), (1,))]
    assert len({of(each, Layout.whole()) for each in others}) == len(others)


def test_it_stays_as_it_is() -> None:
    """Both sides may run different versions, and digests are kept."""
    assert (
        of(torch.arange(100_000, dtype=torch.float32).reshape(100, 1000), Layout.of((2, 2), [Shard(0), Shard(1)]))
        == "4f94e061514e8e669f897e5734be77f2"
    )
