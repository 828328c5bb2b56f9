from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest

from etha_ray.errors import ConfigError, StoreError, StoreTimeoutError, StoreUnavailableError
from etha_ray.kvstore import EtcdStore, KVStore
from etha_ray.kvstore.etcd import _CHUNK, _MARK
from etha_ray.testing.etcd_server import EtcdAddress, EtcdServer
from tests.contracts.kvstore import KVStoreContract, MakeStore, StoreInAProcess, in_processes
from tests.kvstore.etcd_server import open_store


class TestEtcdStore(KVStoreContract):
    @pytest.fixture
    def make_store(self, etcd: EtcdAddress) -> Iterator[MakeStore]:
        made: list[KVStore] = []

        def make(**where: str) -> KVStore:
            made.append(EtcdStore(etcd.host, etcd.port, **where))
            return made[-1]

        yield make
        for store in made:
            store.close()

    @pytest.fixture
    def store_in_a_process(self, etcd: EtcdAddress) -> Iterator[StoreInAProcess]:
        start, end = in_processes(partial(open_store, etcd))
        yield start
        end()


@pytest.fixture
def store(etcd: EtcdAddress, namespace: str) -> Iterator[EtcdStore]:
    store = open_store(etcd, namespace)
    yield store
    store.close()


# --- what is in etcd ---------------------------------------------------------------------------------------------------------------------


def test_small_values_are_stored_as_they_are(store: EtcdStore, raw: Any, namespace: str) -> None:
    store.set_bytes("k", b"\0\xff")
    assert raw.get(f"{namespace}/tensorbus/k")[0] == b"\0\xff"
    raw.put(f"{namespace}/tensorbus/k", b"\xfe\0")
    raw.put(f"{namespace}/tensorbus/empty", b"")
    assert store.list() == {"k": b"\xfe\0", "empty": b""}
    assert store.compare_and_set("k", b"\xfe\0", b"1") == b"1"


def test_what_another_program_wrote_there_is_told(store: EtcdStore, raw: Any, namespace: str) -> None:
    raw.put(f"{namespace}/tensorbus/k", _MARK + b"x")
    with pytest.raises(StoreError, match=r"/k' in .* is damaged"):
        store.get("k")
    raw.delete(f"{namespace}/tensorbus/k")
    raw.put(f"{namespace}/tensorbus/".encode() + b"\xff", b"1")
    with pytest.raises(StoreError, match="is no text"):
        store.list()


def test_nothing_is_left_after_close(etcd: EtcdAddress, raw: Any, namespace: str) -> None:
    store, other = open_store(etcd, namespace), open_store(etcd, namespace)
    store.set_bytes("k", bytes(2 * _CHUNK))
    other.add("n", 1)
    other.delete("n")
    other.close(cleanup=False)
    assert store.get("k") == bytes(2 * _CHUNK)
    store.close()
    assert list(raw.get_prefix(f"{namespace}/")) == []


def test_the_longest_key_and_more_keys_than_a_page(store: EtcdStore, namespace: str) -> None:
    longest = "k" * (store.max_key_bytes - len(f"{namespace}/tensorbus/"))
    for value in (bytes(_CHUNK), bytes(3 * _CHUNK), b"1"):
        store.set_bytes(longest, value)
        assert store.list() == {longest: value}
    assert store.add(longest, 1) == 2
    with pytest.raises(ConfigError, match=str(store.max_key_bytes)):
        store.set(f"{longest}k", "v")
    for n in range(600):
        store.set(f"many/{n:03}", str(n))
    assert store.list("many/") == {f"many/{n:03}": b"%d" % n for n in range(600)}
    assert store.delete_prefix("many/") == 600


# --- arguments ---------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "cause"),
    [
        ({"host": ""}, "endpoint ''"),
        ({"host": "h:1"}, "HOST:PORT"),
        ({"host": "a b/c"}, "HOST:PORT"),
        ({"port": 0}, "1 to 65535"),
        ({"port": 70000}, "1 to 65535"),
        ({"endpoints": ["h:1", "h:x"]}, "'h:x'"),
        ({"endpoints": ["u:p@h:1"]}, "HOST:PORT"),
        ({"timeout": 0}, "timeout 0"),
        ({"user": "u"}, "user and password"),
        ({"password": "p"}, "user and password"),
        ({"cert": "c"}, "cert and key"),
    ],
)
def test_arguments_out_of_range(arguments: dict[str, Any], cause: str) -> None:
    with pytest.raises(ConfigError, match=cause):
        EtcdStore(**arguments)


