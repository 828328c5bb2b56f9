from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from functools import partial

import pytest
import torch.distributed as dist

from etha_ray.errors import ConfigError, StoreUnavailableError
from etha_ray.kvstore import KVStore, TorchTCPStore
from etha_ray.kvstore.tcp import POLL_INTERVAL
from tests.contracts.kvstore import KVStoreContract, MakeStore, StoreInAProcess, in_processes
from tests.fresh import fresh
from tests.net.silent import unheard

HOST = "127.0.0.1"


def open_client(port: int, namespace: str) -> TorchTCPStore:
    return TorchTCPStore(HOST, port, None, False, 60.0, namespace=namespace)


def serve(pipe: object) -> None:
    store = TorchTCPStore(HOST, 0, None, True, 60.0)
    pipe.send(store.port)  # type: ignore[attr-defined]
    time.sleep(600)


def free_port() -> int:
    with socket.create_server((HOST, 0)) as server:
        return int(server.getsockname()[1])


@pytest.fixture(scope="module")
def master() -> Iterator[TorchTCPStore]:
    store = TorchTCPStore(HOST, 0, None, True, 60.0)
    yield store
    store.close()


class TestTorchTCPStore(KVStoreContract):
    @pytest.fixture
    def make_store(self, master: TorchTCPStore) -> Iterator[MakeStore]:
        made: list[KVStore] = []

        def make(**where: str) -> KVStore:
            made.append(TorchTCPStore(HOST, master.port, None, False, 60.0, **where))
            return made[-1]

        yield make
        for store in made:
            store.close()

    @pytest.fixture
    def store_in_a_process(self, master: TorchTCPStore) -> Iterator[StoreInAProcess]:
        start, end = in_processes(partial(open_client, master.port))
        yield start
        end()

    def test_values_are_stored_as_they_are(self, master: TorchTCPStore, make_store: MakeStore) -> None:
        raw = dist.TCPStore(HOST, master.port, None, False)
        store = make_store(namespace="raw", component="c")
        store.set_bytes("k", b"\0\xff")
        assert raw.get("raw/c/k") == b"\0\xff"
        raw.set("raw/c/k", b"\xfe\0")
        raw.set("raw/c/empty", b"")
        assert store.get_bytes("k") == b"\xfe\0"
        assert store.list() == {"k": b"\xfe\0", "empty": b""}
        assert store.compare_and_set("empty", b"", b"x") == b"x"

    def test_long_keys(self, master: TorchTCPStore, make_store: MakeStore) -> None:
        store = make_store(namespace="long")
        store.set("k" * 4096, "v")
        assert store.get("k" * 4096) == b"v"
        assert store.max_key_bytes is not None
        longest = "k" * (store.max_key_bytes - len("long/tensorbus/"))
        store.set(longest, "v")
        assert store.get(longest) == b"v"
        with pytest.raises(ConfigError, match=str(store.max_key_bytes)):
            store.set(f"{longest}k", "v")
        assert store.get("k") is None


def test_attributes() -> None:
    master = TorchTCPStore(HOST, 0, 1, True)
    assert (master.host, master.world_size, master.is_master) == (HOST, 1, True)
    assert master.port > 0
    client = TorchTCPStore(HOST, master.port, 1, False, wait_for_workers=False)
    assert (client.port, client.is_master) == (master.port, False)
    assert POLL_INTERVAL == 0.001
    client.close()
    master.close()


def test_without_libuv_there_is_no_limit() -> None:
    master = TorchTCPStore(HOST, 0, None, True, use_libuv=False)
    client = TorchTCPStore(HOST, master.port, None, False, use_libuv=False)
    value = bytes(12 * 2**20)
    client.set_bytes("k" * 20_000, value)
    assert master.list() == {"k" * 20_000: value}
    assert client.get("missing") is None
    assert client.compare_and_set("n", None, b"1") == b"1"
    assert client.compare_and_set("missing", b"1", b"2") is None
    assert client.add("n", 1) == 2
    client.append("n", b"0")
    assert client.wait_for_value("n", "20", 0) == b"20"
    client.close()
    master.close()


def test_wait_for_workers() -> None:
    port = free_port()
    stores: dict[int, TorchTCPStore] = {}

    def join(rank: int) -> None:
        stores[rank] = TorchTCPStore(HOST, port, 3, rank == 0, 60.0)

    threads = [threading.Thread(target=join, args=(rank,)) for rank in range(3)]
    # The master comes last: the others wait until it listens.
    for thread in reversed(threads[1:]):
        thread.start()
    time.sleep(0.2)
    assert not stores
    threads[0].start()
    for thread in threads:
        thread.join(60)
    stores[0].set("k", "v")
    assert stores[2].get("k") == b"v"
    for rank in (1, 2, 0):
        stores[rank].close(cleanup=False)


def test_workers_that_do_not_come() -> None:
    with pytest.raises(StoreUnavailableError, match="all 2 processes"):
        TorchTCPStore(HOST, 0, 2, True, 0.5)


def test_nobody_listens() -> None:
    with unheard() as address, pytest.raises(StoreUnavailableError, match=f"{address}.*0.5 s") as caught:
        TorchTCPStore(address.host, address.port, None, False, 0.5)
    assert isinstance(caught.value, ConnectionError)


def test_port_is_taken() -> None:
    with socket.create_server((HOST, 0)) as server, pytest.raises(StoreUnavailableError, match=str(server.getsockname()[1])):
        TorchTCPStore(HOST, server.getsockname()[1], None, True, 1.0)


@pytest.mark.parametrize(
    ("port", "world_size", "is_master", "timeout"), [(0, None, False, 1.0), (70000, 1, True, 1.0), (0, 0, True, 1.0), (0, 1, True, 0)]
)
def test_arguments_out_of_range(port: int, world_size: int | None, is_master: bool, timeout: float) -> None:
    with pytest.raises(ConfigError, match="TorchTCPStore"):
        TorchTCPStore(HOST, port, world_size, is_master, timeout)


def test_multi_tenant_and_listen_fd() -> None:
    first = TorchTCPStore(HOST, 0, None, True, multi_tenant=True)
    second = TorchTCPStore(HOST, first.port, None, True, multi_tenant=True)
    first.set("k", "v")
    assert second.get("k") == b"v"
    second.close(cleanup=False)
    first.close()
    listening = socket.create_server((HOST, 0))
    port = listening.getsockname()[1]
    store = TorchTCPStore(HOST, port, None, True, master_listen_fd=listening.detach())
    assert store.port == port
    store.close()


def test_a_killed_server() -> None:
    ours, theirs = multiprocessing.Pipe()
    server = fresh.Process(target=serve, args=(theirs,), daemon=True)
    server.start()
    store = TorchTCPStore(HOST, ours.recv(), None, False, 30.0)
    store.set("k", "v")
    errors: list[BaseException] = []

    def wait() -> None:
        try:
            store.wait_for_key("never", 60)
        except StoreUnavailableError as error:
            errors.append(error)

    waiter = threading.Thread(target=wait)
    waiter.start()
    assert server.pid is not None
    os.kill(server.pid, signal.SIGKILL)
    server.join()
    waiter.join(30)
    assert f"{HOST}:{store.port}" in str(errors[0])
    for use in (lambda: store.get("k"), lambda: store.set("k", "v"), lambda: store.add("n", 1), lambda: store.list()):
        with pytest.raises(StoreUnavailableError, match=f"{HOST}:{store.port}"):
            use()
    store.close()
