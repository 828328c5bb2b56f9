"""What is counted, against what both layouts hold."""

from __future__ import annotations

import dataclasses
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from etha_ray.explanation import Explanation, explain
from etha_ray.layout import Layout
from etha_ray.plan import Side, plan

from .layouts import Case, cases


@settings(max_examples=150, deadline=None)
@given(cases(), st.integers(1, 4), st.sampled_from([1, 2, 8]))
def test_every_byte_is_counted_once_on_both_ends(case: Case, gpus_per_host: int, itemsize: int) -> None:
    source, target, shape = case
    made = explain(source, target, shape, itemsize, gpus_per_host=gpus_per_host, bandwidth=1000)
    layout, reduction = Layout.decode(target), Layout.decode(source).partial
    contributions = 1 if reduction is None else reduction.count
    for position, received in enumerate(made.ingress):
        held = layout.region(position, shape).numel * itemsize
        if any(taker == position for _, taker in made.relayed):
            assert held <= received <= held * contributions  # what is passed on has been combined
        else:
            assert received == held * contributions
        assert sum(size for (_, taker), size in made.pairs.items() if taker == position) == held * contributions
    assert made.total == sum(made.ingress) == sum(made.egress) + sum(made.relayed.values()) == sum(made.host_pairs.values())
    assert sum(made.egress) == sum(made.direct.values())
    assert made.total == made.same_agent + made.same_host + made.between_hosts
    assert made.between_hosts == sum(made.host_egress.values()) == sum(made.host_ingress.values())
    assert made.largest == max(made.egress)
    assert made.balance >= 1.0
    assert made.seconds * 1000 == pytest.approx(max(*made.host_egress.values(), *made.host_ingress.values()))
    assert bool(made.hops) == bool(made.total)
    assert (made.hops > 1) == (made.relays > 0) == bool(made.relayed)
    assert json.loads(json.dumps(made.as_dict()))["bytes"] == made.total


def test_what_leaves_its_agent_and_its_host() -> None:
    source = Side(Layout.decode("4: S0"), (0, 1, 2, 3), ("a", "a", "b", "b"))
    target = Side(Layout.decode("2: R"), (1, 7), ("a", "b"))
    made = explain(plan(source, target, (8, 2)), dtype="float32", bandwidth=8.0)
    # 16 bytes from each source to each target. Agent 1 keeps its own; agents 0, 2 and 3 have a target on their host.
    assert made.pairs == {(giver, taker): 16 for giver in range(4) for taker in range(2)}
    assert (made.same_agent, made.same_host, made.between_hosts) == (16, 48, 64)
    assert made.host_egress == {"a": 32, "b": 32}
    assert made.host_ingress == {"a": 32, "b": 32}
    assert made.host_pairs == {("a", "a"): 32, ("a", "b"): 32, ("b", "a"): 32, ("b", "b"): 32}
    assert made.busiest == ("a", "out", 32)
    assert made.seconds == 4.0
    assert (made.egress, made.ingress) == ((32,) * 4, (64, 64))
    assert (made.routes, made.boxes) == (8, 8)


def test_all_contributors_to_a_partial_give() -> None:
    made = explain("2x2: P(sum),S0", "2: S0", (4, 4), 2)
    assert made.egress == (16, 16, 16, 16)
    assert made.routes == 2
    assert made.total == 2 * 4 * 4 * 2


def test_an_uneven_load_shows() -> None:
    made = explain("4: S0", "1: R", (6,), 1)
    assert made.egress == (2, 2, 2, 0)
    assert (made.largest, made.mean) == (2, 1.5)
    assert made.balance == pytest.approx(4 / 3)


def test_nothing_to_move() -> None:
    made = explain("2: S0", "2: R", (0, 4))
    assert (made.total, made.hops, made.seconds, made.balance) == (0, 0, 0.0, 1.0)


def test_an_explanation_is_frozen() -> None:
    made: Explanation = explain("2: S0", "2: R", (4,))
    with pytest.raises(dataclasses.FrozenInstanceError):
        made.itemsize = 4  # type: ignore[misc]
    assert made == explain("2: S0", "2: R", "4")


def test_json_says_it_all() -> None:
    data = explain("2: S0", "1: R", (4,), "float32", gpus_per_host=2, bandwidth=16).as_dict()
    assert data == {
        "source": {"layout": "2: S0", "agents": [0, 1], "hosts": ["host0", "host0"]},
        "target": {"layout": "1: R", "agents": [2], "hosts": ["host1"]},
        "shape": [4],
        "itemsize": 4,
        "bytes": 16,
        "bytes_same_agent": 0,
        "bytes_same_host": 0,
        "bytes_between_hosts": 16,
        "routes": 2,
        "boxes": 2,
        "pairs": [{"source": 0, "target": 0, "bytes": 8}, {"source": 1, "target": 0, "bytes": 8}],
        "relayed": [],
        "egress": [8, 8],
        "ingress": [16],
        "largest_egress": 8,
        "mean_egress": 8.0,
        "balance": 1.0,
        "hosts": {"host0": {"egress": 16, "ingress": 0}, "host1": {"egress": 0, "ingress": 16}},
        "hops": 1,
        "relays": 0,
        "bandwidth": 16.0,
        "seconds": 1.0,
        "busiest_link": {"host": "host0", "direction": "out", "bytes": 16},
    }


def test_what_several_hosts_want_leaves_once() -> None:
    source = Side(Layout.decode("1: R"), (0,), ("a",))
    target = Side(Layout.decode("4: R"), (1, 2, 3, 4), ("b", "b", "c", "d"))
    made = explain(plan(source, target, (8,)), dtype="float32", bandwidth=8.0)
    assert made.direct == {(0, 0): 32}
    assert made.relayed == {(0, 1): 32, (0, 2): 32, (2, 3): 32}
    assert made.pairs == {(0, taker): 32 for taker in range(4)}
    assert made.host_egress == {"a": 32, "b": 32, "c": 32, "d": 0}
    assert made.host_ingress == {"a": 0, "b": 32, "c": 32, "d": 32}
    assert (made.same_host, made.between_hosts, made.total) == (32, 96, 128)
    assert (made.hops, made.relays, made.seconds) == (3, 2, 4.0)
    assert {"hops": 3, "relays": 2}.items() <= made.as_dict().items()
    assert "3 hops at most; 2 targets pass on 96 B to 3 others: 0 → 1, 0 → 2, 2 → 3" in " ".join(str(made).split())
