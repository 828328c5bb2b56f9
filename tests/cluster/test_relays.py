"""What targets on several hosts want leaves the source's host once, and they pass it on; also when one of them dies or does not come."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.distributed.tensor import Partial, Replicate

from etha_ray.errors import AgentDiedError, BatchTornError
from etha_ray.tensor_bus.inspection import inspect_agent
from etha_ray.testing import eventually
from tests.cluster.hosts import ManyHosts, many_hosts
from tests.cluster.test_two_hosts import _Side
from tests.tensor_bus import cluster as acts
from tests.tensor_bus.cluster import LONG

WHOLE = torch.arange(4 << 20, dtype=torch.float32)
"""16 MiB."""


@pytest.fixture(scope="module")
def shared() -> Iterator[ManyHosts]:
    """The source's, one with an agent, one with two, and one with one."""
    with many_hosts(1, 1, 2, 1, patient=True) as hosts:
        yield hosts


@pytest.fixture
def hosts(shared: ManyHosts) -> Iterator[ManyHosts]:
    yield shared
    for worker in shared.workers:
        worker.close()
    shared.workers.clear()


def _ready(hosts: ManyHosts, targets: list[int]) -> tuple[_Side, _Side]:
    source, target = _Side(hosts, "a", "b", [0], [Replicate()]), _Side(hosts, "b", "a", targets, [Replicate()])
    source.register("batch", [1 + WHOLE])
    target.register("batch", [torch.zeros_like(WHOLE)])
    assert source.outcomes() + target.outcomes() == [None] * (1 + len(targets))
    return source, target


def _left(hosts: ManyHosts) -> int:
    return sum(cable.sent_here() for cable in hosts.cables)


def _receive(target: _Side, *members: int, atomic: bool = False) -> None:
    for member in members:
        target.workers[member].start(_recv, atomic)


def _recv(state: dict[str, Any], atomic: bool) -> Any:
    return state["handlers"]["batch"].transfer("recv", blocking=True, timeout=LONG, atomic=atomic).result(0)


@pytest.mark.parametrize("atomic", [False, True])
def test_it_leaves_once_for_three_hosts(hosts: ManyHosts, atomic: bool) -> None:
    source, target = _ready(hosts, [1, 2, 3, 4])
    for step in (1, 2):
        before = _left(hosts)
        _receive(target, 3, 1, 2, 0, atomic=atomic)  # those wait for the first
        source.transfer("batch", "send")
        reports = [worker.result(3 * LONG) for worker in target.workers]
        source.results()
        assert WHOLE.nbytes <= _left(hosts) - before < 1.2 * WHOLE.nbytes
        assert [report.peers for report in reports] == [{name: WHOLE.nbytes} for name in ("a[0]", "b[0]", "b[1]", "b[1]")]
        for worker in target.workers:
            assert torch.equal(worker.call(acts.read, "batch")[0], WHOLE + step)
        source.workers[0].call(acts.fill, "batch", 1)


def test_nobody_waits_for_ever_for_one_that_does_not_come() -> None:
    with many_hosts(1, 1, 2) as hosts:
        source, target = _ready(hosts, [1, 2, 3])
        source.transfer("batch", "send")
        for member in (2, 0, 1):  # one after the other: each is over before the next begins
            _receive(target, member)
            assert target.workers[member].result(3 * LONG).peers == {"a[0]": WHOLE.nbytes}
            assert torch.equal(target.workers[member].call(acts.read, "batch")[0], 1 + WHOLE)
        source.results()


def test_contributions_are_combined_once_and_the_result_is_passed_on(hosts: ManyHosts) -> None:
    source, target = _Side(hosts, "a", "b", [0, 1], [Partial("sum")]), _Side(hosts, "b", "a", [2, 4], [Replicate()])
    source.register("batch", [WHOLE])
    target.register("batch", [torch.zeros_like(WHOLE)])
    assert source.outcomes() + target.outcomes() == [None] * 4
    before = _left(hosts)
    _receive(target, 1, 0)
    source.transfer("batch", "send")
    target.results()
    source.results()
    assert WHOLE.nbytes <= _left(hosts) - before < 1.2 * WHOLE.nbytes
    for worker in target.workers:
        assert torch.equal(worker.call(acts.read, "batch")[0], 3 * WHOLE)


