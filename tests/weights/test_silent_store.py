"""publish and pull while the store stands still: what is connected goes on, and who leaves leaves."""

from __future__ import annotations

import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import etha_ray
from etha_ray.config import agent_paths
from etha_ray.errors import StoreUnavailableError
from etha_ray.kvstore import EtcdStore
from etha_ray.tensor_bus import connection
from etha_ray.tensor_bus.agent import TensorBusAgent
from etha_ray.tensor_bus.client import TensorBusClient
from etha_ray.testing import eventually, succeed
from etha_ray.testing.bus import fresh_namespace
from etha_ray.testing.etcd_server import EtcdServer
from tests.tensor_bus.cluster import LONG
from tests.weights.test_publish import sync


@pytest.fixture
def stores(own_etcd: EtcdServer) -> Iterator[list[EtcdStore]]:
    """Of the two agents. They ask a silent etcd for as long as it takes."""
    made = [EtcdStore(own_etcd.host, own_etcd.port) for _ in range(2)]
    for store in made:
        store._client._patience = math.inf
    yield made
    for store in made:
        store.close()


@pytest.fixture
def clients(stores: list[EtcdStore]) -> Iterator[list[TensorBusClient]]:
    namespace = fresh_namespace()
    paths = [agent_paths(rank, namespace) for rank in range(2)]
    agents = [TensorBusAgent(rank, stores[rank], paths=paths[rank], threads=1) for rank in range(2)]
    for agent in agents:
        agent.start()
    made = [TensorBusClient(rank, paths[rank].command_queue, paths[rank].state, LONG) for rank in range(2)]
    yield made
    succeed(*[client.close for client in made])
    succeed(*[agent.stop for agent in agents])


def test_who_leaves_does_not_wait_for_it(
    monkeypatch: pytest.MonkeyPatch, own_etcd: EtcdServer, stores: list[EtcdStore], clients: list[TensorBusClient]
) -> None:
    monkeypatch.setattr(connection, "_GRACE", 10 * LONG)  # no client gives up by itself: its agent says what is to be waited for
    target = torch.zeros(3)
    sender = etha_ray.publish({"w": torch.ones(3)}, "policy", client=clients[0])
    receiver = etha_ray.pull({"w": target}, "policy", client=clients[1], timeout=LONG)
    sync(sender, receiver)
    own_etcd.pause()
    sync(sender, receiver)
    with ThreadPoolExecutor(2) as pool:
        for end in [pool.submit(sender.close), pool.submit(receiver.close)]:
            end.result(LONG)
    own_etcd.resume()
    # What they had said of themselves in the store is taken back: others may come under these names.
    eventually(lambda: not stores[0].list("notice/") and not stores[0].list("pair/"))
    target.zero_()
    with (
        etha_ray.publish({"w": torch.ones(3)}, "policy", client=clients[0]) as sender,
        etha_ray.pull({"w": target}, "policy", client=clients[1], timeout=LONG) as receiver,
    ):
        sync(sender, receiver)
    assert torch.equal(target, torch.ones(3))


def test_who_could_not_announce_itself_in_time_is_not_there_later(
    monkeypatch: pytest.MonkeyPatch, own_etcd: EtcdServer, stores: list[EtcdStore], clients: list[TensorBusClient]
) -> None:
    """Its agent goes on trying, and its client is somebody else's: a rank that nobody plays would be connected with."""
    monkeypatch.setattr(connection, "_GRACE", 0.1)
    own_etcd.pause()
    with pytest.raises((TimeoutError, StoreUnavailableError)):
        etha_ray.pull({"w": torch.zeros(3)}, "policy", client=clients[1], timeout=0.5)
    own_etcd.resume()
    clients[1].init_pair("pair", "a", "b", 1, blocking=False)  # the store answers again
    eventually(lambda: stores[1].list("pair/"))
    eventually(lambda: clients[1].ping(LONG) is None and not stores[0].list("notice/"))
