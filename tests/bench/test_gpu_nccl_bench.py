"""The NCCL part of ``bench gpu`` at a tiny size, without a GPU: what it gives, and that nothing is left."""

from __future__ import annotations

import multiprocessing
import threading
from collections.abc import Callable

import pytest
import torch

from etha_ray.bench.gpu_nccl import nccl_figures
from etha_ray.bench.workload import model
from etha_ray.testing import eventually
from etha_ray.transport.nccl.communicator import SENDER
from tests.accelerator.lanes import QueuedAccelerator
from tests.transport.nccl.recording import RecordingCommunicators

KIT = f"{__name__}:RecordingKit"


class RecordingKit:
    def __init__(self) -> None:
        self.accelerator = QueuedAccelerator()
        self.communicators = RecordingCommunicators()

    def raw(self, unique_id: bytes, rank: int) -> Callable[[torch.Tensor], None]:
        communicator, lane = self.communicators.join(unique_id, rank), self.accelerator.lane()
        eventually(communicator.ready)

        def move(tensor: torch.Tensor) -> None:
            call = communicator.send if rank == SENDER else communicator.receive
            call([(tensor.data_ptr(), tensor.nbytes)], lane)
            eventually(communicator.ready)
            lane.wait()

        return move


def test_figures_and_ratios() -> None:
    before = set(threading.enumerate())
    figures, ratios = nccl_figures(2, "tiny", model("tiny", 2, 2, "bfloat16"), KIT)
    values = {each.name: each.value for each in (*figures, *ratios)}
    assert all(value > 0 for value in values.values())
    assert values["nccl_tiny_raw"] == pytest.approx(values["nccl_tiny_gb_per_s"] / values["nccl_tiny_raw_gb_per_s"])
    assert [ratio.reach for ratio in ratios] == [0.90, None]
    assert not multiprocessing.active_children()
    eventually(lambda: set(threading.enumerate()) <= before)
