"""Devices at both ends, and a communicator between them, under the contract of one-sided transports."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest

from etha_ray.transport import OneSidedTransport
from tests.accelerator.lanes import QueuedAccelerator
from tests.contracts.transport import OneSidedTransportContract
from tests.net.through import ThroughTheNetwork
from tests.transport.nccl.recording import RecordingCommunicators


class TestByCommunicator(OneSidedTransportContract):
    @pytest.fixture
    def transport(self) -> Iterator[OneSidedTransport]:
        owner, reader = ({"accelerator": QueuedAccelerator(), "communicators": RecordingCommunicators(), "path": "nccl"} for _ in range(2))
        with contextlib.closing(ThroughTheNetwork(owner, reader)) as transport:
            yield transport
