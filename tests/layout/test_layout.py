"""What each rank holds. The truth is DTensor itself, on torch's fake process group: one process plays every rank."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.distributed.tensor.placement_types import _MaskPartial, _StridedShard

from etha_ray.errors import LayoutError
from etha_ray.layout import Layout, MeshSpec, Reduction, Region, placement_tokens
from tests.layout.dtensor import as_torch, cut, playing

LAYOUTS_AND_SHAPES = [
    ("1: S0", (5,)),
    ("4: S0", (8, 3)),
    ("4: S0", (7, 3)),  # uneven
    ("4: S0", (5,)),  # ceil: 2, 2, 1, 0
    ("8: S0", (3, 2)),  # more ranks than rows
    ("8: S0", (0, 2)),
    ("4: S1", (3, 0)),
    ("4: S0", (1, 1)),
    ("3: S-1", (4, 13)),
    ("2x3: S-2,S-1", (5, 7)),
    ("2x2: R,R", ()),
    ("4x2: S0,R", (9, 2)),
    ("2x4: R,S1", (2, 11)),
    ("2x2: S0,S0", (13,)),  # one tensor dimension cut twice: left to right
    ("2x4: S0,S0", (11, 3)),
    ("4x2: S1,S1", (2, 5)),  # the inner cut of an empty piece
    ("3x2: S0,S0", (7,)),
    ("2x2x2: S0,S1,S0", (7, 5)),
    ("2x2x2: S0,R,S0", (17, 2)),
    ("2x3x2: S2,S0,S2", (5, 2, 31)),
    ("1x4x1: S0,S0,S0", (6,)),
    ("2x2: SS0/2,S0", (8, 8)),  # what FSDP2 makes of a tensor that tensor parallelism has cut
    ("2x3: SS0/3,S0", (13, 2)),
    ("4: SS0/2", (9,)),
    ("3: SS-1/50", (2, 7)),  # more chunks than indices
    ("2x2x2: S0,SS0/2,SS0/3", (37,)),
    ("2x3: SS0/2,S0", (1,)),
    ("2x2: P(sum),S0", (5,)),
]


@pytest.mark.parametrize(("text", "shape"), LAYOUTS_AND_SHAPES)
def test_region_is_what_dtensor_holds(text: str, shape: tuple[int, ...]) -> None:
    layout = Layout.decode(text)
    whole = torch.arange(math.prod(shape)).reshape(shape)
    for rank in range(layout.ranks):
        region = layout.region(rank, shape)
        with playing(rank, layout.ranks):
            mesh = init_device_mesh("cpu", layout.mesh_shape)
            # Contributions are held like replicas; distribute_tensor would divide a sum among them.
            placements = [Replicate() if isinstance(p, Partial) else p for p in as_torch(layout.resolve(len(shape)))]
            held = distribute_tensor(whole, mesh, placements, src_data_rank=None).to_local()
            local_shape, offset = compute_local_shape_and_global_offset(whole.shape, mesh, placements)
        assert region.shape == tuple(held.shape) == local_shape
        assert torch.equal(cut(whole, region), held)
        if not region.is_empty:  # where nothing is held, an offset means nothing
            assert tuple(held[0][0] if held else 0 for held in region.intervals) == offset


@pytest.mark.parametrize(("text", "shape"), LAYOUTS_AND_SHAPES)
def test_boxes_lead_from_local_to_global(text: str, shape: tuple[int, ...]) -> None:
    layout = Layout.decode(text)
    whole = torch.arange(math.prod(shape)).reshape(shape)
    for rank in range(layout.ranks):
        region = layout.region(rank, shape)
        built = torch.full(region.shape, -1)
        for global_start, local_start, size in region.boxes():
            here = tuple(slice(at, at + n) for at, n in zip(local_start, size, strict=True))
            there = tuple(slice(at, at + n) for at, n in zip(global_start, size, strict=True))
            built[here] = whole[there]
        assert torch.equal(built, cut(whole, region))
        assert region.numel == built.numel()


def test_region_of_several_intervals() -> None:
    region = Region((((0, 2), (6, 9)), ((4, 5),)))
    assert region.shape == (5, 1)
    assert list(region.boxes()) == [((0, 4), (0, 0), (2, 1)), ((6, 4), (2, 0), (3, 1))]
    assert region.span(0, 1, 3) == ((1, 2), (6, 8))
    assert region.span(1, 0, 1) == ((4, 5),)


def test_region_of_a_tensor_without_dimensions() -> None:
    region = Layout.decode("3: R").region(2, ())
    assert (region.shape, region.numel, region.is_empty) == ((), 1, False)
    assert list(region.boxes()) == [((), (), ())]


def test_empty_region_keeps_its_other_dimensions() -> None:
    region = Layout.decode("4: S0").region(3, (5, 6))
    assert (region.shape, region.numel, region.is_empty, list(region.boxes())) == ((0, 6), 0, True, [])


def test_region_refuses_a_position_outside_the_mesh() -> None:
    with pytest.raises(LayoutError, match=r"mesh \(2, 2\) has no position 4"):
        Layout.decode("2x2: S0,R").region(4, (8,))


@pytest.mark.parametrize(("text", "shape"), [("2: S1", (4,)), ("2: S-2", (4,)), ("2: S0", ())])
def test_shard_of_a_missing_dimension_is_refused(text: str, shape: tuple[int, ...]) -> None:
    layout = Layout.decode(text)
    with pytest.raises(LayoutError) as caught:
        layout.region(0, shape)
    assert str(shape) in str(caught.value)
    assert layout.placements[0] in str(caught.value)
    with pytest.raises(LayoutError):
        layout.resolve(len(shape))


def test_resolve_counts_negative_dims_from_the_end() -> None:
    layout = Layout.decode("2x2x2: S-1,R,S-3")
    assert layout.resolve(3) == Layout.decode("2x2x2: S2,R,S0")
    assert layout.resolve(4) == Layout.decode("2x2x2: S3,R,S1")
    assert Layout.decode("2x2: SS-2/2,P(max)").resolve(3) == Layout.decode("2x2: SS1/2,P(max)")
    assert layout.placements == ("S-1", "R", "S-3")


@pytest.mark.parametrize("text", ["4x2: S0,R", "8: S-1", "1: R", "2x2x2: S0,S0,S1", ": ", "2x4: SS-1/4,P(avg)", "3x2: SS0/2,S0 by order"])
def test_encode_and_decode(text: str) -> None:
    layout = Layout.decode(text)
    assert layout.encode() == str(layout) == text
    assert Layout.decode(layout.encode()) == layout
    assert len({layout, Layout.decode(text)}) == 1


def test_decode_ignores_blanks() -> None:
    assert Layout.decode(" 4 x 2 :S0 , R ") == Layout.decode("4x2: S0,R")


@pytest.mark.parametrize(
    "text", ["4x2", "4xtwo: S0,R", "4x2: S0", "4x2: S0,Partial", "x: S0", "0: R", "4: S", "4: s0", "-4: R", "4: SS0", "4: SS0/0", "4: P"]
)
def test_decode_refuses_what_is_no_layout(text: str) -> None:
    with pytest.raises(LayoutError):
        Layout.decode(text)


def test_whole_is_a_row_of_replicas() -> None:
    assert Layout.whole() == Layout.decode("1: R")
    layout = Layout.whole(3)
    assert layout.ranks == 3
    assert {layout.region(index, (4, 2)).shape for index in range(3)} == {(4, 2)}


def test_mesh_without_dimensions_is_one_member() -> None:
    assert (MeshSpec((), ()).size, MeshSpec((), ()).index) == (1, 0)
    assert Layout.of((), ()).region(0, (3,)).shape == (3,)


def test_placement_count_must_fit_the_mesh() -> None:
    with pytest.raises(LayoutError, match=r"1 placements \[S0\] do not fit the mesh \(4, 2\) of 2 dimensions"):
        Layout.of((4, 2), [Shard(0)])


@pytest.mark.parametrize("text", ["2x3x2: S0,R,S1", "4: S0", "4: R", "2x2: R,R", "2x3: R,SS0/2"])
def test_replicas_are_all_that_hold_the_same(text: str) -> None:
    layout = Layout.decode(text)
    shape = (24, 24)
    for index in range(layout.ranks):
        same = [other for other in range(layout.ranks) if layout.region(other, shape) == layout.region(index, shape)]
        assert list(layout.replicas(index)) == same


def test_contributions_are_no_replicas() -> None:
    assert Layout.decode("2x3: P(sum),R").replicas(4) == (3, 4, 5)


def test_placement_tokens() -> None:
    placements = [Shard(0), Replicate(), Shard(-1), _StridedShard(1, split_factor=4), _StridedShard(-1), Partial("avg"), Partial()]
    tokens = ("S0", "R", "S-1", "SS1/4", "SS-1/1", "P(avg)", "P(sum)")
    assert placement_tokens(placements) == placement_tokens(tokens) == tokens
    assert placement_tokens(["S00", "SS-01/02"]) == ("S0", "SS-1/2")
    assert placement_tokens(()) == ()


@pytest.mark.parametrize(
    ("placement", "named"),
    [
        (_MaskPartial("sum"), "_MaskPartial"),
        (Partial("bxor"), r"Partial\(bxor\)"),
        (_StridedShard(0, split_factor=0), "SS0/0"),
        ("Shard(0)", r"Shard\(0\)"),
        ("P", "P"),
        ("P(bor)", r"P\(bor\)"),
        ("SS0", "SS0"),
        ("SS0/-2", "SS0/-2"),
        (0, "0"),
        (None, "None"),
    ],
)
def test_other_placements_are_refused_by_name(placement: object, named: str) -> None:
    with pytest.raises(LayoutError, match=named):
        placement_tokens([placement])


def test_a_refusal_says_what_is_supported() -> None:
    with pytest.raises(LayoutError) as caught:
        placement_tokens(["Partial"])
    for kind in ("Shard(dim)", "_StridedShard(dim, split_factor=n)", "Replicate()", "Partial(op)", "product"):
        assert kind in str(caught.value)


@pytest.mark.parametrize(
    ("text", "reduction"),
    [
        ("2x4: S0,R", None),
        ("2x4: S0,P(sum)", Reduction((1,), "sum", 1, 4)),
        ("2x4x3: P(avg),S0,P(avg)", Reduction((0, 2), "sum", 6, 6)),
        ("2x4x3: P(sum),S0,P(avg)", Reduction((0, 2), "sum", 3, 6)),
        ("2x4: P(max),P(max)", Reduction((0, 1), "max", 1, 8)),
        ("3: P(product)", Reduction((0,), "product", 1, 3)),
        ("1: P(min)", Reduction((0,), "min", 1, 1)),
    ],
)
def test_partial(text: str, reduction: Reduction | None) -> None:
    layout = Layout.decode(text)
    assert layout.partial == reduction
    assert layout.resolve(1).partial == reduction


@pytest.mark.parametrize("ops", list(itertools.combinations(("sum", "avg", "max", "min", "product"), 2)), ids="+".join)
def test_mixed_partials_are_refused_where_dtensor_refuses_them(ops: tuple[str, str]) -> None:
    with playing(0, 4):
        mesh = init_device_mesh("cpu", (2, 2))
        try:
            distribute_tensor(torch.ones(4), mesh, [Partial(op) for op in ops])
            taken = True
        except ValueError as error:
            taken = "Mixed Partial" not in str(error)
    if taken:
        assert Layout.of((2, 2), [Partial(op) for op in ops]).partial is not None
    else:
        with pytest.raises(LayoutError, match=rf"mix Partial\({ops[0]}\) and Partial\({ops[1]}\)"):
            Layout.of((2, 2), [Partial(op) for op in ops])


@pytest.mark.parametrize("placements", [Shard(0), "S0", None])
def test_placements_must_be_a_list(placements: object) -> None:
    with pytest.raises(LayoutError, match="one placement per mesh dimension"):
        placement_tokens(placements)  # type: ignore[arg-type]


def test_meshspec_takes_lists_and_stores_tuples() -> None:
    spec = MeshSpec([4, 2], [3, 1], ["dp", "tp"])  # type: ignore[arg-type]
    assert (spec.shape, spec.coordinate, spec.dim_names) == ((4, 2), (3, 1), ("dp", "tp"))
    assert (spec.ndim, spec.size, spec.index) == (2, 8, 7)
    assert spec == MeshSpec((4, 2), (3, 1), ("dp", "tp"))
    assert MeshSpec(4, 2) == MeshSpec((4,), (2,))  # type: ignore[arg-type]


def test_meshspec_index_is_row_major() -> None:
    shape = (2, 3, 4)
    places = itertools.product(*map(range, shape))
    assert [MeshSpec(shape, place).index for place in places] == list(range(24))
    layout = Layout.of(shape, ["R"] * 3)
    assert all(MeshSpec(shape, layout.coordinate(index)).index == index for index in range(24))


@pytest.mark.parametrize(
    ("shape", "coordinate", "names"),
    [
        ((0, 2), (0, 0), None),
        ((-1,), (0,), None),
        ((2, 2), (0,), None),
        ((2, 2), (0, 2), None),
        ((2,), (-1,), None),
        ((2.0,), (0,), None),
        ("4", (0,), None),
        (None, (0,), None),
        ((2,), (0,), ("dp", "tp")),
        ((2, 2), (0, 0), "dp"),
    ],
)
def test_meshspec_refuses_what_cannot_be(shape: object, coordinate: object, names: object) -> None:
    with pytest.raises(LayoutError):
        MeshSpec(shape, coordinate, names)  # type: ignore[arg-type]


def test_meshspec_of_a_device_mesh() -> None:
    for rank in range(6):
        with playing(rank, 6):
            mesh = init_device_mesh("cpu", (2, 3), mesh_dim_names=("dp", "tp"))
            assert MeshSpec.of(mesh) == MeshSpec((2, 3), (rank // 3, rank % 3), ("dp", "tp"))
    spec = MeshSpec((2,), (1,))
    assert MeshSpec.of(spec) is spec


def test_meshspec_of_a_mesh_whose_ranks_are_in_another_order() -> None:
    with playing(1, 4):
        assert MeshSpec.of(DeviceMesh("cpu", [[3, 2], [1, 0]])) == MeshSpec((2, 2), (1, 0))


def test_meshspec_refuses_a_mesh_without_this_process() -> None:
    with playing(3, 4):
        mesh = DeviceMesh("cpu", [0, 1])
        with pytest.raises(LayoutError, match="not part of the device mesh"):
            MeshSpec.of(mesh)


def test_meshspec_refuses_what_is_no_mesh() -> None:
    with pytest.raises(LayoutError, match="tuple"):
        MeshSpec.of((2, 2))


@pytest.mark.parametrize(("text", "shape"), LAYOUTS_AND_SHAPES)
def test_global_shape_from_the_local_shapes(text: str, shape: tuple[int, ...]) -> None:
    layout = Layout.decode(text)
    assert layout.global_shape({index: layout.region(index, shape).shape for index in range(layout.ranks)}) == shape


def test_global_shape_names_the_rank_that_does_not_fit() -> None:
    layout = Layout.decode("2x2: S0,R")
    shapes = {0: (4, 3), 1: (4, 3), 2: (4, 3), 3: (3, 3)}
    with pytest.raises(LayoutError) as caught:
        layout.global_shape(shapes)
    for part in ("position 3", "(1, 1)", "(3, 3)", "(4, 3)", "2x2: S0,R"):
        assert part in str(caught.value)


def test_global_shape_refuses_a_split_that_is_not_dtensors() -> None:
    with pytest.raises(LayoutError, match=r"position 0 .* holds shape \(2,\).*gives it \(3,\)"):
        Layout.decode("2: S0").global_shape({0: (2,), 1: (3,)})


def test_global_shape_needs_every_rank() -> None:
    with pytest.raises(LayoutError, match="positions 0 to 2"):
        Layout.decode("3: S0").global_shape({0: (2,), 2: (2,)})
    with pytest.raises(LayoutError, match="positions 0 to 0"):
        Layout.whole().global_shape({0: (2,), 1: (2,)})


def test_global_shape_refuses_tensors_of_different_rank() -> None:
    with pytest.raises(LayoutError, match="position 1"):
        Layout.decode("2: R").global_shape({0: (2, 2), 1: (4,)})


def test_global_shape_refuses_a_missing_dimension() -> None:
    with pytest.raises(LayoutError, match="dimension 1"):
        Layout.decode("2: S1").global_shape({0: (2,), 1: (2,)})
