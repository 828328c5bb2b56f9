"""The communicators of the tests keep the contract that NCCL keeps (tests/gpu/test_gpu_nccl.py)."""

from __future__ import annotations

from tests.contracts.communicator import CommunicatorContract


class TestRecording(CommunicatorContract):
    kind = "recording"
