from __future__ import annotations

import fnmatch
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from etha_ray.errors import ConfigError, StoreError
from etha_ray.kvstore.keys import added, escape, matcher

NAMES = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=8) | st.text("%/25Fa", min_size=1, max_size=6)
INT64 = st.integers(-(2**63), 2**63 - 1)


@given(NAMES, NAMES, st.text("a/%", max_size=5), NAMES, NAMES, st.text("a/%", max_size=5))
def test_no_two_places_share_a_whole_key(a: str, b: str, c: str, x: str, y: str, z: str) -> None:
    first, second = (f"{escape('namespace', n)}/{escape('component', m)}/{key}" for n, m, key in ((a, b, c), (x, y, z)))
    assert (first == second) == ((a, b, c) == (x, y, z))


@given(NAMES)
def test_no_escaped_name_is_one_of_the_stores_own(name: str) -> None:
    assert re.fullmatch("(?:[^%/]|%25|%2F)+", escape("component", name), re.DOTALL)


@given(st.text("ab*?[]\n", max_size=6), st.text("ab*?[]\n", max_size=8))
def test_only_the_star_is_a_wildcard(pattern: str, key: str) -> None:
    # In fnmatch a bracket around a character makes it plain.
    plain = "".join(f"[{c}]" if c in "?[" else c for c in pattern)
    assert matcher(pattern)(key) == fnmatch.fnmatchcase(key, plain)


@given(INT64, INT64)
def test_added(stored: int, n: int) -> None:
    if -(2**63) <= stored + n < 2**63:
        assert added("k", b"%d" % stored, n) == stored + n
    else:
        with pytest.raises(StoreError, match="64 bits"):
            added("k", b"%d" % stored, n)


def test_missing_counts_as_nothing() -> None:
    assert added("k", None, -3) == -3


@pytest.mark.parametrize("name", ["", 5, None, "\ud800"])
def test_names_that_are_none(name: str) -> None:
    with pytest.raises(ConfigError, match="namespace"):
        escape("namespace", name)
