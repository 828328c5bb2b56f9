"""Any layout to any layout, through real agents and workers in processes of their own."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import _StridedShard

from etha_ray.errors import LayoutError, TensorMismatchError
from tests.plan.test_mesh_pairs import PAIRS
from tests.tensor_bus import cluster as acts
from tests.tensor_bus.cluster import LONG, Worker, process_cluster
from tests.tensor_bus.groups import Group, Groups, contributions, finish


@pytest.fixture(scope="module")
def groups() -> Iterator[Groups]:
    """Four agents, of which few tests use all, nor in their order: agent ranks have gaps."""
    with process_cluster(4) as cluster:
        yield Groups(cluster)


def numbers(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Numbers that every dtype keeps."""
    count = int(torch.tensor(shape).prod()) if shape else 1
    return (torch.arange(1, 1 + count) % 11 / 2).reshape(shape).to(dtype)


WHOLES = [numbers(7, 5), numbers(2, 6), numbers(13, 4, 3, dtype=torch.bfloat16), torch.arange(60).reshape(12, 5)]

STRIDED = _StridedShard(0, split_factor=2)
LAYOUTS = {
    "one process without a mesh": Group([2]),
    "replicate": Group([3, 1], (2,), [Replicate()]),
    "shard": Group([0, 2, 1], (3,), [Shard(0)]),
    "shard the last": Group([3, 0], (2,), [Shard(-1)]),
    "two dims": Group([1, 3, 0, 0], (2, 2), [Shard(0), Shard(1)]),
    "nested": Group([2, 1, 2, 1], (2, 2), [Shard(0), Shard(0)]),
    "shard and replicate": Group([0, 3, 1, 2], (2, 2), [Replicate(), Shard(1)]),
    "fsdp of tp": Group([1, 0, 3, 3, 2, 0], (3, 2), [STRIDED, Shard(0)]),
    "three dims": Group([0, 1, 2, 3, 3, 2, 1, 0], (2, 2, 2), [Replicate(), Shard(1), Shard(0)]),
}


def every_pair() -> Iterator[Any]:
    """All of them; those are not slow that have each layout on both sides of three."""
    for (first, source), (second, target) in itertools.product(enumerate(LAYOUTS), repeat=2):
        quick = (second - first) % len(LAYOUTS) in (0, 1, 4)
        yield pytest.param(source, target, marks=[] if quick else [pytest.mark.slow])


@pytest.mark.parametrize(("source", "target"), every_pair())
def test_every_placement_to_every_other(groups: Groups, source: str, target: str) -> None:
    groups.check(LAYOUTS[source], LAYOUTS[target], WHOLES)


@pytest.mark.parametrize(
    ("mine", "theirs"),
    [([0, 1], [0, 1]), ([0, 1], [1, 0]), ([3, 1, 2], [2, 0]), ([2, 2], [2, 2]), ([3, 0], [1, 3])],
    ids=["on the same agents", "crossed", "on some of the same", "all on one agent", "with gaps"],
)
def test_agents_of_both_sides(groups: Groups, mine: list[int], theirs: list[int]) -> None:
    groups.check(Group(mine, (len(mine),), [Shard(0)]), Group(theirs, (len(theirs),), [Shard(1)]), WHOLES)
    groups.check(Group(mine, (len(mine),), [Replicate()]), Group(theirs, (len(theirs),), [Replicate()]), WHOLES)


@pytest.mark.parametrize(("source_mesh", "target_mesh"), PAIRS, ids=str)
def test_pairs_of_four_dimensional_meshes(groups: Groups, source_mesh: tuple[int, ...], target_mesh: tuple[int, ...]) -> None:
    """As in tests/plan/test_mesh_pairs.py: 8 workers on each side."""
    strided = _StridedShard(0, split_factor=target_mesh[3])
    target = Group([index % 4 for index in range(8)], target_mesh, [Replicate(), Replicate(), strided, Shard(0)])
    for second in (Shard(0), Replicate()):
        source = Group([3 - index % 4 for index in range(8)], source_mesh, [Replicate(), second, Replicate(), Shard(1)])
        groups.check(source, target, [WHOLES[0], numbers(64, 16)])
    partial = Group(source.agents, source_mesh, [Replicate(), Partial("sum"), Replicate(), Shard(1)])
    check_partial(groups, partial, target, "sum", torch.float32)


# --- Partial


