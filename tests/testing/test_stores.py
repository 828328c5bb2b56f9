from __future__ import annotations

import pytest

from etha_ray.errors import OptionalDependencyError
from etha_ray.kvstore import KVStore
from etha_ray.testing import stores
from etha_ray.testing.etcd_server import EtcdAddress

pytestmark = pytest.mark.local_mode

SEEN: list[str] = []


def test_each_is_an_empty_store_of_its_own(kv_store: KVStore) -> None:
    assert kv_store.list() == {}
    kv_store.set("k", "1")
    assert kv_store.add("k", 1) == 2
    with kv_store.lease(30.0) as lease:
        lease.set("mine", "here")
        assert kv_store.get("mine") == b"here"
    assert kv_store.list() == {"k": b"2"}
    SEEN.append(type(kv_store).__name__)


def test_nothing_is_left_from_the_test_before(kv_store: KVStore) -> None:
    assert kv_store.list() == {}


def test_all_kinds_had_their_turn() -> None:
    assert SEEN[:3] == ["MemoryStore", "TorchTCPStore", "GcsStore"]
    assert SEEN[3:] in (["EtcdStore"], [])


def test_without_the_client_of_etcd_it_is_skipped_with_the_install_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def lacking(*args: object, **more: object) -> KVStore:
        raise OptionalDependencyError('EtcdStore needs gRPC: pip install "etha-ray[etcd]"')

    monkeypatch.setattr(stores, "create_store", lacking)
    with pytest.raises(pytest.skip.Exception, match=r"pip install .etha-ray\[etcd\]"), stores.fresh_store("etcd", EtcdAddress("h", 1)):
        pass
