"""The two readings of `_StridedShard`: strides, as `distribute_tensor` cuts, and an order, as FSDP2 and `full_tensor` have it."""

from __future__ import annotations

import math

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor

from etha_ray.errors import LayoutError
from etha_ray.layout import Layout
from tests.layout.dtensor import as_torch, combined, cut, playing


@pytest.mark.parametrize("rows", [12, 7, 13, 5, 1])
@pytest.mark.parametrize("mesh_shape", [(2, 2), (3, 2), (2, 3), (5, 2)])
@pytest.mark.parametrize("dim", [0, 1])
def test_what_fsdp2_holds_of_a_tensor_parallel_parameter(mesh_shape: tuple[int, int], rows: int, dim: int) -> None:
    whole = torch.arange(rows * 6).reshape((rows, 6) if dim == 0 else (6, rows)).float()
    held: dict[int, torch.Tensor] = {}
    layouts = set()
    for rank in range(math.prod(mesh_shape)):
        with playing(rank, math.prod(mesh_shape)):
            mesh = init_device_mesh("cpu", mesh_shape, mesh_dim_names=("dp", "tp"))
            module = torch.nn.Linear(whole.shape[1], whole.shape[0], bias=False)
            module.weight = torch.nn.Parameter(distribute_tensor(whole, mesh["tp"], [Shard(dim)], src_data_rank=None))
            fully_shard(module, mesh=mesh["dp"])
            held[rank] = module.weight.to_local().detach()  # type: ignore[attr-defined]
            layouts.add(Layout.of(mesh_shape, module.weight.placements))  # type: ignore[attr-defined]
    (layout,) = layouts
    layout, shape = layout.fit({rank: tuple(tensor.shape) for rank, tensor in held.items()})
    assert shape == tuple(whole.shape)
    assert layout == layout.fit({rank: tuple(tensor.shape) for rank, tensor in held.items()}, whole.shape)[0]
    for rank, tensor in held.items():
        region = layout.region(rank, shape)
        assert region.numel == tensor.numel()
        assert region.is_empty or torch.equal(cut(whole, region), tensor)


def test_readings_of_a_strided_shard_that_is_uneven() -> None:
    layout = Layout.decode("3x2: SS0/2,S0")
    strided, ordered = (2, 1, 2, 1, 1, 0), (2, 1, 2, 1, 0, 1)
    assert layout.fit({index: (size,) for index, size in enumerate(strided)}) == (layout, (7,))
    assert layout.fit({index: (size,) for index, size in enumerate(ordered)}) == (Layout.decode("3x2: SS0/2,S0 by order"), (7,))
    assert layout.fit(dict.fromkeys(range(6), (2,))) == (layout, (12,))
    with pytest.raises(LayoutError, match=r"position 0 .* holds shape \(3,\)"):
        layout.fit(dict(enumerate([(3,), (0,), (2,), (1,), (0,), (1,)])))


@pytest.mark.parametrize(("text", "rows"), [("2x2x3: SS0/6,S0,S0", 9), ("1x3x2x2: SS0/2,SS0/4,S0,S0", 34)])
def test_where_shapes_do_not_tell_it_is_what_full_tensor_reads(text: str, rows: int) -> None:
    layout, whole = Layout.decode(text), torch.arange(rows)
    ordered = Layout.decode(f"{text} by order")
    strided, by_order = ([one.region(index, (rows,)) for index in range(one.ranks)] for one in (layout, ordered))
    shapes = {index: region.shape for index, region in enumerate(strided)}
    assert shapes == {index: region.shape for index, region in enumerate(by_order)}
    assert strided != by_order
    assert layout.fit(shapes) == layout.fit(shapes, (rows,)) == (ordered, (rows,))
    with playing(0, layout.ranks):
        placements = as_torch(layout)
        assert torch.equal(combined(layout, placements, (rows,), lambda index: cut(whole, by_order[index])), whole)
        assert not torch.equal(combined(layout, placements, (rows,), lambda index: cut(whole, strided[index])), whole)


@pytest.mark.parametrize("mesh_shape", [(2, 2, 3), (3, 2, 2), (2, 3, 2)])
@pytest.mark.parametrize("rows", [9, 15, 20, 24, 27, 34])
def test_what_fsdp2_holds_of_a_parameter_that_two_mesh_dimensions_cut_before(mesh_shape: tuple[int, ...], rows: int) -> None:
    whole = torch.arange(rows * 2).reshape(rows, 2).float()
    held, layouts = {}, set()
    for rank in range(math.prod(mesh_shape)):
        with playing(rank, math.prod(mesh_shape)):
            mesh = init_device_mesh("cpu", mesh_shape, mesh_dim_names=("dp", "ep", "tp"))
            module = torch.nn.Linear(2, rows, bias=False)
            cut_twice = distribute_tensor(whole, mesh["ep", "tp"], [Shard(0), Shard(0)], src_data_rank=None)
            module.weight = torch.nn.Parameter(cut_twice)
            fully_shard(module, mesh=mesh["dp"])
            held[rank] = module.weight.to_local().detach()  # type: ignore[attr-defined]
            layouts.add(Layout.of(mesh_shape, module.weight.placements))  # type: ignore[attr-defined]
    (layout,) = layouts
    layout, shape = layout.fit({rank: tuple(tensor.shape) for rank, tensor in held.items()})
    assert shape == (rows, 2)
    for rank, tensor in held.items():
        region = layout.region(rank, shape)
        assert region.numel == tensor.numel()
        assert region.is_empty or torch.equal(cut(whole, region), tensor)


def test_a_global_shape_that_is_known_needs_no_other_ranks() -> None:
    layout = Layout.decode("3x2: SS0/2,S0")
    assert layout.fit({4: (1,)}, (7,)) == (layout, (7,))
    assert layout.fit({4: (0,)}, (7,)) == (Layout.decode("3x2: SS0/2,S0 by order"), (7,))
    assert layout.fit({}, [7]) == (layout, (7,))
    with pytest.raises(LayoutError, match=r"position 4 .* holds shape \(2,\).*gives it \(1,\)"):
        layout.fit({4: (2,)}, (7,))
    with pytest.raises(LayoutError, match="position 4"):
        layout.fit({4: (0, 3)}, (7,))


def test_split_factors_that_spell_no_order() -> None:
    layout = Layout((2, 3), ("SS0/2", "SS0/3"), by_order=True)
    with pytest.raises(LayoutError, match="spell no order"):
        layout.region(0, (12,))
    with pytest.raises(LayoutError, match="position"):
        Layout((2, 3), ("SS0/2", "SS0/3")).fit(dict.fromkeys(range(6), (5,)))


def test_shards_without_elements_may_have_any_shape() -> None:
    shapes = {0: (2, 2), 1: (2, 2), 2: (0, 0), 3: (1, 2), 4: (1, 2), 5: (0, 0)}  # as FSDP2 keeps them
    assert Layout.decode("2x3: S0,S1").global_shape(shapes) == (3, 4)
    with pytest.raises(LayoutError, match="position 2"):
        Layout.decode("2x3: S0,S1").global_shape({**shapes, 2: (1, 1)})