def test_it_is_passed_on_while_more_of_it_comes(hosts: ManyHosts) -> None:
    wholes = [1 + WHOLE.repeat(3).reshape(-1, 1024), 1 + torch.arange(5.0)]  # three stages of one tensor
    source, target = _Side(hosts, "a", "b", [4], [Replicate()]), _Side(hosts, "b", "a", [0, 1], [Replicate()])
    source.register("batch", wholes)
    target.register("batch", [torch.zeros_like(whole) for whole in wholes])
    assert source.outcomes() + target.outcomes() == [None] * 3
    hosts.cables[2].slow_down(megabits=50)  # three seconds for the first stage from the source to the relay, and as many for each other
    relay, reader = target.workers
    for worker, direction in ((relay, "recv"), (reader, "recv"), (source.workers[0], "send")):
        worker.call(acts.start_transfer, "batch", direction)
    eventually(lambda: reader.call(_has_begun))
    assert not relay.call(acts.read, "batch")[0].all()
    hosts.cables[2].slow_down(megabits=1000)
    assert reader.call(_end).peers == {"b[0]": sum(whole.nbytes for whole in wholes)}
    assert relay.call(_end).peers == {"a[0]": sum(whole.nbytes for whole in wholes)}
    for worker in target.workers:
        assert all(torch.equal(*pair) for pair in zip(worker.call(acts.read, "batch"), wholes, strict=True))
    assert source.workers[0].call(_end).version == 1


@pytest.mark.parametrize("ends", ["relay", "source"])
def test_who_goes_while_it_is_passed_on(ends: str) -> None:
    """The relay's agent is killed: the reader goes on with the source. The source goes: that is no success."""
    with many_hosts(1, 1, 1, patient=True) as hosts:
        source, target = _ready(hosts, [1, 2])
        hosts.cables[0].slow_down(megabits=5, device="x0a")  # half a minute from the relay to the reader
        sender, (relay, reader) = source.workers[0], target.workers
        reader.call(acts.start_transfer, "batch", "recv")
        _receive(target, 0)
        sender.call(acts.start_transfer, "batch", "send")
        eventually(lambda: reader.call(_has_begun))
        eventually(lambda: _sends(hosts) == ["b[1] did not receive"])  # the relay has it, and the sender knows
        if ends == "relay":
            hosts.agents[1].kill()
            hosts.agents[1].join()
        else:
            sender.process.kill()
            eventually(lambda: not _sends(hosts))
        hosts.cables[0].slow_down(megabits=1000, device="x0a")
        if ends == "relay":
            assert reader.call(_end).peers == {"a[0]": WHOLE.nbytes}
            assert torch.equal(reader.call(acts.read, "batch")[0], 1 + WHOLE)
            with pytest.raises(AgentDiedError):
                relay.result(3 * LONG)
            assert sender.call(_end).bytes == WHOLE.nbytes
            return
        with pytest.raises(BatchTornError):
            reader.call(_end)
        assert relay.result(3 * LONG).bytes == WHOLE.nbytes, "it had it, and knew that it stood"


def _sends(hosts: ManyHosts) -> list[str]:
    """Whom each send of the first agent waits for, as its state file says."""
    seen = inspect_agent(0, hosts.paths[0])
    batches = seen.status.batches if seen is not None and seen.status is not None else ()
    return [batch.transfer.waits_for for batch in batches if batch.transfer is not None]


def _has_begun(state: dict[str, Any]) -> bool:
    return bool(state["tensors"]["batch"][0].any())


def _end(state: dict[str, Any]) -> Any:
    return state["semaphore"].result(2 * LONG)
