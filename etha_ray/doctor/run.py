"""All checks, in the order in which they matter."""

from __future__ import annotations

from collections.abc import Iterator

from etha_ray.doctor import host, services, software
from etha_ray.doctor.check import Check


def examine(namespace: str, store: str | None = None, address: str | None = None) -> Iterator[Check]:
    """Look at this machine; each line as soon as it is known.

    Args:
        namespace: the pool that the store is tried with.
        store: URL of the store that must be reachable; None tries none.
        address: of the Ray cluster that must answer; None looks for one on this machine, and is content without.
    """
    ray = services.RayQuestion(address or "auto")  # the slowest, so it goes first
    yield software.packages()
    yield host.shared_memory()
    yield host.shared_files()
    yield host.ptrace()
    yield host.lmdb_works()
    yield host.semaphores()
    yield host.temporary_folder()
    yield host.descriptors()
    yield host.mappings()
    yield host.names()
    yield host.leftovers()
    yield software.etcd_client(needed=store is not None and store.startswith("etcd:"))
    yield from software.gpus()
    if store is not None:
        yield services.store(store, namespace)
    yield ray.answer(needed=address is not None)
