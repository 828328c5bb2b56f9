"""publish and pull between processes: FSDP2 to tensor-parallel, and deaths on both sides."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

import etha_ray
from actors.sharding import target_placement
from etha_ray.errors import BatchClosedError, PeerLostError, TransferTimeoutError
from etha_ray.testing import eventually, succeed, together
from etha_ray.weights import PushReport, Receiver
from tests.tensor_bus.cluster import LONG, ProcessCluster, Worker, connect, local_part, process_cluster
from tests.tensor_bus.groups import finish
from tests.weights import acts


@pytest.fixture(scope="module")
def cluster() -> Iterator[ProcessCluster]:
    with process_cluster(2) as found:
        yield found


def workers(cluster: ProcessCluster, count: int, first_agent: int = 0) -> list[Worker]:
    found = [cluster.worker() for _ in range(count)]
    for index, worker in enumerate(found):
        rank = (first_agent + index) % len(cluster.paths)
        worker.call(connect, rank, cluster.paths[rank])
    return found


def all_of(group: Sequence[Worker], function: Any, *args: Any) -> list[Any]:
    """Call a function of every worker at once, with its rank and how many there are."""
    for rank, worker in enumerate(group):
        worker.start(function, rank, len(group), *args)
    return finish([group])[0]


def push(senders: Sequence[Worker], receivers: Sequence[Receiver]) -> list[int]:
    """One push; the versions that the receivers then have."""
    for rank, worker in enumerate(senders):
        worker.start(acts.push, rank, len(senders))
    versions = succeed(*[lambda r=r: r.update(LONG) for r in receivers])
    finish([senders])
    return versions


def end(senders: Sequence[Worker], receivers: Sequence[Receiver]) -> None:
    for receiver in receivers:
        receiver.close()
        receiver._member.client.close()
    all_of(senders, acts.close)
    for worker in senders:
        worker.process.kill()  # gloo's threads may abort a process that ends in another way, see tests/actors/gloo.py


def test_fsdp_trains_and_tensor_parallel_receives(cluster: ProcessCluster, tmp_path: Path) -> None:
    trainers = workers(cluster, 2)
    all_of(trainers, acts.publish_trainer, str(tmp_path / "rendezvous"))
    whole = all_of(trainers, acts.train, 0)[0]
    specs = [etha_ray.MeshSpec((4,), (rank,)) for rank in range(4)]
    held = [
        {name: torch.zeros_like(local_part(tensor, spec, [target_placement(name, tensor.shape)])) for name, tensor in whole.items()}
        for spec in specs
    ]

    def pull(rank: int) -> Receiver:
        return etha_ray.pull(
            held[rank],
            "policy",
            mesh=specs[rank],
            placements=lambda name, tensor: target_placement(name, tensor.shape),
            client=cluster.client(rank % 2),
            timeout=LONG,
        )

    generators = succeed(*[lambda r=r: pull(r) for r in range(4)])
    for version in (1, 2):
        whole = all_of(trainers, acts.train, version)[0]
        assert push(trainers, generators) == [version] * 4
        for spec, tensors in zip(specs, held, strict=True):
            for name, tensor in tensors.items():
                assert torch.equal(tensor, local_part(whole[name], spec, [target_placement(name, whole[name].shape)])), name
    end(trainers, generators)


class TestDeaths:
    def test_a_replica_dies_and_is_replaced(self, cluster: ProcessCluster) -> None:
        source, target = torch.zeros(3), torch.zeros(3)
        (doomed,) = workers(cluster, 1)
        one, two = cluster.client(0), cluster.client(1)
        with etha_ray.publish({"w": source}, "plain", client=one) as sender:
            doomed.call(acts.pull_plain, "doomed")
            good = etha_ray.pull({"w": target}, "plain", replica="good", client=two, timeout=LONG)
            eventually(lambda: sender.replicas == ["doomed", "good"])
            pushed = sender.start_push(timeout=LONG)
            eventually(lambda: all(link._busy for link in sender._links.values()))  # it is being sent to both
            cluster.kill(doomed.pid)
            assert good.update(LONG) == 1
            report = pushed.result(LONG)
            assert list(report.replicas) == ["good"]
            assert isinstance(report.failed["doomed"], PeerLostError)
            (again,) = workers(cluster, 1)
            again.call(acts.pull_plain, "doomed")
            eventually(lambda: sender.replicas == ["doomed", "good"])
            again.start(acts.update)
            report, version = succeed(lambda: sender.push(timeout=LONG), lambda: good.update(LONG))
            assert version == again.result() == 2
            assert sorted(report.replicas) == ["doomed", "good"]
            good.close()
            cluster.kill(again.pid)
        one.close()
        two.close()

    @pytest.mark.parametrize("after", [0.0, 0.2, 0.7])
    def test_whoever_leaves_for_a_death_is_not_taken_for_dead(self, after: float, cluster: ProcessCluster) -> None:
        """The first who sees that a rank is gone leaves, and others may hear of that before they hear who died."""
        clients = [cluster.client(0), cluster.client(1), cluster.client(0)]
        (doomed,) = workers(cluster, 1, first_agent=1)
        senders = succeed(
            *[lambda r=r: etha_ray.publish({"w": torch.ones(3)}, "plain", client=clients[r], rank=r, world_size=2) for r in range(2)]
        )
        doomed.start(acts.pull_rank, 1, 2)
        with etha_ray.pull({"w": torch.zeros(3)}, "plain", client=clients[2], rank=0, world_size=2, timeout=LONG) as receiver:
            doomed.result()
            doomed.start(acts.update)
            succeed(*[lambda s=s: s.push(timeout=LONG) for s in senders], lambda: receiver.update(LONG))
            doomed.result()
            cluster.kill(doomed.pid)
            time.sleep(after)
            calls = [lambda s=s: s.push(timeout=3.0) for s in senders] + [lambda: receiver.update(3.0)]
            for error in together(*calls):
                if isinstance(error, TransferTimeoutError):  # it waited for the replica to be whole again
                    assert "ranks [1] of 2 are not there" in str(
                        error
                    ) or "rank 0 has not called push in time, or waits for replicas" in str(error)
                elif not isinstance(error, int | PushReport):  # it may have had its part before
                    assert isinstance(error, PeerLostError)
                    assert re.search(rf"ranks \[1\] of 2 are not there|receiver\[1\] is gone \(worker pid {doomed.pid} died", str(error))
        for sender in senders:
            sender.close()
        for client in clients:
            client.close()

    def test_a_sender_dies_and_is_replaced(self, cluster: ProcessCluster) -> None:
        target, client = torch.zeros(3), cluster.client(1)
        (doomed,) = workers(cluster, 1)
        doomed.call(acts.publish_plain, 1.0)
        with etha_ray.pull({"w": target}, "plain", client=client, timeout=LONG) as receiver:
            assert push([doomed], [receiver]) == [1]
            cluster.kill(doomed.pid)
            with pytest.raises((PeerLostError, BatchClosedError)):
                receiver.update(LONG)
            assert torch.equal(target, torch.full((3,), 1.0))
            (again,) = workers(cluster, 1)
            again.call(acts.publish_plain, 5.0)
            assert push([again], [receiver]) == [1]
            assert torch.equal(target, torch.full((3,), 5.0))
            again.call(acts.close, 0, 1)
        client.close()
