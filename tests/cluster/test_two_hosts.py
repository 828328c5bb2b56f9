"""Transfers between hosts that share no memory, and what happens when one of them dies or the cable is cut."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.distributed.tensor import Partial, Replicate, Shard

from etha_ray.config import FAILURE_TIMEOUT
from etha_ray.errors import BatchTornError, EthaRayError, PeerLostError
from etha_ray.layout import MeshSpec
from etha_ray.tensor_bus.records import agent_key
from etha_ray.testing import eventually
from tests.cluster.hosts import TwoHosts, two_hosts
from tests.tensor_bus import cluster as acts
from tests.tensor_bus.cluster import LONG, Worker, local_part


@pytest.fixture
def hosts() -> Iterator[TwoHosts]:
    with two_hosts(near=2, far=2) as hosts:
        yield hosts


Placements = list[Any]


class _Side:
    """One side of a pair: a worker on each of these agents, on a mesh of one dimension."""

    def __init__(self, hosts: TwoHosts, name: str, other: str, ranks: list[int], placements: Placements) -> None:
        self.name, self.other, self.placements = name, other, placements
        self.specs = [MeshSpec((len(ranks),), (index,)) for index in range(len(ranks))]
        self.workers = [hosts.worker(rank) for rank in ranks]

    def part(self, whole: torch.Tensor, index: int) -> torch.Tensor:
        if isinstance(self.placements[0], Partial):
            return whole * (index + 1)
        return local_part(whole, self.specs[index], self.placements)

    def register(self, batch: str, wholes: list[torch.Tensor], *, join: bool = True) -> None:
        for index, worker in enumerate(self.workers):
            tensors = [(self.part(whole, index).contiguous(), "pair") for whole in wholes]
            worker.start(_join_and_register if join else acts.register, *self._joining(index) if join else (), batch, tensors)

    def _joining(self, index: int) -> tuple[Any, ...]:
        return "pair", self.name, self.other, len(self.workers), self.specs[index], self.placements

    def transfer(self, batch: str, direction: str) -> None:
        for worker in self.workers:
            worker.start(acts.transfer, batch, direction)

    def results(self, timeout: float = 3 * LONG) -> list[Any]:
        return [worker.result(timeout) for worker in self.workers]

    def outcomes(self) -> list[Any]:
        return [_outcome(worker) for worker in self.workers]


def _outcome(worker: Worker) -> Any:
    try:
        return worker.result(3 * LONG)
    except EthaRayError as error:
        return error


def _join_and_register(state: dict[str, Any], pair: str, name: str, other: str, size: int, spec: Any, placements: Any, *batch: Any) -> None:
    acts.join_pair(state, pair, name, other, size, spec, placements)
    acts.register(state, *batch)


def _send(source: _Side, target: _Side, batch: str = "batch") -> None:
    source.transfer(batch, "send")
    target.transfer(batch, "recv")
    source.results()
    target.results()


def _filled(side: _Side, batch: str, add: float) -> None:
    for worker in side.workers:
        worker.call(acts.fill, batch, add)


WHOLES = [
    torch.arange(7 * 12, dtype=torch.float32).reshape(7, 12),
    torch.arange(300 * 500, dtype=torch.int32).reshape(300, 500),
    torch.randn(1, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16),
]


@pytest.mark.parametrize(
    ("sources", "giving", "targets", "taking"),
    [
        ([0, 1], Shard(0), [2, 3], Shard(-1)),
        ([0, 2], Shard(0), [1, 3], Replicate()),
        ([2, 3], Replicate(), [0], Replicate()),
    ],
    ids=["across", "both sides on both hosts", "two to one"],
)
def test_shards_cross(hosts: TwoHosts, sources: list[int], giving: Any, targets: list[int], taking: Any) -> None:
    wholes = [whole for whole in WHOLES if whole.dim() > 1]
    source = _Side(hosts, "a", "b", sources, [giving])
    target = _Side(hosts, "b", "a", targets, [taking])
    source.register("batch", wholes)
    target.register("batch", [torch.zeros_like(whole) for whole in wholes])
    source.results()
    target.results()
    for step in range(3):
        _send(source, target)
        for index, worker in enumerate(target.workers):
            for whole, found in zip(wholes, worker.call(acts.read, "batch"), strict=True):
                assert torch.equal(found, target.part(whole + step, index))
        _filled(source, "batch", 1)
    _filled(target, "batch", 5)
    _send(target, source)  # a pair goes both ways
    for index, worker in enumerate(source.workers):
        for whole, found in zip(wholes, worker.call(acts.read, "batch"), strict=True):
            assert torch.equal(found, source.part(whole + 2 + 5, index))


def test_contributions_of_both_hosts_are_combined(hosts: TwoHosts) -> None:
    source = _Side(hosts, "a", "b", [0, 2, 3], [Partial("sum")])
    target = _Side(hosts, "b", "a", [1, 3], [Shard(0)])
    wholes = [torch.randint(-99, 99, (33, 5)).float(), torch.randint(-9, 9, (4, 1000)).to(torch.bfloat16)]
    source.register("batch", wholes)
    target.register("batch", [torch.zeros_like(whole) for whole in wholes])
    source.results()
    target.results()
    _send(source, target)
    for index, worker in enumerate(target.workers):
        for whole, found in zip(wholes, worker.call(acts.read, "batch"), strict=True):
            assert torch.equal(found, target.part(whole * 6, index))


def _ready(hosts: TwoHosts, whole: torch.Tensor, targets: list[int]) -> tuple[_Side, _Side]:
    source, target = _Side(hosts, "a", "b", [0], [Replicate()]), _Side(hosts, "b", "a", targets, [Replicate()])
    source.register("batch", [whole])
    target.register("batch", [torch.zeros_like(whole)])
    source.results()
    target.results()
    _send(source, target)
    return source, target


@pytest.mark.parametrize("victim", ["agent", "worker"])
def test_a_death_over_there_is_told_and_another_takes_the_place(hosts: TwoHosts, victim: str) -> None:
    whole = torch.arange(100_000.0)
    source, target = _ready(hosts, whole, [2])
    source.transfer("batch", "send")
    if victim == "agent":
        hosts.agents[2].kill()
        hosts.agents[2].join()
    else:
        os.kill(target.workers[0].pid, signal.SIGKILL)
    assert isinstance(source.outcomes()[0], PeerLostError)
    source.workers[0].call(acts.close_batch, "batch")
    if victim == "agent":
        hosts.restart(2)
        hosts.workers.remove(target.workers[0])
        target.workers[0].process.kill()
    again = _Side(hosts, "b", "a", [2], [Replicate()])
    source.register("batch", [whole])
    again.register("batch", [torch.zeros_like(whole)])
    assert source.outcomes() == again.outcomes() == [None]
    _send(source, again)
    assert torch.equal(again.workers[0].call(acts.read, "batch")[0], whole)


def test_a_cable_that_is_cut_is_noticed_on_both_sides(hosts: TwoHosts) -> None:
    source, target = _ready(hosts, torch.arange(1000.0), [2])
    source.transfer("batch", "send")
    hosts.cable.cut("near")
    assert isinstance(source.outcomes()[0], PeerLostError)
    target.transfer("batch", "recv")
    assert isinstance(target.outcomes()[0], (PeerLostError, BatchTornError))
    hosts.cable.mend("near")  # agents that end need not give up the other host first


def test_a_cut_that_heals(hosts: TwoHosts) -> None:
    """Both sides are on both hosts. Everybody is told in seconds, and goes on with what it has once the hosts see one another again."""
    whole = torch.arange(1000.0)
    source, target = _Side(hosts, "a", "b", [0, 2], [Shard(0)]), _Side(hosts, "b", "a", [1, 3], [Replicate()])
    source.register("batch", [whole])
    target.register("batch", [torch.zeros_like(whole)])
    assert source.outcomes() == target.outcomes() == [None, None]
    _send(source, target)
    hosts.cable.cut("far")
    source.transfer("batch", "send")
    target.transfer("batch", "recv")
    assert {type(outcome) for outcome in source.outcomes() + target.outcomes()} <= {PeerLostError, BatchTornError}
    # Until the leases of the agents over there have run out, and those here, that look for them all the time, have seen it, too.
    eventually(lambda: not any(hosts.master.exists(agent_key(rank)) for rank in (2, 3)))
    time.sleep(1.5 * FAILURE_TIMEOUT)
    hosts.cable.mend("far")
    for worker in source.workers + target.workers:
        worker.start(acts.wait_ready, "batch")
    assert source.outcomes() == target.outcomes() == [None, None]
    _filled(source, "batch", 1)
    _send(source, target)
    for worker in target.workers:
        assert torch.equal(worker.call(acts.read, "batch")[0], whole + 1)


def _begin(state: dict[str, Any]) -> None:
    state["semaphore"] = state["handlers"]["batch"].transfer("recv")


def _has_begun(state: dict[str, Any]) -> bool:
    return bool(state["tensors"]["batch"][0].any())


def _end(state: dict[str, Any]) -> Any:
    return state["semaphore"].result(LONG)


def test_an_agent_that_stands_still_during_a_transfer_and_goes_on_later(hosts: TwoHosts) -> None:
    whole = torch.ones(10_000_000)
    source, target = _Side(hosts, "a", "b", [2], [Replicate()]), _Side(hosts, "b", "a", [0], [Replicate()])
    source.register("batch", [whole])
    target.register("batch", [torch.zeros_like(whole)])
    assert source.outcomes() == target.outcomes() == [None]
    hosts.cable.slow_down(megabits=10)  # half a minute for all of it
    sender, receiver = source.workers[0], target.workers[0]
    sender.start(acts.transfer, "batch", "send")
    receiver.call(_begin)
    eventually(lambda: receiver.call(_has_begun))
    os.kill(hosts.agents[2].pid, signal.SIGSTOP)
    try:
        with pytest.raises(BatchTornError):
            receiver.call(_end)
    finally:
        os.kill(hosts.agents[2].pid, signal.SIGCONT)
    hosts.cable.slow_down(megabits=1000)
    assert isinstance(_outcome(sender), EthaRayError)
    again = torch.arange(1000.0)
    source, target = _Side(hosts, "c", "d", [2], [Replicate()]), _Side(hosts, "d", "c", [0], [Replicate()])
    source.register("again", [again])
    target.register("again", [torch.zeros_like(again)])
    assert source.outcomes() == target.outcomes() == [None]
    _send(source, target, "again")
    assert torch.equal(target.workers[0].call(acts.read, "again")[0], again)