def test_attributes_and_ipv6() -> None:
    with pytest.raises(StoreUnavailableError, match=r"etcd://\[::1\]:1,\[fe80::1\]:2379,"):
        EtcdStore(timeout=0.2, endpoints=["[::1]:1", "[fe80::1]", "127.0.0.1:1"])
    with pytest.raises(StoreUnavailableError, match=r"etcd://\[::1\]:1,"):
        EtcdStore("::1", 1, timeout=0.2)


def test_host_port_and_where(store: EtcdStore, etcd: EtcdAddress) -> None:
    assert (store.host, store.port) == (etcd.host, etcd.port)
    assert etcd.url in repr(store)


def test_leases_are_in_whole_seconds(store: EtcdStore) -> None:
    with store.lease(3.2) as lease:
        assert lease.ttl == 4
    with pytest.raises(ConfigError, match="at most"):
        store.lease(1e10)


# --- processes ---------------------------------------------------------------------------------------------------------------------------


def run(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=60)


def test_a_process_that_does_not_close(etcd: EtcdAddress, namespace: str) -> None:
    code = """
import sys, threading
from etha_ray.kvstore import create_store
store = create_store(sys.argv[1], namespace=sys.argv[2])
lease = store.lease(600)
lease.set("k", "v")
threading.Thread(target=store.wait_for_key, args=("never",), daemon=True).start()
threading.Thread(target=lambda: [store.add("n", 1) for _ in range(10**6)], daemon=True).start()
store.wait_for_key("n")
sys.exit(3)
"""
    result = run(code, etcd.url, namespace)
    assert result.returncode == 3
    assert result.stderr == ""


def test_a_store_that_nobody_holds(etcd: EtcdAddress, namespace: str) -> None:
    store = open_store(etcd, namespace)
    with pytest.raises(StoreTimeoutError):
        store.wait_for_key("k", 0.1)
    reader = store._watches._reader
    assert reader is not None
    del store
    reader.join(30)
    assert not reader.is_alive()


def use_after_fork(store: EtcdStore, answers: Any) -> None:
    try:
        store.get("k")
    except StoreUnavailableError as error:
        answers.put(str(error))
    store.close()
    answers.put("closed")


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded")
def test_a_forked_process_is_told(etcd: EtcdAddress, store: EtcdStore) -> None:
    store.set("k", "v")
    context = multiprocessing.get_context("fork")
    answers = context.Queue()
    child = context.Process(target=use_after_fork, args=(store, answers))
    child.start()
    assert f"process {os.getpid()}" in answers.get(timeout=60)
    assert answers.get(timeout=60) == "closed"
    child.join(60)
    assert store.get("k") == b"v"


def test_without_the_extra() -> None:
    result = run("import sys; sys.modules.update(pyetcd=None, etcd3=None)\nfrom etha_ray.kvstore import EtcdStore")
    assert 'pip install "etha-ray[etcd]"' in result.stderr
    result = run("import sys; sys.modules.update(grpc=None)\nfrom etha_ray.kvstore import create_store; create_store('etcd://h')")
    assert "OptionalDependencyError" in result.stderr
    assert "Traceback" in result.stderr


def test_etcd3_will_do(etcd: EtcdAddress, namespace: str) -> None:
    code = """
import sys, pyetcd
sys.modules.update(etcd3=pyetcd, pyetcd=None)
from etha_ray.kvstore import create_store
store = create_store(sys.argv[1], namespace=sys.argv[2])
print(store.add("n", 7))
store.close()
"""
    assert run(code, etcd.url, namespace).stdout.strip() == "7"


def test_a_request_larger_than_the_server_takes(tmp_path_factory: pytest.TempPathFactory) -> None:
    server = EtcdServer(tmp_path_factory.mktemp("small"), ("--max-request-bytes", "100000"))
    server.start()
    server.wait_ready()
    store = EtcdStore(server.host, server.port)
    store.set_bytes("k", bytes(90_000))
    with pytest.raises(StoreError, match="--max-request-bytes"):
        store.set_bytes("k", bytes(200_000))
    assert store.get("k") == bytes(90_000)
    store.close()
    server.stop()


def fill(store: EtcdStore) -> None:
    for _ in range(1000):
        store.set_bytes("large", bytes(_CHUNK))


def test_a_full_etcd(tmp_path_factory: pytest.TempPathFactory) -> None:
    server = EtcdServer(tmp_path_factory.mktemp("full"), ("--quota-backend-bytes", str(4 * 2**20)))
    server.start()
    server.wait_ready()
    store = EtcdStore(server.host, server.port)
    store.set("k", "v")
    with pytest.raises(StoreError, match="--quota-backend-bytes"):
        fill(store)
    assert store.get("k") == b"v"
    store.close()
    server.stop()
