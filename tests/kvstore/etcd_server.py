"""What the tests of etcd have beside its servers (`etha_ray.testing.etcd_server`)."""

from __future__ import annotations

from pathlib import Path

from etha_ray.kvstore import EtcdStore
from etha_ray.testing.calls import eventually
from etha_ray.testing.etcd_server import EtcdAddress, EtcdServer, free_ports


def start_cluster(folder: Path, size: int) -> list[EtcdServer]:
    """The members of a new cluster, ready."""
    ports = free_ports(2 * size)
    members = [EtcdServer(folder, name=f"m{n}", port=ports[2 * n], peer_port=ports[2 * n + 1]) for n in range(size)]
    for member in members:
        member.cluster = ",".join(each.peer for each in members)
        member.start()
    for member in members:
        member.wait_ready()
    return members


def open_store(address: EtcdAddress, namespace: str) -> EtcdStore:
    """A store there."""
    return EtcdStore(address.host, address.port, namespace=namespace)


def watching(store: EtcdStore, watches: int = 1) -> None:
    """Waits until etcd has begun so many watches for the waits of the store."""
    eventually(lambda: sum(watch.id is not None for watch in tuple(store._watches._watches)) >= watches)
