"""The sentences, and the table that goes with them."""

from __future__ import annotations

import pytest
from hypothesis import given, settings

from etha_ray.explanation import explain
from etha_ray.explanation.text import byte_table

from .layouts import Case, cases


def test_all_of_a_small_plan() -> None:
    assert str(explain("2: S0", "4: S1", (1000, 1000), gpus_per_host=2)).splitlines() == [
        "2: S0  →  4: S1, 1000x1000 of 2 bytes an element",
        "moves   2.00 MB in 8 routes, 8 boxes",
        "where   2.00 MB between hosts",
        "source  2 ranks on host0; each gives 1.00 MB",
        "target  4 ranks on 2 hosts, host1 to host2; each receives 500.00 kB",
        "hosts   host0 sends 2.00 MB; host1 receives 1.00 MB, host2 receives 1.00 MB",
        "path    1 hop at most; no relays: every target reads from a holder",
        "time    40 µs, as host0 sends 2.00 MB",
        "        assumes one full-duplex link of 50.00 GB/s a host, all links busy at",
        "        once, and nothing else that limits; copies inside a host are not counted",
        "bytes by source rank (rows) and target rank (columns)",
        "           0          1          2          3",
        "0  250.00 kB  250.00 kB  250.00 kB  250.00 kB",
        "1  250.00 kB  250.00 kB  250.00 kB  250.00 kB",
    ]


def test_within_one_host_no_time_is_made_up() -> None:
    text = str(explain("4: S0", "1: R", (6,), 1))
    assert "where   6 B between agents of one host\n" in text
    assert "hosts   no byte leaves its host\n" in text
    assert "time    none on the network; copies inside a host are not counted\n" in text
    assert "one gives at most 2 B, on average 2 B (balance 1.33)" in text
    assert "assumes" not in text


def test_a_reduction_is_told() -> None:
    assert "each element is the sum of 4 contributions, divided by 2" in str(explain("2x2: P(avg),P(sum)", "1: R", (4,)))


def test_nothing_to_move_is_said() -> None:
    text = str(explain("2: S0", "2: R", (0, 4)))
    assert "nothing has to move" in text
    assert "path    none" in text


@settings(max_examples=80, deadline=None)
@given(cases())
def test_it_fits_a_terminal(case: Case) -> None:
    lines = str(explain(*case, gpus_per_host=4)).splitlines()
    assert max(map(len, lines[1:])) <= 80


@pytest.mark.parametrize("ranks", [(16, 8), (64, 32), (1024, 64)])
def test_the_table_takes_ranks_together_rather_than_growing(ranks: tuple[int, int]) -> None:
    made = explain(f"{ranks[0]}: S0", f"{ranks[1]}: S1", (1024, 1024))
    assert max(map(len, str(made).splitlines())) <= 80
    table = byte_table(made, 80)
    assert table is not None
    assert sum(table.sums.values()) == made.total


def test_a_table_that_cannot_be_made_narrow_enough_is_left_out() -> None:
    made = explain("2: S0", "2: S1", (64, 64))
    assert byte_table(made, 12) is None
    assert byte_table(made, 80) is not None
