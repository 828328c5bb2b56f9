"""What every communicator promises. A test class inherits `CommunicatorContract` and says its ``kind``, see `tests.transport.nccl.far`."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest
import torch

from etha_ray.accelerator import Accelerator, Lane
from etha_ray.errors import CommunicatorError
from etha_ray.testing import eventually
from etha_ray.transport.nccl import Communicator, Communicators
from etha_ray.transport.nccl.communicator import SENDER
from tests.transport.nccl.far import Far, digest, far, made

LARGE = 64 << 20
"""Bytes: more than any buffer on the way takes."""


class CommunicatorContract:
    kind: str

    @pytest.fixture
    def ends(self) -> tuple[Accelerator, Communicators]:
        return made(self.kind)

    @pytest.fixture
    def other(self) -> Iterator[Far]:
        with far(self.kind) as other:
            yield other

    def joined(self, accelerator: Accelerator, communicators: Communicators, other: Far) -> Communicator:
        unique_id = communicators.unique_id()
        other.ask(list(unique_id))
        communicator = communicators.join(unique_id, SENDER)
        eventually(communicator.ready)
        assert other.answer() == "joined"
        # The first group connects the devices, which takes both ends: it is not handed over before the other end has it, too.
        lane, memory = accelerator.lane(alone=True), accelerator.empty(1)
        communicator.send([(memory.data_ptr(), memory.nbytes)], lane)
        other.ask([1])
        eventually(communicator.ready)
        assert other.answer() == digest(memory)
        eventually(lane.done)
        return communicator

    def stuck(self, accelerator: Accelerator, communicator: Communicator) -> tuple[Lane, torch.Tensor]:
        """A lane on which a message waits for the other end, which does not receive."""
        lane, memory = accelerator.lane(alone=True), accelerator.empty(LARGE)
        communicator.send([(memory.data_ptr(), memory.nbytes)], lane)
        eventually(communicator.ready)
        assert not lane.done()
        return lane, memory

    def test_groups_arrive_as_they_were_sent(self, ends: tuple[Accelerator, Communicators], other: Far) -> None:
        accelerator, communicators = ends
        communicator = self.joined(accelerator, communicators, other)
        lanes = [accelerator.lane(alone=True) for _ in range(2)]
        groups = [[1], [256, 3, 1 << 20], [LARGE], [7] * 50, [LARGE, 4096]]
        kept = []
        for number, sizes in enumerate(groups):
            memory = [accelerator.upload(torch.randint(0, 256, (size,), dtype=torch.uint8).numpy()) for size in sizes]
            lane, before = lanes[number % 2], lanes[(number + 1) % 2]
            lane.after(before)
            communicator.send([(each.data_ptr(), each.nbytes) for each in memory], lane)
            eventually(communicator.ready)
            other.ask(sizes)
            kept.append(memory)
        assert [other.answer() for _ in groups] == ["-".join(map(digest, memory)) for memory in kept]
        for lane in lanes:
            eventually(lane.done)
        communicator.abort()

    def test_one_end_alone_is_not_ready_and_can_be_aborted(self, ends: tuple[Accelerator, Communicators]) -> None:
        _, communicators = ends
        communicator = communicators.join(communicators.unique_id(), SENDER)
        assert not any(communicator.ready() for _ in range(100))
        communicator.abort()
        communicator.abort()
        with pytest.raises(CommunicatorError, match="aborted"):
            communicator.ready()

    def test_abort_frees_a_lane_whose_message_nobody_receives(self, ends: tuple[Accelerator, Communicators], other: Far) -> None:
        accelerator, communicators = ends
        communicator = self.joined(accelerator, communicators, other)
        lane, _ = self.stuck(accelerator, communicator)
        communicator.abort()
        lane.wait()
        assert lane.done()
        with pytest.raises(CommunicatorError, match="aborted"):
            communicator.ready()

    def test_abort_frees_a_lane_whose_peer_was_killed(self, ends: tuple[Accelerator, Communicators], other: Far) -> None:
        accelerator, communicators = ends
        communicator = self.joined(accelerator, communicators, other)
        lane, _ = self.stuck(accelerator, communicator)
        other.process.kill()
        other.process.wait()
        with contextlib.suppress(CommunicatorError):  # it may notice by itself
            communicator.ready()
        communicator.abort()
        lane.wait()
        # Another one can be made in the same process.
        again = communicators.join(communicators.unique_id(), SENDER)
        assert not again.ready()
        again.abort()
