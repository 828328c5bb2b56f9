"""Ranks taken together."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from etha_ray.explanation.groups import grouped, ranges
from etha_ray.layout import Layout
from etha_ray.plan import Side


def side(hosts: list[str]) -> Side:
    return Side(Layout.whole(len(hosts)), tuple(range(len(hosts))), tuple(hosts))


def test_few_ranks_have_a_row_each() -> None:
    found = grouped(side(["a", "a", "b"]), 3)
    assert (found.unit, found.labels, found.of, found.by_rank) == ("rank", ("0", "1", "2"), (0, 1, 2), True)


def test_then_hosts_do() -> None:
    found = grouped(side(["a", "b", "a", "b"]), 3)
    assert (found.unit, found.labels, found.of, found.by_rank) == ("host", ("a", "b"), (0, 1, 0, 1), False)


@pytest.mark.parametrize(
    ("hosts", "labels"),
    [
        (["host0", "host1", "host2", "host3", "host4"], ("host0–1", "host2–3", "host4")),
        (["red", "green", "blue", "grey"], ("red – green", "blue – grey")),
        (["10.0.0.9", "10.0.0.12", "10.0.1.1", "10.0.1.2"], ("10.0.0.9–12", "10.0.1.1–2")),
        (["7", "8", "9", "10"], ("7–8", "9–10")),
    ],
)
def test_then_several_hosts_at_a_time(hosts: list[str], labels: tuple[str, ...]) -> None:
    found = grouped(side([host for host in hosts for _ in range(2)]), len(labels))
    assert found.unit == "2 hosts"
    assert found.labels == labels


@given(st.lists(st.sampled_from("abcdefghij"), min_size=1, max_size=40), st.integers(1, 12))
def test_never_more_than_the_limit_and_nobody_is_lost(hosts: list[str], limit: int) -> None:
    found = grouped(side(hosts), limit)
    assert len(found.labels) <= limit
    assert set(found.of) == set(range(len(found.labels)))
    pairs = {(position, position): 1 for position in range(len(hosts))}
    assert sum(found.sums(found, pairs).values()) == len(hosts)


def test_ranges() -> None:
    assert ranges([0, 1, 2, 5, 7, 8]) == "0–2, 5, 7–8"
    assert ranges([3]) == "3"
    assert ranges([]) == ""
