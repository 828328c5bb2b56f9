"""Routes: who is asked, what the proof catches, what is shown and hashed. That plans move the right data: test_plan_properties."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace

import pytest

import etha_ray.layout as layout_module
import etha_ray.plan as plan_module
from etha_ray.errors import LayoutError
from etha_ray.layout import Axis, Intervals, Layout
from etha_ray.plan import (
    Box,
    Route,
    Side,
    TensorPlan,
    digest_inputs,
    explain_plan,
    inputs_digest,
    paired_route,
    plan,
    routes_into,
    routes_out_of,
)


def side(layout: str, first_agent: int = 0, per_host: int = 8, host: str = "host") -> Side:
    """Agents in order from ``first_agent``, ``per_host`` of them on each host."""
    found = Layout.decode(layout)
    agents = tuple(range(first_agent, first_agent + found.ranks))
    return Side(found, agents, tuple(f"{host}{agent // per_host}" for agent in agents))


def sources_of(source: Side, target: Side, shape: tuple[int, ...]) -> dict[int, list[int]]:
    return {index: [route.source for route in routes_into(source, target, shape, index)] for index in range(target.layout.ranks)}


def egress(made: TensorPlan) -> Counter[int]:
    sent: Counter[int] = Counter(dict.fromkeys(range(made.source.layout.ranks), 0))
    for route in made.routes:
        sent[route.source] += route.numel
    return sent


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


# --- replicas ---------------------------------------------------------------------------------------------------------


def test_a_holder_on_the_same_agent_is_asked_first() -> None:
    source = Side(Layout.decode("4: R"), (7, 3, 5, 1), ("a", "a", "b", "b"))
    target = Side(Layout.decode("3: R"), (5, 7, 1), ("b", "a", "b"))
    assert sources_of(source, target, (6,)) == {0: [2], 1: [0], 2: [3]}


def test_a_holder_on_the_same_host_is_asked_next() -> None:
    source = Side(Layout.decode("4: R"), (0, 1, 2, 3), ("a", "b", "b", "c"))
    target = Side(Layout.decode("4: R"), (10, 11, 12, 1), ("c", "b", "b", "b"))
    # The last target shares agent 1 with source 1; the two before it share out host b; the first has host c to itself.
    assert sources_of(source, target, (6,)) == {0: [3], 1: [1], 2: [2], 3: [1]}


def test_nearness_never_takes_from_one_who_does_not_hold_it() -> None:
    source = Side(Layout.decode("2x2: S0,R"), (0, 1, 2, 3), ("a", "a", "b", "b"))
    target = Side(Layout.decode("2: S0"), (2, 1), ("b", "a"))
    made = plan(source, target, (8,))
    made.verify()
    assert {route.target: route.source // 2 for route in made.routes} == {0: 0, 1: 1}


@pytest.mark.parametrize("hosts", ["apart", "together"])
@pytest.mark.parametrize(
    ("source", "target", "shape"),
    [
        ("8: R", "8: S0", (64, 3)),
        ("4: R", "16: S0", (64, 3)),
        ("8: R", "4x4: S0,S1", (64, 64)),
        ("8: R", "32: R", (5, 7)),
        ("2x4: S0,R", "16: S0", (64, 3)),
        ("2x4: S0,R", "4x2: S1,R", (64, 64)),
        ("4x2: R,S1", "2x8: R,S1", (64, 64)),
        ("2x2x4: R,S0,R", "2x16: R,S0", (64, 64)),
    ],
)
def test_holders_of_the_same_share_the_load(source: str, target: str, shape: tuple[int, ...], hosts: str) -> None:
    per_host = 64 if hosts == "together" else 8
    giving = side(source, 0, per_host)
    taking = side(target, 100, per_host, "host" if hosts == "together" else "other")
    made = plan(giving, replace(taking, hosts=giving.hosts[:1] * len(taking.hosts)) if hosts == "together" else taking, shape)
    made.verify()
    sent = egress(made)
    assert max(sent.values()) <= 1.1 * sum(sent.values()) / len(sent)


def test_few_targets_are_served_from_all_over_the_mesh() -> None:
    source = side("16: R", per_host=4)
    target = side("4: R", 100, host="other")
    served_by = [sources[0] for sources in sources_of(source, target, (8,)).values()]
    assert len({source.hosts[index] for index in served_by}) == 4


def test_targets_left_over_by_nearness_share_the_holders_too() -> None:
    source = side("4: R", per_host=1)  # host0 to host3
    hosts = tuple(f"host{index // 2}" if index % 2 else "far" for index in range(8))
    target = Side(Layout.decode("8: R"), tuple(range(100, 108)), hosts)
    asked = sources_of(source, target, (8,))
    assert [asked[index][0] for index in (1, 3, 5, 7)] == [0, 1, 2, 3]
    assert sorted(asked[index][0] for index in (0, 2, 4, 6)) == [0, 1, 2, 3]


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
        (tampered(MADE, 0, target=1), "route 0 -> 1"),
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


@pytest.fixture
def dealt_in_pairs(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A rule no placement has yet: a sharded dimension is dealt out two indices at a time, round and round."""

    def pieces(axis: Axis) -> tuple[Intervals, ...]:
        count = math.prod(axis.factors)
        pairs = [(start, min(start + 2, axis.size)) for start in range(0, axis.size, 2)]
        return tuple(tuple(pairs[number::count]) for number in range(count)) if count > 1 else (((0, axis.size),),)

    def forget() -> None:
        for module in (layout_module, plan_module):
            for value in vars(module).values():
                if hasattr(value, "cache_clear"):
                    value.cache_clear()

    forget()
    monkeypatch.setattr(Axis, "pieces", property(pieces))
    yield
    forget()


