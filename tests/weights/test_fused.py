"""Fused tensors: where their parts lie, whole, sharded as vLLM does, and as DTensors are."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.tensor import Replicate, Shard

from etha_ray.errors import LayoutError, NamesMismatchError, TensorMismatchError
from etha_ray.layout import Layout
from etha_ray.tensor_bus.tensors import Piece
from etha_ray.weights.fused import split
from etha_ray.weights.session import _cut
from etha_ray.weights.shares import Fused
from tests.weights.sides import Group, agreed, crossed, place

QKV = {"qkv.weight": ["q.weight", "k.weight", "v.weight"]}


def parts(heads: int, kv_heads: int, size: int = 2, width: int = 3) -> dict[str, torch.Tensor]:
    rows = {"q.weight": heads * size, "k.weight": kv_heads * size, "v.weight": kv_heads * size}
    numbers = torch.arange(float(sum(rows.values()) * width)).reshape(-1, width)
    return dict(zip(rows, (part.clone() for part in numbers.split(list(rows.values()))), strict=True))


def tensor_parallel(whole: dict[str, torch.Tensor], ranks: int, rank: int, size: int = 2) -> torch.Tensor:
    """What vLLM's QKVParallelLinear holds: its heads of q, of k and of v, where the latter are copied if there are too few."""
    found = []
    for part in whole.values():
        heads = part.split(size)
        if len(heads) >= ranks:
            count = len(heads) // ranks
            found += heads[rank * count : (rank + 1) * count]
        else:
            found.append(heads[rank // (ranks // len(heads))])
    return torch.cat(found)


@given(st.sampled_from([1, 2, 4, 8]), st.sampled_from([1, 2, 4, 8]), st.sampled_from([1, 2, 4, 8]), st.sampled_from([1, 2]))
@settings(deadline=None, max_examples=40)
def test_parts_fill_each_ranks_heads(heads: int, kv_heads: int, ranks: int, sources: int) -> None:
    heads = max(heads, kv_heads, ranks)
    whole = parts(heads, kv_heads)
    source = Group([{n: t.chunk(sources)[r].clone() for n, t in whole.items()} for r in range(sources)], placements=Shard(0))
    wanted = [tensor_parallel(whole, ranks, rank) for rank in range(ranks)]
    target = Group([{"qkv.weight": torch.full_like(each, -1)} for each in wanted], rename=QKV, placements=Shard(0))
    crossed(source, target)
    for rank in range(ranks):
        assert torch.equal(target.ranks[rank]["qkv.weight"], wanted[rank])


@given(st.sampled_from([2, 4]), st.sampled_from([1, 2, 4]))
@settings(deadline=None, max_examples=10)
def test_a_sender_may_be_the_one_that_fuses(kv_heads: int, ranks: int) -> None:
    whole = parts(4, kv_heads)
    source = Group([{"qkv.weight": tensor_parallel(whole, ranks, rank)} for rank in range(ranks)], rename=QKV, placements=Shard(0))
    target = Group([{name: torch.zeros_like(part) for name, part in whole.items()}])
    crossed(source, target)
    for name, part in whole.items():
        assert torch.equal(target.ranks[0][name], part)


def test_whole_and_on_two_mesh_dimensions() -> None:
    whole = parts(4, 2)
    target = Group([{"qkv.weight": torch.zeros(16, 3)} for _ in range(2)], rename=QKV)
    crossed(Group([whole]), target)
    assert all(torch.equal(held["qkv.weight"], torch.cat(list(whole.values()))) for held in target.ranks)
    grid = Group([{"qkv.weight": torch.zeros(8, 3)} for _ in range(4)], rename=QKV, placements=[Replicate(), Shard(0)], mesh=(2, 2))
    crossed(Group([whole]), grid)
    for rank, held in enumerate(grid.ranks):
        assert torch.equal(held["qkv.weight"], tensor_parallel(whole, 2, rank % 2))


def test_sharded_along_the_inputs() -> None:
    whole = parts(4, 2, width=4)
    target = Group([{"qkv.weight": torch.zeros(16, 2)} for _ in range(2)], rename=QKV, placements=Shard(1))
    crossed(Group([whole]), target)
    for rank, held in enumerate(target.ranks):
        assert torch.equal(held["qkv.weight"], torch.cat(list(whole.values())).chunk(2, 1)[rank])


def test_biases() -> None:
    whole = {name: part[:, 0].clone() for name, part in parts(4, 2).items()}
    target = Group([{"qkv.weight": torch.zeros(8)} for _ in range(2)], rename=QKV, placements=Shard(0))
    crossed(Group([whole]), target)
    assert torch.equal(target.ranks[1]["qkv.weight"], tensor_parallel(whole, 2, 1))


@given(st.lists(st.integers(1, 7), min_size=1, max_size=4), st.integers(1, 5))
@settings(deadline=None, max_examples=60)
def test_a_dtensor_is_cut_wherever_its_parts_begin(sizes: list[int], ranks: int) -> None:
    """Each rank's rows of the whole fused tensor, as torch.chunk gives them, are pieces of the parts."""
    names = tuple(f"p{index}" for index in range(len(sizes)))
    rows = torch.arange(float(sum(sizes) * 2)).reshape(-1, 2)
    layout = Layout((ranks,), ("S0",))
    fused = Fused(names, tuple(range(ranks)), layout, tuple(rows.shape), True, "float32")
    shares = split(fused, [(size, 2) for size in sizes], "receiver")
    for index in range(ranks):
        chunks = rows.chunk(ranks)
        wanted = chunks[index] if index < len(chunks) else rows[:0]
        local = torch.full_like(wanted, -1)
        for share, part in zip(shares, rows.split(sizes), strict=True):
            thing = _cut(local, share, index)
            if ranks > 1:
                assert isinstance(thing, Piece)
            place(thing, share.layout, index, part, give=False)
        assert torch.equal(local, wanted)


def test_a_strided_dtensor_has_no_boxes() -> None:
    fused = Fused(("a", "b"), (0, 1), Layout((2,), ("SS0/2",)), (8, 2), True, "float32")
    share = split(fused, [(4, 2), (4, 2)], "receiver")[0]
    with pytest.raises(LayoutError, match="'a' is a part of a fused tensor held as 2: SS0/2"):
        _cut(torch.zeros(4, 2), share, 0)


@pytest.mark.parametrize("local", [(15, 3), (16, 4), (10, 3)])
def test_parts_that_do_not_make_it_up(local: tuple[int, int]) -> None:
    target = Group([{"qkv.weight": torch.zeros(local)} for _ in range(2)], rename=QKV, placements=Shard(0))
    with pytest.raises(TensorMismatchError, match=r"the receiver fuses q\.weight \[8, 3\], k\.weight .* do not make it up"):
        agreed(Group([parts(4, 2)]), target)


def test_parts_that_the_other_side_lacks() -> None:
    whole = parts(2, 2)
    del whole["k.weight"]
    target = Group([{"qkv.weight": torch.zeros(12, 3)}], rename=QKV)
    with pytest.raises(NamesMismatchError, match=r"the receiver has 1 that the sender lacks: k\.weight"):
        agreed(Group([whole]), target)


def test_both_sides_fuse_the_same() -> None:
    whole = torch.cat(list(parts(4, 2).values()))
    target = Group([{"qkv.weight": torch.zeros(16, 3)}] * 2, rename=QKV)
    crossed(Group([{"qkv.weight": whole}], rename=QKV), target)
    assert torch.equal(target.ranks[0]["qkv.weight"], whole)
    # Rows of q, k and v by rank have other places on another number of ranks, and nobody says how large q, k and v are.
    source = Group([{"qkv.weight": torch.zeros(8, 3)}] * 2, rename=QKV, placements=Shard(0))
    with pytest.raises(TensorMismatchError, match="nobody says how large"):
        agreed(source, target)


def test_a_subset_of_the_parts() -> None:
    whole = parts(2, 1)
    target = Group([{"qkv.weight": torch.full((8, 3), -1.0)}], rename=QKV, only=("k.*",))
    assert [crossing.target.names for crossing in crossed(Group([whole]), target).crossings] == [("k.weight",)]
    filled = target.ranks[0]["qkv.weight"]
    assert torch.equal(filled[4:6], whole["k.weight"])
    assert (filled[:4] == -1).all()
    assert (filled[6:] == -1).all()
