"""Who holds a version: said beside the transfers, read by a client that takes no part in them, true of those that died."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch.distributed.tensor import Shard

from etha_ray.errors import BatchTornError, ConfigError, StoreUnavailableError
from etha_ray.kvstore import MemoryStore
from etha_ray.tensor_bus.batch_handler import BatchHandler
from etha_ray.tensor_bus.client import TensorBusClient
from etha_ray.tensor_bus.jobs import Jobs
from etha_ray.tensor_bus.records import AgentRecord, MemberRecord, ReplicaRecord, decode
from etha_ray.tensor_bus.registered import Membership, Registered
from etha_ray.tensor_bus.replicas import Replicas
from etha_ray.testing import eventually, succeed
from tests.tensor_bus import cluster as acts
from tests.tensor_bus.cluster import LONG, LocalCluster, local_cluster, process_cluster
from tests.tensor_bus.test_atomic import Stopping, give_up_when_it_is_read


@pytest.fixture(scope="module")
def transport() -> Stopping:
    return Stopping()


@pytest.fixture(scope="module")
def cluster(transport: Stopping) -> Iterator[LocalCluster]:
    with local_cluster(mapped=transport) as made:
        yield made


def ranks(client: TensorBusClient, pair: str, version: int, batch_id: str | None = None) -> dict[str, tuple[int, ...]]:
    return {replica.name: replica.ranks for replica in client.ready_replicas(pair, version, batch_id, timeout=LONG)}


def test_ranks_become_ready_one_by_one(cluster: LocalCluster) -> None:
    router = cluster.client(0)
    source, targets = cluster.side("trainer", "engine", [0], None, None)[0], cluster.side("engine", "trainer", [1, 0], (2,), [Shard(0)])
    sides = [source, *targets]
    succeed(*[lambda side=side: side.join("p") for side in sides])
    whole = torch.arange(8.0)
    send, *recv = succeed(*[lambda side=side: side.client.register_tensors("x", [(side.cut(whole), "p")], timeout=LONG) for side in sides])
    assert router.ready_replicas("p", 1) == []
    sent = send.transfer("send", version=3)
    recv[1].transfer("recv").result(LONG)
    eventually(lambda: ranks(router, "p", 3) == {"engine": (1,)})
    (replica,) = router.ready_replicas("p", 2)
    assert (replica.size, replica.complete) == (2, False)
    member = replica.members[0]
    assert (member.index, member.version, member.agent_rank) == (1, 3, 0)
    recv[0].transfer("recv").result(LONG)
    sent.result(LONG)
    eventually(lambda: [replica.complete for replica in router.ready_replicas("p", 3)] == [True])
    assert ranks(router, "p", 4) == ranks(router, "other", 1) == ranks(router, "p", 3, "other") == {}
    assert ranks(router, "p", 3, "x") == {"engine": (0, 1)}
    recv[0].close()
    assert ranks(router, "p", 3) == {"engine": (1,)}  # taken off before the close is answered
    recv[1].client.close()
    assert ranks(router, "p", 3) == {}
    with pytest.raises(ConfigError, match="is not an integer from 1"):
        router.ready_replicas("p", 0)


@pytest.mark.parametrize("atomic", [False, True])
def test_what_is_being_written_or_torn_is_taken_off_and_what_is_only_read_is_not(
    cluster: LocalCluster, transport: Stopping, atomic: bool
) -> None:
    transport.again()
    name = f"written {atomic}"
    router, (first, second, _, _) = cluster.client(1), cluster.batch(batch_id=name)
    pair = f"pair of {name}"
    sent = first.transfer("send")
    second.transfer("recv").result(LONG)
    sent.result(LONG)
    eventually(lambda: ranks(router, pair, 1) == {"b": (0,)})
    transport.again(1)
    got = second.transfer("recv", atomic=atomic)
    give_up_when_it_is_read(cluster, transport, first)
    if atomic:
        assert ranks(router, pair, 1) == {"b": (0,)}
        transport.open.set()
    else:
        eventually(lambda: ranks(router, pair, 1) == {})
        transport.open.set()
        with pytest.raises(BatchTornError):
            got.result(LONG)
        assert ranks(router, pair, 1) == {}
        got = second.transfer("recv")
    first.transfer("send")
    assert got.result(LONG).version == 3  # 2 was given up
    eventually(lambda: ranks(router, pair, 3) == {"b": (0,)})


def test_of_several_batches_the_lowest_counts(cluster: LocalCluster, transport: Stopping) -> None:
    transport.again()
    one, two = cluster.pair("q")
    handlers: dict[str, list[BatchHandler]] = {}
    for batch_id in ("base", "head"):
        handlers[batch_id] = succeed(
            *[lambda c=c, b=batch_id: c.register_tensors(b, [(torch.zeros(3), "q")], timeout=LONG) for c in (one, two)]
        )
    for batch_id, version in (("base", 5), ("head", 4)):
        first, second = handlers[batch_id]
        first.transfer("send", version=version)
        second.transfer("recv").result(LONG)
    for batch_id, version in (("base", 5), ("head", 4)):  # each is said by itself, a moment after it was received
        eventually(lambda b=batch_id, v=version: ranks(one, "q", v, b) == {"b": (0,)})  # type: ignore[misc]
    assert ranks(one, "q", 4) == {"b": (0,)}
    assert ranks(one, "q", 5) == {}
    assert one.ready_replicas("q", 4)[0].members[0].version == 4


@pytest.mark.parametrize("victim", ["worker", "agent"])
def test_a_dead_replica_is_not_listed(victim: str) -> None:
    with process_cluster(2) as cluster:
        source, target, router = cluster.worker(), cluster.worker(), cluster.client(0)
        for worker, rank in ((source, 0), (target, 1)):
            worker.call(acts.connect, rank, cluster.paths[rank])
        for start in (
            lambda worker, name, other: worker.start(acts.join_pair, "p", name, other, 1, None, None),
            lambda worker, name, _: worker.start(acts.register, "x", [(torch.ones(3), "p")]),
            lambda worker, name, _: worker.start(acts.transfer, "x", "send" if name == "a" else "recv"),
        ):
            for worker, name, other in ((source, "a", "b"), (target, "b", "a")):
                start(worker, name, other)
            for worker in (source, target):
                worker.result()
        eventually(lambda: ranks(router, "p", 1) == {"b": (0,)})
        cluster.kill(target.pid if victim == "worker" else cluster.pids[1])
        eventually(lambda: ranks(router, "p", 1) == {})
        assert not cluster.master.list("replica/")
        router.close()


class Away(MemoryStore):
    """A store that cannot be reached for a while."""

    away = False

    def __init__(self, namespace: str) -> None:
        super().__init__(namespace)
        self.refused = threading.Event()

    def set_bytes(self, key: str, data: bytes, *, component: str | None = None) -> None:
        if self.away:
            self.refused.set()
            raise StoreUnavailableError("the store is away")
        super().set_bytes(key, data, component=component)


def test_what_cannot_be_said_is_said_later_and_of_many_changes_the_last(tmp_path: Any) -> None:
    store = Away(str(tmp_path))
    woken = threading.Event()
    jobs = Jobs(woken.set)
    outcomes: Any = None
    replicas = Replicas(store, jobs, outcomes)
    agent = AgentRecord(0, "incarnation", 1, 0.0, "host", "host", "", "", "", "", "cpu")
    record = MemberRecord("attempt", "b", "a", 1, None, 0, "client", 1, 0.0, agent)

    class Holder:
        batch_id = "x"
        registered = Registered(memberships=(Membership("p", record, 0, 1),))

    member: Any = Holder()
    written: list[bytes] = []
    original = store._set
    store._set = lambda full, data: (written.append(data), original(full, data))[1]  # type: ignore[method-assign]

    def run_until(condition: Callable[[], bool]) -> None:
        def step() -> bool:
            jobs.run(jobs.take())
            return condition()

        eventually(step)

    store.away = True
    for version in (1, 2, 0, 3):
        replicas.holds(member, version)
    assert store.refused.wait(LONG)
    assert not written
    store.away = False
    run_until(lambda: bool(store.list("replica/")))
    assert [decode(data, ReplicaRecord, "").version for data in written] == [3]
    dropped = threading.Event()
    replicas.drop(member, dropped.set)
    run_until(dropped.is_set)
    assert store.list("replica/") == {}
    jobs.close()
    store.close()