@pytest.mark.usefixtures("dealt_in_pairs")
@pytest.mark.parametrize(
    ("source", "target", "boxes"),
    [
        ("2: S0", "2: S0", 2),  # the same hands: neighbours in both local tensors, though not in the whole
        ("2: S0", "1: R", 4),  # indices 0 to 6 in four runs
        ("1: R", "2: S1", 5),
        ("2: S0", "3: S1", 20),
        ("2x2: S0,S1", "3x2: S1,R", 40),
        ("2x3: S0,S1", "2x3: S0,S1", 6),
    ],
)
def test_regions_of_several_intervals(source: str, target: str, boxes: int) -> None:
    made = plan(side(source), side(target, 10), (7, 9))
    made.verify()
    assert sum(len(route.boxes) for route in made.routes) == boxes
    sent = {route for index in range(made.source.layout.ranks) for route in routes_out_of(made.source, made.target, (7, 9), index)}
    assert sent == set(made.routes)


# --- shown and hashed ---------------------------------------------------------------------------------------------------


def test_bytes_between() -> None:
    made = plan(side("2: S0"), side("2: S1", 2), (3, 5))
    assert made.bytes_between(4) == {(0, 0): 24, (1, 0): 12, (0, 1): 16, (1, 1): 8}


def test_explain_is_a_table_of_bytes() -> None:
    source, target = side("2: S0"), Side(Layout.decode("2: S1"), (2, 3), ("host0", "elsewhere"))
    text = explain_plan(plan(source, target, (1024, 1024)), 2)
    assert text.splitlines() == [
        "2: S0  ->  2: S1   shape (1024, 1024), 2 bytes an element",
        "2 MiB in 4 routes, 4 boxes; 1 MiB between hosts; most from one source 1 MiB, mean 1 MiB",
        "source     -> 0     -> 1",
        "     0  512 KiB  512 KiB",
        "     1  512 KiB  512 KiB",
    ]
    assert len(explain_plan(plan(side("32: S0"), side("2: R", 32), (64,)), 2).splitlines()) == 2


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


def test_two_thousand_ranks() -> None:
    source, target = side("64x16: S0,S0"), side("8x64: S1,S0", 1024)
    shape = (256, 2048, 7168)
    into = routes_into(source, target, shape, 300)
    # Expert parallel over 64: 4 of 256 experts, each from its own source, and this rank's eighth of their rows.
    assert [route.numel for route in into] == [2048 // 8 * 7168] * 4
    for route in into:
        assert route in routes_out_of(source, target, shape, route.source)
