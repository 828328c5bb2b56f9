"""What several targets want leaves each source host once: who passes it on to whom, for any layouts."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from etha_ray.errors import LayoutError
from etha_ray.layout import Layout, Pieces
from etha_ray.plan import Box, Route, Side, TensorPlan, plan
from tests.layout.strategies import cases
from tests.plan.apply import far, least_share, side
from tests.plan.test_properties import SHARES, Case, moves, reductions

Key = tuple[tuple[int, ...], Box]
"""A box of what certain sources hold."""


def crossings(made: TensorPlan) -> Counter[tuple[str, Key]]:
    """How often each box of each source leaves a host for another, its source's or a relay's."""
    found: Counter[tuple[str, Key]] = Counter()
    for route in made.routes:
        to = made.target.hosts[route.target]
        for box in route.boxes:
            if route.relay is not None:
                found[made.target.hosts[route.relay], (route.sources, box)] += made.target.hosts[route.relay] != to
                continue
            for giver in route.sources:
                found[made.source.hosts[giver], ((giver,), box)] += made.source.hosts[giver] != to
    return found


def test_replicas_on_other_hosts_make_a_chain() -> None:
    source = Side(Layout.decode("1: R"), (0,), ("a",))
    target = Side(Layout.decode("6: R"), (9, 3, 4, 5, 6, 7), ("b", "c", "a", "c", "b", "d"))
    made = plan(source, target, (4,))
    made.verify()
    # By agents: 3 and 5 on c, 6 and 9 on b, 7 on d; agent 4 is beside the source.
    assert {route.target: route.relay for route in made.routes} == {2: None, 1: None, 3: 1, 4: 1, 0: 4, 5: 4}
    assert made.bytes_between(2) == {(0, 2): 8, (0, 1): 8}
    assert made.bytes_relayed(2) == {(1, 3): 8, (1, 4): 8, (4, 0): 8, (4, 5): 8}


def test_who_shares_nothing_relays_nothing() -> None:
    assert all(route.relay is None for route in plan(side("4: S0"), far("8: S1"), (64, 64)).routes)
    assert all(route.relay is None for route in plan(side("4: R"), side("4: R", 4), (64,)).routes)  # one host


def test_combined_once_and_passed_on() -> None:
    source = Side(Layout.decode("2: P(sum)"), (0, 1), ("a", "b"))
    made = plan(source, Side(Layout.decode("3: R"), (10, 11, 12), ("a", "b", "c")), (5,))
    made.verify()
    assert [(route.sources, route.target, route.relay) for route in made.routes] == [((0, 1), 0, None), ((0, 1), 1, 0), ((0, 1), 2, 1)]


def test_equal_boxes_are_passed_on() -> None:
    pieces = Pieces((8,), (((0,), (4,)), ((4,), (4,)), ((0,), (4,)), ((2,), (4,))))
    target = Side(pieces, (10, 11, 12, 13), ("c", "d", "e", "f"))
    made = plan(Side(Layout.decode("1: R"), (0,), ("a",)), target, (8,))
    made.verify()
    assert {route.target: route.relay for route in made.routes} == {0: None, 1: None, 2: 0, 3: None}


@cases(300)
@given(st.one_of(moves(), reductions()), SHARES, st.integers(0, 9))
def test_every_region_leaves_a_host_once(case: Case, least: int, turn: int) -> None:
    with least_share(least):
        made = plan(*case, turn)
        assert plan(*case, turn).digest() == made.digest()
    made.verify()  # each element once; whoever passes something on gets it, from the sources in the end
    target = made.target
    for route in made.routes:
        if route.relay is None:
            continue
        before = target.agents[route.relay], route.relay
        assert before < (target.agents[route.target], route.target), "in the order of agents: nobody waits in a circle"
    if case[0].layout.partial is None:
        # Copies on a host with a holder read from there; another host is entered once for each piece that somebody there holds.
        entered: Counter[tuple[str, int, Box]] = Counter()
        for route in made.routes:
            giver = made.source.hosts[route.source] if route.relay is None else target.hosts[route.relay]
            held = target.layout.region(route.target, made.shape)
            entered.update((target.hosts[route.target], hash(held), box) for box in route.boxes if giver != target.hosts[route.target])
        assert max(entered.values(), default=1) == 1
    assert max(crossings(made).values(), default=0) <= 1


@pytest.mark.parametrize("wrong", [{"relay": 0}, {"relay": 7}, {"relay": 3}, {"relay": 2}])
def test_a_wrong_relay_is_found(wrong: dict[str, int]) -> None:
    source, target = side("1: R"), far("2x2: S0,R")
    target = replace(target, hosts=("b", "c", "b", "c"))
    made = plan(source, target, (4,))
    number = next(number for number, route in enumerate(made.routes) if route.target == 3)
    broken: list[Route] = list(made.routes)
    broken[number] = replace(broken[number], **wrong)
    made.verify()
    if wrong == {"relay": 2}:
        assert tuple(broken) == made.routes
        broken[2] = replace(broken[2], relay=3)  # a circle
    with pytest.raises(LayoutError):
        replace(made, routes=tuple(broken)).verify()
