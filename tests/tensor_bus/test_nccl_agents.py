"""Agents whose tensors go from device to device by communicators. The devices are the CPU, and what the communicators do is recorded."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest
import torch
from torch.distributed.tensor import Shard

from etha_ray.errors import BatchTornError, IntegrityError
from etha_ray.tensor_bus.pinned import Pinned
from etha_ray.testing import succeed, together
from tests.accelerator.lanes import QueuedAccelerator
from tests.tensor_bus.cluster import LONG
from tests.tensor_bus.far import Agents
from tests.transport.nccl.recording import RecordingCommunicators


class Devices:
    """``communicators`` are the agents', in the order in which these were started."""

    def __init__(self) -> None:
        self.communicators: list[RecordingCommunicators] = []

    def next(self) -> RecordingCommunicators:
        self.communicators.append(RecordingCommunicators())
        return self.communicators[-1]

    @property
    def sent(self) -> int:
        """Bytes that were sent from device to device."""
        return sum(sum(group) for each in self.communicators for group in each.groups[0])


@pytest.fixture
def devices(monkeypatch: pytest.MonkeyPatch) -> Devices:
    found = Devices()
    monkeypatch.setattr(Pinned, "accelerator", property(lambda _: QueuedAccelerator()))
    monkeypatch.setattr(Pinned, "communicators", lambda _: found.next())
    return found


@pytest.fixture
def cluster(devices: Devices) -> Iterator[Agents]:
    with contextlib.closing(Agents("auto", transport="nccl")) as cluster:
        yield cluster


def test_shards_cross_cast_and_whole(cluster: Agents, devices: Devices) -> None:
    """Rows of float32 to columns of bfloat16, several times."""
    whole = torch.randn(257, 66)
    givers = cluster.side("a", "b", [0, 1], (2,), [Shard(0)])
    takers = cluster.side("b", "a", [0, 1], (2,), [Shard(1)])
    succeed(*[side.join for side in (*givers, *takers)])
    sources = [side.cut(whole) for side in givers]
    targets = [side.cut(whole).bfloat16().zero_() for side in takers]
    calls = [
        lambda side=side, tensor=tensor: side.client.register_tensors("x", [(tensor, "pair")], timeout=LONG)
        for side, tensor in zip((*givers, *takers), (*sources, *targets), strict=True)
    ]
    handles = succeed(*calls)
    before = devices.sent
    for _ in range(3):
        for source in sources:
            source.mul_(1.25)
        receives = [handle.transfer("recv") for handle in handles[2:]]
        succeed(*[lambda handle=handle: handle.transfer("send").result(LONG) for handle in handles[:2]])
        assert {each.result(LONG).version for each in receives} == {handles[0].version}
        expected = torch.cat(sources).bfloat16()
        assert torch.equal(torch.cat(targets, dim=1), expected)
    assert devices.sent - before == 3 * 2 * 33 * (129 + 128)  # as bfloat16; what both sides have at one agent is copied there


def test_what_changed_on_its_way_is_noticed(cluster: Agents, devices: Devices) -> None:
    first, second, source, target = cluster.batch(torch.arange(5000.0))
    devices.communicators[0].flip = 0
    sent = first.transfer("send")
    with pytest.raises(IntegrityError, match=r"tensor 0 of batch 'batch'.*a\[0\] at agent 0 to b\[0\] at agent 1"):
        second.transfer("recv").result(LONG)
    assert second.torn == (0,)
    assert second.transfer("recv").result(LONG).version == 1
    sent.result(LONG)
    assert torch.equal(source, target)
    assert second.torn == ()


def test_a_communicator_that_fails_is_replaced(cluster: Agents, devices: Devices) -> None:
    first, second, source, target = cluster.batch()
    receiver = devices.communicators[1]
    made = len(receiver.made)
    for each in receiver.made:  # one for each direction, in any order
        each.error = "unhandled system error"
    sent = first.transfer("send")
    with pytest.raises(BatchTornError, match="unhandled system error"):
        second.transfer("recv").result(LONG)
    second.transfer("recv").result(LONG)  # by a new one
    sent.result(LONG)
    assert torch.equal(source, target)
    assert len(receiver.made) > made


def test_an_agent_that_ends_while_its_messages_wait(cluster: Agents, devices: Devices) -> None:
    first, second, _, _ = cluster.batch()
    for each in devices.communicators:
        each.stands_still.set()
    calls = first.transfer("send"), second.transfer("recv")
    assert devices.communicators[1].stood_still.wait(LONG)
    cluster.agents[0].stop()
    outcomes = together(*[lambda call=call: call.result(LONG) for call in calls])
    assert all(isinstance(outcome, ConnectionError | RuntimeError) for outcome in outcomes), outcomes
