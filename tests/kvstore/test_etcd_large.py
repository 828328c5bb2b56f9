"""Values over a chunk: what is in etcd for them, and what readers see while others write, are killed, and etcd is compacted."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from etha_ray.errors import StoreError, ValueTooLargeError
from etha_ray.kvstore import EtcdStore
from etha_ray.kvstore.etcd import _CHUNK, _MARK
from etha_ray.kvstore.etcd_txn import Commit, Transactions
from etha_ray.testing.etcd_server import EtcdAddress
from tests.kvstore.etcd_server import open_store


@pytest.fixture
def store(etcd: EtcdAddress, namespace: str) -> Iterator[EtcdStore]:
    store = open_store(etcd, namespace)
    yield store
    store.close()


def chunk_count(raw: Any, namespace: str) -> int:
    return len(list(raw.get_prefix(f"{namespace}/%chunk/", keys_only=True)))


def large(seed: int, size: int = 3 * _CHUNK + 1) -> bytes:
    return random.Random(seed).randbytes(size)


@pytest.mark.parametrize("size", [_CHUNK, _CHUNK + 1, 2 * _CHUNK, 2 * _CHUNK + 1])
def test_sizes_around_a_chunk(store: EtcdStore, raw: Any, namespace: str, size: int) -> None:
    store.set_bytes("k", large(1, size))
    assert store.get("k") == large(1, size)
    assert store.list() == {"k": large(1, size)}
    assert chunk_count(raw, namespace) == (0 if size == _CHUNK else -(-size // _CHUNK))


def test_a_value_that_looks_like_a_pointer(store: EtcdStore) -> None:
    for value in (_MARK, _MARK + bytes(24), _MARK + large(1)):
        store.set_bytes("k", value)
        assert store.get("k") == value
        assert store.compare_and_set("k", value, b"x") == b"x"


def test_chunks_go_with_their_value(store: EtcdStore, raw: Any, namespace: str) -> None:
    store.set_bytes("a", large(1))
    store.set_bytes("a\xff", large(2))
    store.set_bytes("ab", large(3))
    assert chunk_count(raw, namespace) == 12
    store.set_bytes("a", large(4))
    assert chunk_count(raw, namespace) == 12
    store.append("a", large(5))
    assert store.get("a") == large(4) + large(5)
    store.set("a", "small")
    assert chunk_count(raw, namespace) == 8
    assert store.list() == {"a": b"small", "a\xff": large(2), "ab": large(3)}
    assert store.delete("ab")
    assert not store.delete("ab")
    assert chunk_count(raw, namespace) == 4
    assert store.compare_and_set("a", b"other", large(6)) == b"small"
    assert store.compare_and_set("a", b"small", large(6)) == large(6)
    assert store.delete_prefix("a") == 2
    assert chunk_count(raw, namespace) == 0
    assert store.list() == {}


def test_chunks_go_with_their_lease(store: EtcdStore, raw: Any, namespace: str) -> None:
    with store.lease(600) as lease:
        lease.set_bytes("k", large(1))
        lease.set_bytes("taken", large(2))
        store.set_bytes("taken", large(3))
        assert chunk_count(raw, namespace) == 8
    assert store.list() == {"taken": large(3)}
    assert chunk_count(raw, namespace) == 4


def test_over_the_limit_after_appending(store: EtcdStore) -> None:
    store.max_value_bytes = 2 * _CHUNK
    store.set_bytes("k", bytes(2 * _CHUNK - 1))
    with pytest.raises(ValueTooLargeError, match=str(2 * _CHUNK)):
        store.append("k", b"12")
    store.append("k", b"1")


# --- large values, and others at work ----------------------------------------------------------------------------------------------------


class Killed(BaseException):
    pass


@pytest.fixture
def before_commit(monkeypatch: pytest.MonkeyPatch) -> dict[int, Any]:
    """What a test puts in here is called before the n-th change, counted from 0, that any store of this process makes."""
    actions: dict[int, Any] = {}
    count = 0
    commit = Transactions.commit

    def interrupted(self: Transactions, compare: Sequence[Any], success: Sequence[Any], tolerated: str = "") -> Commit | None:
        nonlocal count
        count += 1
        action = actions.pop(count - 1, None)
        if action is not None:
            action()
        return commit(self, compare, success, tolerated)

    monkeypatch.setattr(Transactions, "commit", interrupted)
    return actions


def die() -> None:
    raise Killed


def write_twice(store: EtcdStore) -> None:
    store.set_bytes("k", large(1))
    store.set("k", "v")


@pytest.mark.parametrize("at", range(6))
@pytest.mark.parametrize("heal", ["set", "set large", "delete_prefix", "close"])
def test_a_writer_that_was_killed(etcd: EtcdAddress, raw: Any, namespace: str, before_commit: dict[int, Any], at: int, heal: str) -> None:
    store = open_store(etcd, namespace)
    before_commit[at] = die
    with pytest.raises(Killed):
        write_twice(store)
    if at < 5:
        assert store.get("k") is None
        assert store.list() == {}
        assert chunk_count(raw, namespace) == at
    else:
        assert store.get("k") == large(1)
    if heal == "set":
        store.set("k", "v")
        assert store.get("k") == b"v"
    elif heal == "set large":
        store.set_bytes("k", large(2))
        assert store.get("k") == large(2)
        store.delete("k")
    elif heal == "delete_prefix":
        assert store.delete_prefix("") == (at == 5)
    store.close(cleanup=heal == "close")
    assert chunk_count(raw, namespace) == 0


@pytest.mark.parametrize("at", range(1, 5))
@pytest.mark.parametrize("other", ["set", "set large", "delete", "delete_prefix", "clean up"])
def test_another_writer_in_between(etcd: EtcdAddress, raw: Any, namespace: str, before_commit: dict[int, Any], at: int, other: str) -> None:
    """Another removes the chunks of a writer at work: its value is whole all the same, and nothing is left over."""
    store, rival = open_store(etcd, namespace), open_store(etcd, namespace)
    store.set("k", "start")
    act = {
        "set": lambda: rival.set("k", "v"),
        "set large": lambda: rival.set_bytes("k", large(7)),
        "delete": lambda: rival.delete("k"),
        "delete_prefix": lambda: rival.delete_prefix(""),
        "clean up": lambda: rival.close(cleanup=True),
    }[other]
    before_commit[at + 1] = act
    store.set_bytes("k", large(1))
    assert store.get("k") == large(1)
    assert chunk_count(raw, namespace) == 4
    store.close()


@pytest.mark.parametrize("at", range(1, 5))
def test_an_update_that_comes_too_late_leaves_nothing(
    etcd: EtcdAddress, raw: Any, namespace: str, before_commit: dict[int, Any], at: int
) -> None:
    store, rival = open_store(etcd, namespace), open_store(etcd, namespace)
    store.set("k", "start")
    before_commit[at + 1] = lambda: rival.set("k", "other")
    assert store.compare_and_set("k", b"start", large(1)) == b"other"
    assert chunk_count(raw, namespace) == 0
    store.append("k", large(2))
    assert rival.get("k") == b"other" + large(2)
    rival.close()
    store.close()


def test_readers_see_whole_values(etcd: EtcdAddress, raw: Any, namespace: str) -> None:
    """While several replace and remove a value of many chunks, and etcd is compacted, each read gives one of those stored."""
    stores = [open_store(etcd, namespace) for _ in range(6)]
    stop = threading.Event()
    valid = {None, b"small", *(large(n) for n in range(3))}

    def write(n: int) -> None:
        for _ in range(15):
            stores[n].set_bytes("k", large(n))
            if n == 0:
                stores[n].delete("k")
            elif n == 1:
                stores[n].set("k", "small")
            else:
                raw.compact(raw.get_response("x").header.revision)

    def read(n: int) -> int:
        count = 0
        while not stop.is_set():
            assert stores[n].get("k") in valid
            assert stores[n].list().get("k") in valid
            count += 1
        return count

    with ThreadPoolExecutor(6) as pool:
        readers = [pool.submit(read, n) for n in range(3, 6)]
        writers = [pool.submit(write, n) for n in range(3)]
        try:
            for writer in writers:
                writer.result(100)
        finally:
            stop.set()
        assert all(reader.result(30) for reader in readers)
    assert chunk_count(raw, namespace) in (0, 4)
    stores[0].set("k", "end")
    assert chunk_count(raw, namespace) == 0
    for store in stores:
        store.close()


def test_compacted_between_pointer_and_chunks(store: EtcdStore, raw: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    store.set_bytes("k", large(1))
    read, rounds = store._client.read, 0

    def compacting(start: bytes, end: bytes, revision: int = 0) -> Any:
        nonlocal rounds
        if b"%chunk" in start and rounds < 3:
            rounds += 1
            store.set_bytes("k", large(1 + rounds))
            raw.compact(raw.get_response("x").header.revision)
        return read(start, end, revision)

    monkeypatch.setattr(store._client, "read", compacting)
    assert store.get("k") == large(4)
    rounds = 0
    assert store.list() == {"k": large(4)}


def test_chunks_that_somebody_has_removed(store: EtcdStore, raw: Any, namespace: str) -> None:
    store.set_bytes("k", large(1))
    key = next(iter(raw.get_prefix(f"{namespace}/%chunk/", keys_only=True)))[1].key
    raw.delete(key)
    with pytest.raises(StoreError, match="set it again"):
        store.get("k")
    store.set("k", "v")
    assert store.get("k") == b"v"
