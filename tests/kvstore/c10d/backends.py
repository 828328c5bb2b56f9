"""The stores that are compared: torch's own, and ours on every backend."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import pytest
import torch.distributed as dist

from etha_ray.kvstore import KVStore, MemoryStore, TorchTCPStore, create_store
from etha_ray.kvstore.c10d import C10dStore, EtcdStore

HOST = "127.0.0.1"
SHORT = timedelta(milliseconds=150)
"""For waits that are to run out."""
LONG = timedelta(seconds=60)
"""For waits that are to be fulfilled."""

TORCH = ["torch TCPStore", "torch HashStore"]
KV = ["memory", "tcp", "gcs", "etcd"]
PREFIXED = "PrefixStore on memory"
ELASTIC = ["EtcdStore on etcd", "EtcdStore on pyetcd"]

OpenKV = Callable[[str], KVStore]
"""Makes a store object of one backend on the keys of a namespace."""


@contextmanager
def opened(backend: str, request: pytest.FixtureRequest) -> Iterator[OpenKV]:
    """Runs what a backend of ours needs; all stores are closed at the end."""
    made: list[KVStore] = []

    def keep(store: KVStore) -> KVStore:
        made.append(store)
        return store

    if backend == "memory":
        yield lambda namespace: keep(MemoryStore(namespace))
    elif backend == "tcp":
        master = keep(TorchTCPStore(HOST, 0, None, True, 60.0))
        assert isinstance(master, TorchTCPStore)
        yield lambda namespace: keep(TorchTCPStore(HOST, master.port, None, False, 60.0, namespace=namespace))
    else:
        url = request.getfixturevalue("etcd").url if backend == "etcd" else "gcs://"
        if backend == "gcs":
            request.getfixturevalue("ray_cluster")
        yield lambda namespace: keep(create_store(url, namespace=namespace, timeout=60.0))
    for store in reversed(made):
        store.close()


@dataclass(frozen=True)
class Pair:
    """Two store objects on the same keys, of which there are none yet."""

    store: Any
    other: Any


class Answered:
    """Torch's TCPStore with writes that are done when they return. It sends them, and another object's read may come first."""

    def __init__(self, store: Any) -> None:
        self._store = store

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._store, name)
        if name not in ("set", "append", "multi_set", "queue_push"):
            return method

        def write(*arguments: Any) -> None:
            method(*arguments)
            self._store.check([])

        return write

    def clone(self) -> Answered:
        return Answered(self._store.clone())


@contextmanager
def pairs(kind: str, request: pytest.FixtureRequest) -> Iterator[Callable[[], Pair]]:
    """Makes pairs of one kind of store: one of `TORCH`, of ours on one of `KV`, one of `ELASTIC`, or `PREFIXED`."""
    if kind == "torch HashStore":
        yield lambda: _with_clone(dist.HashStore())
    elif kind == "torch TCPStore":
        yield lambda: _with_clone(Answered(dist.TCPStore(HOST, 0, None, True, LONG)))
    elif kind == "EtcdStore on pyetcd":
        with pyetcd_clients(request.getfixturevalue("etcd")) as connect:
            yield lambda: _with_prefix(connect(), connect())
    elif kind == "EtcdStore on etcd":
        with opened("etcd", request) as open_kv:
            yield lambda: _with_prefix(open_kv("c10d"), open_kv("c10d"))
    elif kind == PREFIXED:
        with opened("memory", request) as open_kv:
            yield lambda: Pair(*(dist.PrefixStore("p", store) for store in _two(open_kv)))
    else:
        with opened(kind, request) as open_kv:
            yield lambda: Pair(*_two(open_kv))


@contextmanager
def pyetcd_clients(etcd: Any) -> Iterator[Callable[[], Any]]:
    """Connects clients of etcd-sdk-python to an etcd."""
    pyetcd = pytest.importorskip("pyetcd")
    with ExitStack() as stack:
        yield lambda: stack.enter_context(pyetcd.client(etcd.host, etcd.port, timeout=60))


def _with_prefix(client: Any, another: Any) -> Pair:
    prefix = f"/c10d/{uuid.uuid4().hex}"
    return Pair(EtcdStore(client, prefix, LONG), EtcdStore(another, f"{prefix}/", LONG))


def _with_clone(store: Any) -> Pair:
    store.set_timeout(LONG)
    return Pair(store, store.clone())


def _two(open_kv: OpenKV) -> list[C10dStore]:
    namespace = uuid.uuid4().hex
    return [C10dStore(open_kv(namespace), timeout=LONG) for _ in range(2)]
