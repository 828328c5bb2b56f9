"""torch elastic's `EtcdStore`, on v3: what is particular to it. What it shares with every store is in test_c10d_semantics.py."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any

import pytest
import torch.distributed as dist
from torch.distributed.elastic.rendezvous import etcd_store

from etha_ray.errors import ConfigError, LeaseExpiredError, ValueTooLargeError
from etha_ray.kvstore import create_store
from etha_ray.kvstore.c10d import C10dUnavailableError, EtcdStore
from etha_ray.testing import eventually
from etha_ray.testing.etcd_server import EtcdAddress, EtcdServer
from tests.kvstore.c10d.backends import LONG, SHORT, pyetcd_clients


@pytest.fixture
def client(etcd: EtcdAddress) -> Iterator[Any]:
    with pyetcd_clients(etcd) as connect:
        yield connect()


@pytest.fixture(params=["pyetcd", "ours"])
def any_client(request: pytest.FixtureRequest, etcd: EtcdAddress, client: Any) -> Iterator[Any]:
    if request.param == "pyetcd":
        yield client
        return
    store = create_store(etcd.url, namespace=uuid.uuid4().hex)
    yield store
    store.close()


@pytest.fixture
def prefix() -> str:
    return f"/torchelastic/{uuid.uuid4().hex}/store"


def test_has_the_surface_of_torch_elastics() -> None:
    methods = {name for name in vars(etcd_store.EtcdStore) if not name.startswith("_")}
    assert methods == {"set", "get", "add", "wait", "check"}
    assert methods <= set(dir(EtcdStore))
    assert issubclass(EtcdStore, dist.Store)


def test_str_or_bytes(any_client: Any, prefix: str) -> None:
    store, other = EtcdStore(any_client, prefix), EtcdStore(any_client, f"{prefix}/")
    store.set("k", "v")
    assert other.get(b"k") == b"v"
    store.set(b"\xff\0", b"\xfe")
    assert other.get(b"\xff\0") == b"\xfe"
    assert other.add(b"n", 2) == store.add("n", 0) == 2
    assert store.get("n") == b"2"
    assert store.check(["k", b"\xff\0"])
    assert not store.check(["k", "\xff\0"])
    store.wait(["k", b"n"])
    for wrong in (1, None, ["k"]):
        with pytest.raises(TypeError):
            store.set("k", wrong)
        with pytest.raises(TypeError):
            store.get(wrong)


def test_lookup_error_when_the_wait_runs_out(any_client: Any, prefix: str) -> None:
    store = EtcdStore(any_client, prefix, SHORT)
    store.set("there", "1")
    assert store.timeout == SHORT
    for call in (
        lambda: store.get("missing"),
        lambda: store.wait(["there", "missing"]),
        lambda: store.wait(["missing"], SHORT),
        lambda: store.wait(["missing"], override_timeout=SHORT),
        lambda: dist.PrefixStore("p", store).get("missing"),
    ):
        with pytest.raises(LookupError, match=r"missing'.* within 0\.15 s") as caught:
            call()
        assert isinstance(caught.value, (dist.DistStoreError, TimeoutError))


def test_defaults(any_client: Any, prefix: str) -> None:
    store = EtcdStore(any_client, prefix)
    assert store.timeout == timedelta(seconds=300)
    assert store.client is any_client
    assert store.prefix == f"{prefix}/"
    clone = store.clone()
    assert isinstance(clone, EtcdStore)
    clone.set("k", "v")
    assert store.get("k") == b"v"


def test_wait_until_another_sets(any_client: Any, prefix: str) -> None:
    store, other = EtcdStore(any_client, prefix, LONG), EtcdStore(any_client, prefix, LONG)
    with ThreadPoolExecutor(1) as pool:
        wait = pool.submit(store.wait, ["a", "b"])
        other.set("b", "1")
        other.set("a", "1")
        wait.result(60)


def test_prefixes_do_not_meet(any_client: Any, prefix: str) -> None:
    stores = [EtcdStore(any_client, f"{prefix}{end}", SHORT) for end in ("", "1", "/1", "%")]
    for n, store in enumerate(stores):
        store.set("k", str(n))
    assert [store.get("k") for store in stores] == [b"0", b"1", b"2", b"3"]
    assert stores[1].list_keys() == ["k"]


def test_keys_are_under_the_prefix_in_etcd(client: Any, prefix: str) -> None:
    store = EtcdStore(client, prefix)
    store.set("a/b", "1")
    store.queue_push("q", "element")
    assert client.get(f"{prefix}/a/b")[0] == b"1"
    client.put(f"{prefix}/c", "2")
    assert store.get("c") == b"2"
    assert store.list_keys() == ["a/b", "c"]
    client.put(f"{prefix}2/c", "3")
    store.store.close()
    assert list(client.get_prefix(f"{prefix}/")) == []
    assert client.get(f"{prefix}2/c")[0] == b"3"
    client.delete_prefix(f"{prefix}2/")


def test_a_gibberish_client_is_refused(prefix: str) -> None:
    with pytest.raises(ConfigError, match=r"no client of etcd's v3 API .* pyetcd\.client"):
        EtcdStore(object(), prefix)


def test_empty_prefix_is_refused(client: Any) -> None:
    with pytest.raises(ConfigError, match="empty"):
        EtcdStore(client, "/")


def test_a_value_over_the_limit_says_the_limit(client: Any, prefix: str) -> None:
    store = EtcdStore(client, prefix)
    store.set("k", bytes(2**20))
    assert store.get("k") == bytes(2**20)
    with pytest.raises(ValueTooLargeError, match="1048576"):
        store.set("k", bytes(2**20 + 1))
    store.store.close()


def test_leases_of_a_clients_store(client: Any, prefix: str) -> None:
    kv = EtcdStore(client, prefix).store
    lease = kv.lease(60, renew=False)
    lease.set("k", "v")
    lease.renew()
    assert lease.ttl >= 60
    assert kv.get("k") == b"v"
    lease.close()
    assert not kv.exists("k")
    lost = kv.lease(60, renew=False)
    lost.set("k", "v")
    for each in client.get_prefix(f"{prefix}/"):
        client.revoke_lease(each[1].lease_id)
    with pytest.raises(LeaseExpiredError):
        lost.set("k", "w")
    another = kv.lease(60, renew=False)
    client.revoke_lease(another._grant._lease.id)
    with pytest.raises(LeaseExpiredError):
        another.renew()
    assert not kv.exists("k")


def test_a_killed_etcd_is_a_network_error(own_etcd: EtcdServer, prefix: str) -> None:
    with pyetcd_clients(own_etcd) as connect:
        store = EtcdStore(connect(), prefix, LONG)
        store.set("k", "v")
        own_etcd.kill()
        for call in (lambda: store.get("k"), lambda: store.set("k", "w"), lambda: store.add("n", 1), lambda: store.check(["k"])):
            with pytest.raises(C10dUnavailableError, match="cannot be reached") as caught:
                call()
            assert isinstance(caught.value, (dist.DistNetworkError, ConnectionError))

        def is_back() -> bool:
            try:  # each time by another client, as one that fails holds back for minutes
                return EtcdStore(connect(), prefix, LONG).get("k") == b"v"
            except C10dUnavailableError:  # gRPC remembers for a second, for all clients of a process, that nobody listened there
                time.sleep(0.1)
                return False

        assert not is_back()
        own_etcd.restart()
        eventually(is_back)


def test_with_our_store_a_wait_outlasts_a_restart_of_etcd(own_etcd: EtcdServer, prefix: str) -> None:
    kv, another = (create_store(own_etcd.url) for _ in range(2))
    store, other = EtcdStore(kv, prefix, LONG), EtcdStore(another, prefix, LONG)
    store.set("before", "1")
    with ThreadPoolExecutor(1) as pool:
        wait = pool.submit(store.get, "k")
        own_etcd.kill()
        own_etcd.restart()
        other.set("k", "v")
        assert wait.result(60) == b"v"
    assert other.get("before") == b"1"
    for each in (kv, another):
        each.close()
