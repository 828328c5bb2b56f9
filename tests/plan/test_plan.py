"""Routes: what goes where, what the proof catches, what is shown and hashed. That plans move the right data: test_properties."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import replace

import pytest

from etha_ray import explain
from etha_ray.errors import LayoutError
from etha_ray.layout import Layout, Pieces, Reduction
from etha_ray.plan import (
    Box,
    Route,
    Side,
    TensorPlan,
    digest_inputs,
    inputs_digest,
    paired_route,
    plan,
    routes_into,
    routes_out_of,
)
from tests.plan.apply import least_share, side


def test_same_layout_is_one_box_a_rank() -> None:
    made = plan(side("4: S0"), side("4: S0", 4), (10, 3))
    assert made.routes == (
        Route(0, 0, (Box((0, 0), (0, 0), (3, 3)),), 9),
        Route(1, 1, (Box((0, 0), (0, 0), (3, 3)),), 9),
        Route(2, 2, (Box((0, 0), (0, 0), (3, 3)),), 9),
        Route(3, 3, (Box((0, 0), (0, 0), (1, 3)),), 3),
    )


def test_rows_to_columns() -> None:
    made = plan(side("2: S0"), side("2: S1", 2), (3, 5))
    assert made.routes == (
        Route(0, 0, (Box((0, 0), (0, 0), (2, 3)),), 6),
        Route(1, 0, (Box((0, 0), (2, 0), (1, 3)),), 3),
        Route(0, 1, (Box((0, 3), (0, 0), (2, 2)),), 4),
        Route(1, 1, (Box((0, 3), (2, 0), (1, 2)),), 2),
    )


def test_a_rank_asks_only_for_its_own() -> None:
    source, target = side("4: S0"), side("2: S0", 4)
    assert [(r.source, r.target) for r in routes_into(source, target, (8,), 1)] == [(2, 1), (3, 1)]
    assert [(r.source, r.target) for r in routes_out_of(source, target, (8,), 1)] == [(1, 0)]


def test_nothing_to_move_is_no_route() -> None:
    assert plan(side("2: S0"), side("2: R", 2), (0, 4)).routes == ()
    assert routes_into(side("2: R"), side("4: S0", 2), (2,), 3) == ()
    assert routes_out_of(side("4: S0"), side("2: R", 4), (2,), 3) == ()


def test_a_scalar_is_one_box_without_dimensions() -> None:
    assert plan(side("2: R"), side("1: R", 2), ()).routes == (Route(0, 0, (Box((), (), ()),), 1),)


def test_paired_route_is_the_whole_local_tensor() -> None:
    assert paired_route(3, [2, 5]) == Route(3, 3, (Box((0, 0), (0, 0), (2, 5)),), 10)
    assert paired_route(1, ()) == Route(1, 1, (Box((), (), ()),), 1)
    assert paired_route(0, (0, 5)) == Route(0, 0, (), 0)


def test_layouts_that_do_not_fit_the_shape_are_refused() -> None:
    for call in (routes_into, routes_out_of):
        with pytest.raises(LayoutError, match=r"shape \(4,\)"):
            call(side("2: S0"), side("2: S1", 2), (4,), 0)
        with pytest.raises(LayoutError, match="no position 2"):
            call(side("2: S0"), side("2: S0", 2), (4,), 2)


def test_a_side_has_one_agent_and_host_per_position() -> None:
    with pytest.raises(LayoutError, match="2x2: S0,R has 4 positions, but 3 agents and 4 hosts"):
        Side(Layout.decode("2x2: S0,R"), (0, 1, 2), ("a",) * 4)


# --- proof ------------------------------------------------------------------------------------------------------------


def tampered(made: TensorPlan, number: int, **changes: object) -> TensorPlan:
    routes = list(made.routes)
    routes[number] = replace(routes[number], **changes)  # type: ignore[arg-type]
    return replace(made, routes=tuple(routes))


MADE = plan(side("2x2: S0,R"), side("3: S1", 4), (6, 7))
FIRST = MADE.routes[0]
BOX = FIRST.boxes[0]


@pytest.mark.parametrize(
    ("broken", "says"),
    [
        (replace(MADE, routes=MADE.routes[1:]), "writes 9 elements into target 0, which holds 18"),
        (replace(MADE, routes=(*MADE.routes, FIRST)), "writes 27 elements into target 0, which holds 18"),
        (replace(MADE, routes=(FIRST, *MADE.routes[:1], *MADE.routes[2:])), "writes target 0 twice"),
        (tampered(MADE, 0, source=2), "route 2 -> 0"),
        (tampered(MADE, 0, source=4), "not in the mesh"),
        (tampered(MADE, 0, target=-1), "not in the mesh"),
        (tampered(MADE, 0, target=1), "writes 9 elements into target 0, which holds 18"),
        (tampered(MADE, 0, numel=1), "says 1 elements"),
        (tampered(MADE, 0, boxes=(replace(BOX, size=(3, 2)),), numel=6), "writes 15 elements"),
        (tampered(MADE, 0, boxes=(replace(BOX, source_start=(0, 1)),)), "tensor's dimension 1"),
        (tampered(MADE, 0, boxes=(replace(BOX, target_start=(1, 0)),)), "tensor's dimension 0"),
        (tampered(MADE, 0, boxes=(replace(BOX, source_start=(0, -1), target_start=(0, -1)),)), "tensor's dimension 1"),
        (tampered(MADE, 0, boxes=(replace(BOX, size=(3, 4)),), numel=12), "tensor's dimension 1"),
        (tampered(MADE, 0, boxes=(replace(BOX, size=(9,)),)), "number of dimensions"),
        (tampered(MADE, 0, boxes=(BOX, replace(BOX, size=(3, 0)))), "is empty"),
        (replace(MADE, shape=(6, 8)), "target"),
        (replace(MADE, target=side("3: S0", 4)), "route 0 -> 0"),
    ],
)
def test_the_proof_catches(broken: TensorPlan, says: str) -> None:
    MADE.verify()
    with pytest.raises(LayoutError, match="the plan from ") as caught:
        broken.verify()
    assert says in str(caught.value)


def test_the_proof_catches_a_box_that_counts_elements_beyond_the_tensor() -> None:
    made = plan(side("1: R"), side("1: R", 1), (4, 2))
    boxes = (Box((0, 0), (0, 0), (2, 2)), Box((3, 0), (3, 0), (2, 2)))  # as many elements as there are, but never row 2
    with pytest.raises(LayoutError, match="tensor's dimension 0"):
        tampered(made, 0, boxes=boxes).verify()


def test_the_proof_catches_a_scalar_written_twice_and_once_not() -> None:
    made = plan(side("2: R"), side("2: R", 2), ())
    made.verify()
    with pytest.raises(LayoutError, match="writes 2 elements into target 0"):
        replace(made, routes=(made.routes[0], replace(made.routes[1], target=0))).verify()


# --- several intervals a dimension --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "target", "boxes"),
    [
        ("2: SS0/4", "2: SS0/4", 2),  # the same hands: neighbours in both local tensors, though not in the whole
        ("2: SS0/4", "1: R", 7),  # 7 rows in chunks of 2, 2, 2 and 1, each halved
        ("1: R", "2: SS1/3", 6),
        ("2: SS0/4", "3: S1", 21),
        ("2x2: SS0/2,S0", "2x2: R,R", 16),
        ("2x2: SS0/2,S0", "4: S0", 4),  # FSDP2 with tensor parallelism, to as many shards in the order of rows
        ("2x3: SS0/2,SS1/2", "2x3: SS0/2,SS1/2", 6),
    ],
)
def test_regions_of_several_intervals(source: str, target: str, boxes: int) -> None:
    made = plan(side(source), side(target, 10), (7, 9))
    made.verify()
    assert sum(len(route.boxes) for route in made.routes) == boxes
    sent = {route for index in range(made.source.layout.ranks) for route in routes_out_of(made.source, made.target, (7, 9), index)}
    assert sent == set(made.routes)


# --- partial ------------------------------------------------------------------------------------------------------------


def test_a_route_names_every_contributor_in_mesh_order() -> None:
    made = plan(side("2x3x2: P(sum),S0,P(avg)"), side("2: S0", 20), (9,))
    made.verify()
    assert made.reduction == Reduction((0, 2), "sum", 2, 4)
    assert [(route.sources, route.target, route.numel) for route in made.routes] == [
        ((0, 1, 6, 7), 0, 3),
        ((2, 3, 8, 9), 0, 2),
        ((2, 3, 8, 9), 1, 1),
        ((4, 5, 10, 11), 1, 3),
    ]
    assert routes_out_of(made.source, made.target, (9,), 8) == made.routes[1:3]
    assert made.bytes_between(2)[8, 0] == 4


def test_each_contribution_comes_from_the_nearest_of_its_replicas() -> None:
    source = Side(Layout.decode("2x3: P(sum),R"), (0, 1, 2, 3, 4, 5), ("a", "b", "c", "a", "b", "c"))
    target = Side(Layout.decode("3: R"), (10, 11, 5), ("b", "a", "c"))
    assert [route.sources for route in plan(source, target, (4,)).routes] == [(1, 4), (0, 3), (2, 5)]


def test_replicas_of_contributions_that_are_divided_differently() -> None:
    """Rows are cut wherever any of the contributors changes."""
    source = Side(Layout.decode("2x3: P(max),R"), tuple(range(6)), ("a", "b", "c", "d", "e", "f"))
    target = Side(Layout.decode("2: R"), (10, 11), ("a", "far"))
    with least_share(1):
        made = plan(source, target, (8, 3))
        made.verify()
    rows = {target: [(route.sources, route.numel // 3) for route in made.routes if route.target == target] for target in (0, 1)}
    # Neither target has both contributions beside it: the first combines them, and passes the result on to the other.
    assert rows[0] == rows[1]
    assert {(route.target, route.relay) for route in made.routes} == {(0, None), (1, 0)}
    # Rank 0 gives its contribution to the target beside it, and each of the three replicas of the other one a third of all rows.
    given = Counter[int]()
    for sources, count in rows[0]:
        given.update(dict.fromkeys(sources, count))
    assert given[0] == 8
    assert sum(given[index] for index in (3, 4, 5)) == 8
    assert all(abs(given[index] - 8 / 3) < 1 for index in (3, 4, 5))


@pytest.mark.parametrize("call", [plan, lambda *args: routes_into(*args, 0), lambda *args: routes_out_of(*args, 0)])
def test_a_partial_target_is_refused(call: Callable[[Side, Side, tuple[int, ...]], object]) -> None:
    with pytest.raises(LayoutError, match=r"target layout 2x2: S0,P\(sum\) has a Partial on mesh dimension 1.*Replicate\(\)"):
        call(side("2: S0"), side("2x2: S0,P(sum)", 2), (4,))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"others": ()}, "not each of 2 once"),
        ({"others": (0,)}, "not each of 2 once"),
        ({"source": 2, "others": (0,)}, "not each of 2 once"),
        ({"others": (3,)}, "do not hold the same indices"),
        ({"others": (4,)}, "not in the mesh"),
    ],
)
def test_the_proof_catches_wrong_contributors(change: dict[str, object], says: str) -> None:
    made = plan(side("2x2: P(sum),S0"), side("1: R", 4), (6,))
    made.verify()
    with pytest.raises(LayoutError, match=says):
        tampered(made, 0, **change).verify()


def test_the_proof_catches_values_that_are_combined() -> None:
    made = plan(side("2: R"), side("1: R", 4), (6,))
    with pytest.raises(LayoutError, match="holds values, not contributions"):
        tampered(made, 0, others=(1,), source=0).verify()


# --- explicit pieces ----------------------------------------------------------------------------------------------------


def ragged(*pieces: tuple[tuple[int, ...], tuple[int, ...]] | None, shape: tuple[int, ...] = (8, 3), first: int = 0) -> Side:
    return Side(Pieces(shape, pieces), tuple(range(first, first + len(pieces))), ("host",) * len(pieces))


def test_ragged_rows_to_even_ones() -> None:
    made = plan(ragged(((0, 0), (5, 3)), None, ((5, 0), (3, 3))), side("2: S0", 10), (8, 3))
    made.verify()
    assert made.routes == (
        Route(0, 0, (Box((0, 0), (0, 0), (4, 3)),), 12),
        Route(0, 1, (Box((4, 0), (0, 0), (1, 3)),), 3),
        Route(2, 1, (Box((0, 0), (1, 0), (3, 3)),), 9),
    )
    assert routes_out_of(made.source, made.target, (8, 3), 1) == ()


def test_even_rows_to_pieces_that_overlap() -> None:
    made = plan(side("2: S0"), ragged(((0, 0), (8, 1)), ((2, 0), (4, 3)), None, first=10), (8, 3))
    made.verify()
    assert [(route.source, route.target, route.numel) for route in made.routes] == [(0, 0, 4), (1, 0, 4), (0, 1, 6), (1, 1, 6)]


def test_a_part_that_no_source_holds_is_named() -> None:
    source = ragged(((0, 0), (5, 3)), ((6, 0), (2, 2)))
    assert routes_into(source, side("4: S0", 10), (8, 3), 0)
    for shown, target in ((r"\[5:6, 0:3\]", side("4: S0", 10)), (r"\[5:6, 0:3\]", side("1: R", 10))):
        with pytest.raises(LayoutError, match=rf"no source holds {shown} of the tensor of shape \(8, 3\)"):
            plan(source, target, (8, 3))
    with pytest.raises(LayoutError, match=r"no source holds \[6:8, 2:3\].*target 3 wants \(2 elements"):
        routes_into(source, side("4: S0", 10), (8, 3), 3)


def test_pieces_of_a_source_that_overlap_are_refused() -> None:
    with pytest.raises(LayoutError, match="ranks 0 and 1 hold boxes"):
        plan(ragged(((0, 0), (5, 3)), ((4, 0), (4, 3))), side("1: R", 10), (8, 3))


def test_pieces_of_another_shape_are_refused() -> None:
    with pytest.raises(LayoutError, match=r"shape \(8, 3\) cannot be used for one of shape \(8, 4\)"):
        plan(ragged(((0, 0), (8, 3))), side("1: R", 10), (8, 4))


# --- shown and hashed ---------------------------------------------------------------------------------------------------


def test_bytes_between() -> None:
    made = plan(side("2: S0"), side("2: S1", 2), (3, 5))
    assert made.bytes_between(4) == {(0, 0): 24, (1, 0): 12, (0, 1): 16, (1, 1): 8}


def test_a_plan_explains_itself() -> None:
    made = plan(side("2: S0"), side("2: S1", 2), (3, 5))
    assert made.explain("float32", bandwidth=1e9) == explain(made, dtype="float32", bandwidth=1e9)


def test_equal_plans_have_equal_digests_and_others_not() -> None:
    source, target = side("2x2: S0,R"), side("4: S1", 4)
    made = plan(source, target, (6, 7))
    assert made.digest() == plan(replace(source), replace(target), [6, 7]).digest()
    others = [
        plan(source, target, (6, 8)),
        plan(source, side("4: S0", 4), (6, 7)),
        plan(source, side("4: S1", 5), (6, 7)),
        plan(side("2x2: S0,R", host="other"), target, (6, 7)),
        replace(made, routes=made.routes[1:]),
        tampered(made, 0, source=1),
    ]
    assert len({made.digest(), *(other.digest() for other in others)}) == 7


def test_digest_of_inputs_counts_how_they_are_cut() -> None:
    inputs = [("ab", "c"), ("a", "bc"), ("abc",), (b"ab", "c"), ("c", "ab"), ()]
    assert len({digest_inputs(parts) for parts in inputs}) == len(inputs)
    assert digest_inputs(iter(["ab", "c"])) == digest_inputs(("ab", "c"))


def test_inputs_digest_covers_sides_and_tensors() -> None:
    source, target = side("2: S0"), side("2: R", 2)
    tensors = [((4, 2), "float32"), ((), "int64")]
    digests = {
        inputs_digest(source, target, tensors),
        inputs_digest(target, source, tensors),
        inputs_digest(source, target, tensors[::-1]),
        inputs_digest(source, target, [((4, 2), "bfloat16"), ((), "int64")]),
        inputs_digest(source, target, [((42,), "float32"), ((), "int64")]),
        inputs_digest(source, side("2: R", 3), tensors),
    }
    assert len(digests) == 6


def test_host_names_cannot_pass_for_other_seats() -> None:
    layout = Layout.decode("2: R")
    assert Side(layout, (1, 2), ("a 2@1:b", "c")).encode() != Side(layout, (1, 2), ("a", "b 2@1:c")).encode()


def test_plans_are_the_same_in_every_process() -> None:
    code = (
        "from etha_ray.layout import Layout\n"
        "from etha_ray.plan import Side, plan, inputs_digest\n"
        "a = Side(Layout.decode('2x4: S0,R'), tuple(range(8)), tuple('abcdabcd'))\n"
        "b = Side(Layout.decode('3x3: S1,R'), (9, 3, 5, 7, 1, 11, 2, 20, 30), tuple('xaybzcwdv'))\n"
        "print(plan(a, b, (17, 13)).digest(), inputs_digest(a, b, [((17, 13), 'float32')]), hash(a))\n"
    )
    runs = [
        subprocess.run(
            [sys.executable, "-c", code], env={**os.environ, "PYTHONHASHSEED": seed}, capture_output=True, text=True, check=True
        ).stdout
        for seed in ("0", "1", "4242")
    ]
    assert len(set(runs)) == 1
    assert len(runs[0].split()) == 3
