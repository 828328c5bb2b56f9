"""MindSpore's ``mint.distributed.TCPStore``: its four methods, and the arguments that MindSpore ignores."""

from __future__ import annotations

import inspect
import socket
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any

import pytest
import torch.distributed as dist

from etha_ray.errors import ConfigError, StoreError, StoreUnavailableError, ValueTooLargeError
from etha_ray.kvstore.c10d import C10dStore, TCPStore
from tests.kvstore.c10d.backends import HOST, LONG


@pytest.fixture(scope="module")
def master() -> TCPStore:
    return TCPStore(HOST, 0, is_master=True)


@pytest.fixture
def store(master: TCPStore) -> Iterator[TCPStore]:
    store = TCPStore(HOST, master.port)
    yield store
    store.store.close()


def test_signature() -> None:
    parameters = list(inspect.signature(TCPStore).parameters.values())
    names = "host_name port world_size is_master timeout wait_for_workers multi_tenant master_listen_fd use_libuv"
    assert [each.name for each in parameters] == names.split()
    assert [each.default for each in parameters[2:]] == [None, False, 300, True, False, None, True]


def test_four_methods(master: TCPStore, store: TCPStore) -> None:
    assert store.get("k") == b""
    store.set("k", "naïve")
    assert master.get("k") == "naïve".encode()
    store.set("k", b"\0\xff")
    assert master.get("k") == b"\0\xff"
    assert store.delete_key("k") is True
    assert store.delete_key("k") is False
    assert store.get("k") == b""
    assert store.add("n", 3) == 3
    assert master.add("n", -1) == 2
    assert store.get("n") == b"2"
    store.set("n", "10")
    assert master.add("n", 1) == 11


def test_add_on_what_is_no_number(store: TCPStore) -> None:
    store.set("k", "five")
    with pytest.raises(RuntimeError, match="five") as caught:
        store.add("k", 1)
    assert isinstance(caught.value, StoreError)
    assert store.get("k") == b"five"


@pytest.mark.parametrize(
    "call",
    [
        lambda s: s.set(b"k", "v"),
        lambda s: s.set(1, "v"),
        lambda s: s.set("k", 1),
        lambda s: s.set("k", None),
        lambda s: s.set("k", bytearray(b"v")),
        lambda s: s.get(None),
        lambda s: s.add(1, 1),
        lambda s: s.add("k", "1"),
        lambda s: s.add("k", 1.0),
        lambda s: s.delete_key(b"k"),
        lambda s: TCPStore(None, s.port),
        lambda s: TCPStore(HOST, str(s.port)),
        lambda s: TCPStore(HOST, s.port, "2"),
        lambda s: TCPStore(HOST, s.port, None, 0),
        lambda s: TCPStore(HOST, s.port, timeout="300"),
        lambda s: TCPStore(HOST, s.port, timeout=None),
        lambda s: TCPStore(HOST, s.port, wait_for_workers=None),
        lambda s: TCPStore(HOST, s.port, multi_tenant=1),
        lambda s: TCPStore(HOST, s.port, master_listen_fd="3"),
        lambda s: TCPStore(HOST, s.port, use_libuv=1),
    ],
)
def test_wrong_types(store: TCPStore, call: Callable[[Any], object]) -> None:
    with pytest.raises(TypeError, match="TCPStore takes"):
        call(store)
    assert store.get("k") == b""


@pytest.mark.parametrize(("port", "world_size", "timeout"), [(-1, None, 300), (65536, None, 300), (1, 0, 300), (1, -1, 300), (1, 1, 0)])
def test_values_out_of_range(port: int, world_size: int | None, timeout: float) -> None:
    with pytest.raises(ConfigError) as caught:
        TCPStore(HOST, port, world_size, timeout=timeout)
    assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize("use_libuv", [True, False])
