"""A store of each kind, for a test that is to hold on all of them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from etha_ray.errors import OptionalDependencyError
from etha_ray.kvstore import KVStore, MemoryStore, TorchTCPStore, create_store
from etha_ray.testing.bus import fresh_namespace
from etha_ray.testing.etcd_server import HOST, EtcdAddress


@contextmanager
def fresh_store(kind: str, etcd: EtcdAddress | None) -> Iterator[KVStore]:
    """An empty store for the block: "memory", "tcp", "gcs" (Ray is initialised) or "etcd", which is then given."""
    namespace = fresh_namespace()
    store: KVStore
    if kind == "memory":
        store = MemoryStore(namespace)
    elif kind == "tcp":
        store = TorchTCPStore(HOST, 0, None, True, namespace=namespace)
    else:
        url = "gcs://" if etcd is None else etcd.url
        try:
            store = create_store(url, namespace=namespace)
        except OptionalDependencyError as error:
            pytest.skip(str(error))
    try:
        yield store
    finally:
        store.close()
