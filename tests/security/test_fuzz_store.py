"""What is in the store, changed by a stranger at any moment: agents live, clients hear errors of ours, others are served as before."""

from __future__ import annotations

import contextlib
import random
import threading
from collections import Counter
from functools import partial

import pytest
import torch

import etha_ray
from etha_ray.errors import EthaRayError, LeaseExpiredError
from etha_ray.kvstore import KVStore
from etha_ray.tensor_bus import connection
from etha_ray.tensor_bus.agent import TensorBusAgent
from etha_ray.tensor_bus.board import Board
from etha_ray.tensor_bus.client import TensorBusClient
from etha_ray.tensor_bus.records import agent_key, encode
from etha_ray.testing import eventually, together
from tests.security.heard import listening
from tests.security.mutations import mutated
from tests.security.test_fuzz import COUNT, works
from tests.tensor_bus.cluster import LocalCluster, local_cluster

_GROWN = 1 << 17
"""Bytes of a value that has been damaged often enough: again and again it would become as large as memory."""


def damage_the_store(store: KVStore, rng: random.Random, times: int) -> None:
    """Values there become nearly right ones, whoever they are of: agents' records too."""
    for _ in range(times):
        if found := sorted((key, value) for key, value in store.list().items() if 0 < len(value) < _GROWN):
            key, value = rng.choice(found)
            store.set_bytes(key, mutated(value, rng))


def heal_the_store(cluster: LocalCluster) -> None:
    """What cannot be read any more is left there by who it was of. Agents' records are of their leases again."""
    cluster.store.delete_prefix("")
    for agent in cluster.agents.values():

        def is_there(agent: TensorBusAgent = agent) -> bool:
            with contextlib.suppress(LeaseExpiredError):  # where this process stood still; another is on its way
                agent._presence.lease.set_bytes(agent_key(agent.rank), encode(agent.record))
                return True
            return False

        eventually(is_there)


def test_the_store() -> None:
    """What pairs and registrations read there, changed by a stranger at any moment."""
    rng = random.Random(42)
    with listening() as heard, local_cluster(2) as cluster:
        store = cluster.store
        for _ in range(max(4, COUNT // 100)):
            one, two = cluster.client(0), cluster.client(1)
            for client, name, other in ((one, "a", "b"), (two, "b", "a")):
                client.init_pair("p", name, other, 1, blocking=False)
            for client in (one, two):
                client.register_tensors("x", [(torch.ones(8), "p")], blocking=False)
            damage_the_store(store, rng, 25)
            for client in (one, two):
                client.close()
                cluster.clients.remove(client)
            heal_the_store(cluster)
        works(cluster, "at last")
    assert heard.faults == []


def test_what_is_said_beside_transfers_in_the_store(monkeypatch: pytest.MonkeyPatch) -> None:
    """Notices, their tables, who holds which version: publishers and receivers go on, or end with an error of ours."""
    monkeypatch.setattr(connection, "_GRACE", 0.0)
    rng, ended = random.Random(11), Counter[str]()
    with listening() as heard, local_cluster(2) as cluster:
        store = cluster.store
        for number in range(max(4, COUNT // 100)):
            one, two = cluster.client(0), cluster.client(1)
            name, done = f"policy{number}", threading.Event()

            def give(client: TensorBusClient, name: str) -> None:
                with etha_ray.publish({"w": torch.ones(8)}, name, client=client, world_size=1, rank=0) as publisher:
                    publisher.push(timeout=0.5)
                    publisher.push(timeout=0.5)

            def take(client: TensorBusClient, name: str) -> None:
                with etha_ray.pull({"w": torch.zeros(8)}, name, client=client, world_size=1, rank=0, timeout=0.5) as receiver:
                    receiver.update(0.5)
                    receiver.update(0.5)

            def ask(client: TensorBusClient, name: str) -> None:
                for _ in range(20):
                    Board(client, f"weights/{name}").read(timeout=0.5)
                    client.ready_replicas(name, 1, timeout=0.5)

            def damage(done: threading.Event) -> None:
                while not done.wait(rng.random() * 0.01):
                    damage_the_store(store, rng, 1)

            damaging = threading.Thread(target=damage, args=(done,))
            damaging.start()
            try:
                results = together(*[partial(call, client, name) for call, client in ((give, one), (take, two), (ask, one))])
            finally:
                done.set()
                damaging.join()
            for result in results:
                assert result is None or isinstance(result, EthaRayError), result
                ended[type(result).__name__] += 1
            for client in (one, two):
                with contextlib.suppress(EthaRayError):
                    client.close()
                cluster.clients.remove(client)
            heal_the_store(cluster)
        works(cluster, "at last")
    assert len(ended) > 1, f"some go on, and some end with an error: {ended}"
    assert heard.faults == []