def test_long_keys_and_large_values(use_libuv: bool) -> None:
    master = TCPStore(HOST, 0, is_master=True, use_libuv=use_libuv)
    store = TCPStore(HOST, master.port, use_libuv=use_libuv)
    for key in ("k" * 4096, "k" * 8000):
        store.set(key, key)
        assert master.get(key) == key.encode()
        assert master.delete_key(key)
    value = bytes(range(256)) * 2**12 * 7  # 7 MiB
    store.set("k", value)
    assert master.get("k") == value
    if use_libuv:
        with pytest.raises(ConfigError, match="at most 8191"):
            store.set("k" * 8192, "v")
        with pytest.raises(ValueTooLargeError, match="at most 8388"):
            store.set("k", bytes(8 * 2**20))
        assert master.get("k") == value
    else:
        store.set("k" * 100_000, "v")
        assert master.get("k" * 100_000) == b"v"


@pytest.mark.slow
def test_a_value_of_1_gib() -> None:
    """With about 4 GiB of memory for it."""
    master = TCPStore(HOST, 0, is_master=True, use_libuv=False)
    store = TCPStore(HOST, master.port, use_libuv=False)
    value = bytes(2**30)
    store.set("k", value)
    assert master.get("k") == value


def test_host_port_and_timeout_are_honoured() -> None:
    with socket.create_server((HOST, 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(StoreUnavailableError, match=f"{HOST}:{port}"):
            TCPStore(HOST, port, is_master=True, timeout=1)
    for timeout in (0.3, timedelta(seconds=0.3)):
        with pytest.raises(RuntimeError, match=rf"{HOST}:{port} \(tried for 0\.3 s\)"):
            TCPStore(HOST, port, timeout=timeout)


def test_world_size_is_honoured() -> None:
    with socket.create_server((HOST, 0)) as free:
        port = free.getsockname()[1]
    with pytest.raises(StoreUnavailableError, match="did all 2 processes start"):
        TCPStore(HOST, port, 2, True, timeout=0.5)
    with ThreadPoolExecutor(3) as pool:
        waiting = [pool.submit(TCPStore, HOST, port, 3, rank == 0, LONG) for rank in range(2)]
        assert not any(each.done() for each in waiting)
        stores = [TCPStore(HOST, port, 3, timeout=LONG), *(each.result(60) for each in waiting)]
    stores[0].set("k", "v")
    assert [store.get("k") for store in stores] == [b"v"] * 3


def test_wait_for_workers_is_honoured() -> None:
    master = TCPStore(HOST, 0, 5, True, wait_for_workers=False)
    assert TCPStore(HOST, master.port, 5, wait_for_workers=False).get("k") == b""


def test_multi_tenant_is_honoured() -> None:
    first = TCPStore(HOST, 0, is_master=True, multi_tenant=True)
    second = TCPStore(HOST, first.port, is_master=True, multi_tenant=True)
    second.set("k", "v")
    assert first.get("k") == b"v"
    with pytest.raises(StoreUnavailableError):
        TCPStore(HOST, first.port, is_master=True, timeout=1)


def test_master_listen_fd_is_honoured() -> None:
    listening = socket.create_server((HOST, 0))
    port = listening.getsockname()[1]
    master = TCPStore(HOST, port, is_master=True, master_listen_fd=listening.detach())
    TCPStore(HOST, port).set("k", "v")
    assert master.get("k") == b"v"


def test_torch_takes_the_store_below(master: TCPStore, store: TCPStore) -> None:
    assert not isinstance(store, dist.Store)
    torchs = C10dStore(store.store, timeout=LONG)
    with ThreadPoolExecutor(1) as pool:
        got = pool.submit(torchs.get, "k")
        master.set("k", "v")
        assert got.result(60) == b"v"


def test_a_lost_master(store: TCPStore) -> None:
    master = TCPStore(HOST, 0, is_master=True)
    lonely = TCPStore(HOST, master.port)
    lonely.set("k", "v")
    master.store.close()
    for call in (lambda: lonely.get("k"), lambda: lonely.set("k", "v"), lambda: lonely.add("n", 1), lambda: lonely.delete_key("k")):
        with pytest.raises(StoreUnavailableError, match="is_master=True"):
            call()
    assert str(master.port) in repr(lonely)
