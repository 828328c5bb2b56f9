"""What tests of the network transport have in common."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest

from tests.net.pair import Pair, Relay


@pytest.fixture
def pair() -> Iterator[Pair]:
    """An owner and a reader."""
    with contextlib.closing(Pair()) as pair:
        yield pair


@pytest.fixture
def relay(pair: Pair) -> Iterator[Relay]:
    """A way to the owner that can be slowed down, cut, or turn bits."""
    with contextlib.closing(Relay(pair.address)) as relay:
        yield relay
