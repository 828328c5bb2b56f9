"""Which replica serves whom: the nearest, and evenly."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from fractions import Fraction

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from etha_ray.layout import Layout
from etha_ray.plan import Side, TensorPlan, plan, routes_into, turns
from etha_ray.plan.sharing import LEAST_SHARE
from tests.layout.strategies import cases, layouts
from tests.plan.apply import far, least_share, side


def sources_of(source: Side, target: Side, shape: tuple[int, ...]) -> dict[int, list[int]]:
    return {index: [route.source for route in routes_into(source, target, shape, index)] for index in range(target.layout.ranks)}


def egress(made: Iterable[TensorPlan]) -> Counter[int]:
    """Elements that each source gives, those that give nothing included."""
    sent: Counter[int] = Counter()
    for one in made:
        sent.update(dict.fromkeys(range(one.source.layout.ranks), 0))
        for route in one.routes:
            for giver in route.sources if route.relay is None else ():
                sent[giver] += route.numel
    return sent


def even(sent: Counter[int]) -> bool:
    return max(sent.values()) <= 1.1 * sum(sent.values()) / len(sent)


# --- nearness -----------------------------------------------------------------------------------------------------------


def test_a_holder_on_the_same_agent_is_asked_first() -> None:
    source = Side(Layout.decode("4: R"), (7, 3, 5, 1), ("a", "a", "b", "b"))
    target = Side(Layout.decode("3: R"), (5, 7, 1), ("b", "a", "b"))
    assert sources_of(source, target, (6,)) == {0: [2], 1: [0], 2: [3]}


def test_a_holder_on_the_same_host_is_asked_next() -> None:
    source = Side(Layout.decode("4: R"), (0, 1, 2, 3), ("a", "b", "b", "c"))
    target = Side(Layout.decode("4: R"), (10, 11, 12, 1), ("c", "b", "b", "b"))
    # The last target shares agent 1 with source 1; the two before it share out host b; the first has host c to itself.
    asked = sources_of(source, target, (6,))
    assert asked[0] == [3]
    assert sorted(asked[1] + asked[2]) == [1, 2]
    assert asked[3] == [1]


def test_an_agent_counts_wherever_its_host_is_said_to_be() -> None:
    source = Side(Layout.decode("2: R"), (0, 1), ("a", "b"))
    assert sources_of(source, Side(Layout.decode("1: R"), (1,), ("elsewhere",)), (6,)) == {0: [1]}


def test_nearness_never_takes_from_one_who_does_not_hold_it() -> None:
    source = Side(Layout.decode("2x2: S0,R"), (0, 1, 2, 3), ("a", "a", "b", "b"))
    target = Side(Layout.decode("2: S0"), (2, 1), ("b", "a"))
    made = plan(source, target, (8,))
    made.verify()
    assert {route.target: route.source // 2 for route in made.routes} == {0: 0, 1: 1}


def test_who_serves_its_own_host_serves_less_elsewhere() -> None:
    source = Side(Layout.decode("4: R"), (0, 1, 2, 3), ("a", "b", "c", "d"))
    target = Side(Layout.decode("4: R"), tuple(range(10, 14)), ("far", "a", "far", "far"))
    made = plan(source, target, (3 << 24,))
    assert {route.target for route in made.routes if route.source == 0} == {1}
    assert list(egress([made]).values()) == [3 << 24, 1 << 24, 1 << 24, 1 << 24], "what goes far, goes once"


def test_what_stays_on_an_agent_does_not_count_as_given() -> None:
    source = Side(Layout.decode("2: R"), (0, 1), ("a", "b"))
    target = Side(Layout.decode("2: R"), (0, 10), ("a", "far"))
    made = plan(source, target, (1 << 20,))
    assert [(route.source, route.numel) for route in made.routes] == [(0, 1 << 20), (0, 1 << 19), (1, 1 << 19)]


# --- evenness -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("hosts", ["apart", "together"])
@pytest.mark.parametrize(
    ("source", "target", "shape"),
    [
        ("8: R", "8: S0", (64, 3)),
        ("4: R", "16: S0", (64, 3)),
        ("8: R", "4x4: S0,S1", (64, 64)),
        ("8: R", "32: R", (8192, 512)),
        ("2x4: S0,R", "16: S0", (64, 3)),
        ("2x4: S0,R", "4x2: S1,R", (64, 64)),
        ("4x2: R,S1", "2x8: R,S1", (64, 64)),
        ("2x2x4: R,S0,R", "2x16: R,S0", (64, 64)),
        ("2x8: P(sum),R", "8: S0", (64, 3)),
        # Numbers that do not divide: demands are divided among holders.
        ("8: R", "1: R", (16384, 4096)),
        ("8: R", "3: R", (16384, 4096)),
        ("7: R", "5: S0", (16383, 4096)),
        ("3x5: S0,R", "2x2: S1,R", (30000, 8000)),
        ("4: R", "1: R", (4, 1 << 23)),
        ("5x2: R,SS0/2", "3: S1", (16384, 8192)),
        ("2x3: P(avg),R", "2: S0", (8192, 8192)),
    ],
)
def test_holders_of_the_same_share_the_load(source: str, target: str, shape: tuple[int, ...], hosts: str) -> None:
    giving, taking = side(source, 0, 64 if hosts == "together" else 8), far(target)
    if hosts == "together":
        taking = replace(taking, hosts=giving.hosts[:1] * len(taking.hosts))
    made = plan(giving, taking, shape)
    made.verify()
    assert even(egress([made]))


def test_a_large_tensor_comes_from_all_its_replicas() -> None:
    made = plan(side("8: R"), far("1: R"), (4096, 1024))
    assert [(route.numel, len(route.boxes)) for route in made.routes] == [(4096 * 1024 // 8, 1)] * 8


def test_a_small_one_from_one() -> None:
    assert len(plan(side("8: R"), far("1: R"), (LEAST_SHARE,)).routes) == 1


@pytest.mark.parametrize("targets", [1, 2, 3, 5])
def test_many_small_tensors_come_from_all_replicas_in_turn(targets: int) -> None:
    source, target = side("2x8: S0,R"), far(f"{targets}: R")
    shapes: list[tuple[int, ...]] = [(64,), (64, 4)] * 80  # as the weights and biases of layers do, every other one
    made = [plan(source, target, shape, turn) for shape, turn in zip(shapes, turns(shapes), strict=True)]
    assert even(egress(made))


def test_small_tensors_for_few_targets_come_from_all_over_the_mesh() -> None:
    source, target = side("16: R", per_host=4), far("4: R")
    served_by = [plan(source, target, (8,), turn).routes[0].source for turn in range(16)]
    assert len({source.hosts[index] for index in served_by}) == 4


def test_turns_count_equal_shapes() -> None:
    assert turns([(4,), (5,), (4,), (4, 1), (4,), (5,)]) == [0, 0, 1, 0, 2, 1]


def test_equal_large_tensors_have_one_plan() -> None:
    source, target = side("2x8: S0,R"), far("3: R")
    assert plan(source, target, (16384, 8192), 0) == plan(source, target, (16384, 8192), 5)
    assert plan(source, target, (8,), 0) != plan(source, target, (8,), 1)


def even_shares(made: TensorPlan) -> dict[int, Fraction]:
    """For each source, what each holder of its piece gives if all of them give the same: what no plan can do better than."""
    wanted: Counter[int] = Counter()
    replicas = {index: made.source.layout.replicas(index) for index in range(made.source.layout.ranks)}  # type: ignore[union-attr]
    for route in made.routes:
        for giver in route.sources if route.relay is None else ():
            wanted[replicas[giver][0]] += route.numel
    return {index: Fraction(wanted[holders[0]], len(holders)) for index, holders in replicas.items()}


@st.composite
def apart(draw: st.DrawFn, ndim: int, sizes: st.SearchStrategy[int]) -> tuple[Side, Side, tuple[int, ...]]:
    """Sides that share no host, so that evenness is all that counts."""
    shape = tuple(draw(sizes) for _ in range(ndim))
    partial = draw(st.sampled_from([(), ("sum",)]))
    source, target = draw(layouts(ndim, partial=partial, max_ranks=32)), draw(layouts(ndim, max_ranks=32))
    return side(source.encode(), per_host=4), far(target.encode()), shape


@cases(300)
@given(apart(1, st.integers(1, 3000)), st.integers(0, 40))
def test_the_most_that_one_gives_is_the_least_possible(case: tuple[Side, Side, tuple[int, ...]], turn: int) -> None:
    """Exactly, where single elements may be divided: of a tensor of one dimension, with a least share of one."""
    with least_share(1):
        made = plan(*case, turn)
    shares, sent = even_shares(made), egress([made])
    for index, share in shares.items():
        assert math.floor(share) <= sent[index] <= math.ceil(share)
    assert max(sent.values()) == math.ceil(max(shares.values()))


@cases(150)
@given(st.integers(1, 3).flatmap(lambda ndim: apart(ndim, st.sampled_from([1, 7, 64, 300, 1024, 4096, 10_000]))), st.integers(0, 40))
def test_no_one_gives_much_more_than_an_even_share(case: tuple[Side, Side, tuple[int, ...]], turn: int) -> None:
    """One part more at most: two least shares and a row that is no larger than one, or the smallest row that there is."""
    made = plan(*case, turn)
    part = max(3 * LEAST_SHARE, math.prod(made.shape) // max(made.shape)) + 1
    sent = egress([made])
    for index, share in even_shares(made).items():
        assert sent[index] < share + part


@cases(150)
@given(apart(2, st.sampled_from([16384, 20000, 32768])))
def test_large_tensors_come_out_even(case: tuple[Side, Side, tuple[int, ...]]) -> None:
    made = plan(*case)
    best, sent = max(even_shares(made).values()), egress([made])
    assert max(sent.values()) <= 1.1 * best
    assume(best <= sum(sent.values()) / len(sent))  # the layout allows it: no piece is wanted more than the others
    assert even(sent)