@pytest.mark.parametrize("op", ["sum", "avg", "max", "min", "product"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_partial_is_combined(groups: Groups, op: Any, dtype: torch.dtype) -> None:
    source = Group([0, 3, 1, 2], (2, 2), [Partial(op), Shard(0)])
    check_partial(groups, source, Group([1, 2, 3], (3,), [Shard(1)]), op, dtype)
    check_partial(groups, Group([3, 0, 1], (3,), [Partial(op)]), Group([2]), op, dtype)


def test_partial_with_replicas(groups: Groups) -> None:
    """Each contribution counts once, whoever of its holders gives it."""
    source = Group([0, 1, 2, 3, 3, 2, 1, 0], (2, 2, 2), [Replicate(), Partial(), Shard(1)])
    check_partial(groups, source, Group([3, 1], (2,), [Replicate()]), "sum", torch.bfloat16)


def test_partial_of_integers_and_bools(groups: Groups) -> None:
    source, target = Group([0, 1], (2,), [Partial()]), Group([2, 3], (2,), [Shard(0)])
    given = [[torch.tensor([100, 27, 0]).to(torch.int8), torch.tensor([True, False, False])] for _ in range(2)]
    held = groups.send(source, target, given[0], given=given)
    assert torch.cat([tensors[0] for tensors in held]).tolist() == [-56, 54, 0]  # wraps around, as all_reduce does
    assert torch.cat([tensors[1] for tensors in held]).tolist() == [True, False, False]


def test_partial_is_combined_in_its_own_dtype_then_cast(groups: Groups) -> None:
    given = [[torch.tensor([256.0]).bfloat16()], [torch.tensor([1.0]).bfloat16()]]
    held = groups.send(Group([0, 1], (2,), [Partial()]), Group([2], dtype=torch.float32), given[0], given=given)
    assert held[0][0].tolist() == [256.0]


def check_partial(groups: Groups, source: Group, target: Group, op: str, dtype: torch.dtype) -> None:
    wholes = [numbers(7, 5, dtype=dtype), numbers(260, 130, dtype=dtype)]
    each = [contributions(whole, source, op, seed) for seed, whole in enumerate(wholes)]
    given = [[parts[index] for parts, _ in each] for index in range(len(source.agents))]
    held = groups.send(source, target, wholes, given=given)
    for index, tensors in enumerate(held):
        for position, (tensor, (_, combined)) in enumerate(zip(tensors, each, strict=True)):
            assert torch.equal(tensor, target.part(combined, position, index)), (op, dtype, position, index)


def test_both_sides_partial(groups: Groups) -> None:
    with pytest.raises(LayoutError, match=r"tensor 0: .*'a' to 'b': target layout 2: P\(sum\) has a Partial.*Use Replicate"):
        groups.send(Group([0, 1], (2,), [Partial()]), Group([2, 3], (2,), [Partial()]), WHOLES)


# --- dtypes

FLOATS = [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2]
FLOATS += [torch.float8_e4m3fnuz, torch.float8_e5m2fnuz]


@pytest.mark.parametrize("mine", FLOATS, ids=str)
def test_floats_are_cast(groups: Groups, mine: torch.dtype) -> None:
    for theirs in FLOATS:
        source, target = Group([0, 1], (2,), [Shard(0)], dtype=mine), Group([2, 0, 3], (3,), [Shard(1)], dtype=theirs)
        groups.check(source, target, [numbers(7, 5), numbers(3, 4, 2)])


@pytest.mark.parametrize(
    ("mine", "theirs"),
    [
        (torch.int32, torch.int64),
        (torch.uint8, torch.int16),
        (torch.uint32, torch.int64),
        (torch.bool, torch.int8),
        (torch.bool, torch.float16),
        (torch.int64, torch.float32),
        (torch.uint16, torch.complex64),
        (torch.float32, torch.complex128),
    ],
    ids=str,
)
def test_other_kinds_are_cast_where_nothing_is_lost(groups: Groups, mine: torch.dtype, theirs: torch.dtype) -> None:
    held = groups.send(Group([0], dtype=mine), Group([1, 2], (2,), [Shard(0)], dtype=theirs), [numbers(7, 5)])
    assert torch.equal(torch.cat([tensors[0] for tensors in held]), numbers(7, 5).to(mine).to(theirs))


@pytest.mark.parametrize(
    ("mine", "theirs"),
    [(torch.float32, torch.int32), (torch.int64, torch.int32), (torch.complex64, torch.float32), (torch.float16, torch.bool)],
    ids=str,
)
def test_lossy_casts_that_are_asked_for(groups: Groups, mine: torch.dtype, theirs: torch.dtype) -> None:
    target = Group([1, 2], (2,), [Shard(0)], dtype=theirs, allow_lossy=True)
    held = groups.send(Group([0], dtype=mine), target, [numbers(7, 5)])
    sent = numbers(7, 5).to(mine)
    wanted = (sent.real if sent.is_complex() else sent).to(theirs)
    assert torch.equal(torch.cat([tensors[0] for tensors in held]), wanted)


def test_the_narrower_dtype_is_what_counts(groups: Groups) -> None:
    batch = "bytes"
    sides = groups.workers(Group([0]), Group([1]))
    for (worker,), name, other in zip(sides, "ab", "ba", strict=True):
        worker.start(acts.join_pair, batch, name, other, 1, None, None)
    finish(sides)
    for (worker,), dtype in zip(sides, (torch.float32, torch.bfloat16), strict=True):
        worker.start(acts.register, batch, [(numbers(10, dtype=dtype), batch)])
    finish(sides)
    for givers, takers in (sides, sides[::-1]):
        givers[0].start(acts.transfer, batch, "send")
        takers[0].start(acts.transfer, batch, "recv")
        assert [report.bytes for (report,) in finish([givers, takers])] == [20, 20]


@pytest.mark.parametrize("dtypes", [(torch.float32, torch.bits8), (torch.float4_e2m1fn_x2, torch.uint8)], ids=str)
def test_dtypes_that_cannot_be_cast_either_way(groups: Groups, dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    sides = groups.workers(Group([0]), Group([1]))
    batch = f"no way {dtypes}"
    for (worker,), name, other in zip(sides, "ab", "ba", strict=True):
        worker.start(acts.join_pair, batch, name, other, 1, None, None)
    finish(sides)
    for (worker,), dtype in zip(sides, dtypes, strict=True):
        worker.start(register_empty, batch, dtype)
    for (worker,) in sides:
        with pytest.raises(TensorMismatchError, match=r"tensor 0: .*neither dtype can be cast.*register the same dtype"):
            worker.result()


def register_empty(state: dict[str, Any], batch: str, dtype: torch.dtype) -> None:
    state["client"].register_tensors(batch, [(torch.empty(4, dtype=dtype), batch)], timeout=LONG)


# --- explicit pieces


def test_ragged_experts(groups: Groups) -> None:
    """Ten experts, dealt out unevenly; one worker has none. The other side has a third of each."""
    experts, bias = numbers(10, 8, 6), numbers(10, 6)
    counts = [3, 0, 5, 2]
    starts = list(itertools.accumulate(counts, initial=0))
    boxes = [
        [((start, 0, 0), (count, 8, 6)) if count else None for start, count in zip(starts, counts, strict=False)],
        [((start, 0), (count, 6)) if count else None for start, count in zip(starts, counts, strict=False)],
    ]
    source = Group([0, 3, 2, 1], (4,), [Shard(0)], boxes=boxes)
    target = Group([1, 2, 3], (3,), [Shard(1)])
    groups.check(source, target, [experts, bias])
    groups.check(target, source, [experts, bias])
    groups.check(source, Group([2]), [experts, bias])


def test_packed_qkv(groups: Groups) -> None:
    """The source packs q, k and v of all heads; a target worker has one tensor for its heads of q, and one for its k and v."""
    packed = numbers(24, 5)  # 12 rows of q, 6 of k, 6 of v
    rows = [((0, 6), (12, 3), (18, 3)), ((6, 6), (15, 3), (21, 3))]
    boxes = [[((rows[rank][part][0], 0), (rows[rank][part][1], 5)) for rank in range(2)] for part in range(3)]
    source = Group([0, 1], (2,), [Shard(1)])
    groups.check(source, Group([2, 3], (2,), [Replicate()], boxes=boxes), [packed] * 3)


def test_pieces_on_both_sides_and_replicas_of_them(groups: Groups) -> None:
    whole = numbers(9, 8)
    halves = [((0, 0), (4, 8)), ((4, 0), (5, 8)), ((0, 0), (4, 8)), ((4, 0), (5, 8))]
    over = [((0, 0), (9, 5)), ((2, 3), (6, 5)), None]  # what receives may overlap
    source = Group([0, 1, 2, 3], (2, 2), [Replicate(), Shard(0)], boxes=[halves])
    groups.check(source, Group([3, 2, 0], (3,), [Shard(0)], boxes=[over]), [whole])


def test_pieces_without_meshes(groups: Groups) -> None:
    thirds = [((0,), (3,)), ((3,), (3,)), ((6,), (1,))]
    other = [((5,), (2,)), ((0,), (4,)), ((4,), (1,))]
    # Without a mesh workers are in the order of their agents.
    groups.check(Group([0, 1, 3], boxes=[thirds]), Group([1, 2, 3], boxes=[other]), [numbers(7)])


def test_views_into_fused_tensors(groups: Groups) -> None:
    """q, k and v, and gate and up, come apart; they are received into one fused tensor each."""
    shapes = [(8, 6), (4, 6), (4, 6), (10, 6), (10, 6)]
    wholes = [numbers(*shape) + index for index, shape in enumerate(shapes)]
    source, target = Group([0, 1], (2,), [Shard(1)]), Group([2, 3], (2,), [Shard(0)])
    sides = groups.workers(source, target)
    for group, workers, (name, other) in zip((source, target), sides, (("a", "b"), ("b", "a")), strict=True):
        for index, worker in enumerate(workers):
            worker.start(acts.join_pair, "fused", name, other, 2, group.spec(index), list(group.placements))
    finish(sides)
    for index, worker in enumerate(sides[0]):
        worker.start(acts.register, "fused", [(source.part(whole, 0, index), "fused") for whole in wholes])
    for worker in sides[1]:
        worker.start(register_fused, "fused")
    finish(sides)
    for workers, what in zip(sides, ("send", "recv"), strict=True):
        for worker in workers:
            worker.start(acts.transfer, "fused", what)
    finish(sides)
    for index, worker in enumerate(sides[1]):
        parts = [target.part(whole, 0, index) for whole in wholes]
        qkv, gate_up = worker.call(acts.read, "fused")
        assert torch.equal(qkv, torch.cat(parts[:3]))
        assert torch.equal(gate_up, torch.cat(parts[3:]))


def register_fused(state: dict[str, Any], batch: str) -> None:
    qkv, gate_up = torch.zeros(8, 6), torch.zeros(10, 6)
    views = [*qkv.split([4, 2, 2]), *gate_up.split([5, 5])]
    state["tensors"][batch] = [qkv, gate_up]
    state["handlers"][batch] = state["client"].register_tensors(batch, [(view, batch) for view in views], timeout=LONG)


# --- real DTensors


def test_what_dtensor_makes_of_its_own_placements(groups: Groups) -> None:
    """DTensors that torch sharded (FSDP of TP) or left Partial, against their own ``full_tensor``."""
    workers = [groups.cluster.worker() for _ in range(4)]
    sink = groups.cluster.worker()
    port = workers[0].call(acts.serve_group)
    for rank, worker in enumerate([*workers, sink]):
        worker.call(acts.connect, rank % 4, groups.cluster.paths[rank % 4])
    for rank, worker in enumerate(workers):
        worker.start(dtensor_group, rank, port)
    finish([workers])
    for kind in ("fsdp of tp", "partial", "uneven"):
        for worker in workers:
            worker.start(dtensor_register, kind)
        sink.start(dtensor_sink, kind)
        finish([workers, [sink]])
        for worker in workers:
            worker.start(acts.transfer, kind, "send")
        sink.start(acts.transfer, kind, "recv")
        finish([workers, [sink]])
        for worker in workers:
            worker.start(dtensor_full, kind)
        full = finish([workers])[0][0]
        assert torch.equal(sink.call(acts.read, kind)[0], full), kind
    close_all(workers, sink)


def close_all(workers: list[Worker], sink: Worker) -> None:
    for worker in [*workers, sink]:
        worker.close()


def dtensor_group(state: dict[str, Any], rank: int, port: int) -> None:
    acts.process_group(state, rank, 4, port)
    state["mesh"] = init_device_mesh("cpu", (2, 2), mesh_dim_names=("fsdp", "tp"))


def dtensor_register(state: dict[str, Any], kind: str) -> None:
    mesh, whole = state["mesh"], numbers(10, 6)
    if kind == "partial":
        local = (whole + dist.get_rank()).bfloat16()
        tensor = DTensor.from_local(local, mesh, [Partial(), Partial("avg")], run_check=False)
    elif kind == "uneven":
        tensor = distribute_tensor(numbers(5, 3), mesh, [Shard(0), Shard(1)])
    else:
        sharded = distribute_tensor(whole, mesh["tp"], [Shard(0)])
        rows = sharded.to_local().chunk(2)[mesh.get_coordinate()[0]]
        tensor = DTensor.from_local(
            rows, mesh, [_StridedShard(0, split_factor=2), Shard(0)], run_check=False, shape=whole.shape, stride=whole.stride()
        )
    state["dtensor", kind] = tensor
    state["client"].init_pair(kind, "a", "b", 4, mesh, tensor.placements, timeout=LONG)
    state["handlers"][kind] = state["client"].register_tensors(kind, [(tensor, kind)], timeout=LONG)


def dtensor_full(state: dict[str, Any], kind: str) -> torch.Tensor:
    full: torch.Tensor = state["dtensor", kind].full_tensor()
    return full.clone()


def dtensor_sink(state: dict[str, Any], kind: str) -> None:
    shape, dtype = ((5, 3), torch.float32) if kind == "uneven" else ((10, 6), torch.bfloat16 if kind == "partial" else torch.float32)
    target = torch.zeros(shape, dtype=dtype)
    state["tensors"][kind] = [target]
    state["client"].init_pair(kind, "b", "a", 1, timeout=LONG)
    state["handlers"][kind] = state["client"].register_tensors(kind, [(target, kind)], timeout=LONG)
