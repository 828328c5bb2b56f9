"""The network transport under the contract of one-sided transports: all sources are read through a socket."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest

from etha_ray.transport import OneSidedTransport
from tests.contracts.transport import OneSidedTransportContract
from tests.net.through import ThroughTheNetwork


class TestNetwork(OneSidedTransportContract):
    @pytest.fixture
    def transport(self) -> Iterator[OneSidedTransport]:
        with contextlib.closing(ThroughTheNetwork({}, {"streams": 3})) as transport:
            yield transport


class TestNetworkOneStream(OneSidedTransportContract):
    @pytest.fixture
    def transport(self) -> Iterator[OneSidedTransport]:
        with contextlib.closing(ThroughTheNetwork({}, {"streams": 1})) as transport:
            yield transport
