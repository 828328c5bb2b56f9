"""What every key-value store does. A backend's tests inherit `KVStoreContract` and give it ``make_store`` and ``store_in_a_process``.

Here are keys, values, atomic updates, listing and closing; waits, watches and leases have files of their own.
"""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from etha_ray.errors import ConfigError, StoreClosedError, StoreError, ValueTooLargeError
from etha_ray.kvstore import KVStore
from tests.contracts.kvstore_fixtures import AddInParallel, MakeStore, StoreFixtures
from tests.contracts.kvstore_leases import LeaseContract
from tests.contracts.kvstore_waits import WaitContract
from tests.contracts.kvstore_watches import WatchContract
from tests.contracts.store_processes import StoreInAProcess, in_processes

__all__ = ["AddInParallel", "KVStoreContract", "MakeStore", "StoreFixtures", "StoreInAProcess", "in_processes"]

AWKWARD = ["a/b", "/a", "a/", "//", "*", "a*b", "?", "a?", "[", "[a-z]", "a]", "%2F", "a b", ".", "..", ""]
AWKWARD += ["nul\0nul", "naïve", "日本", "\n", "😀"]
BYTES = [b"", b"\0", b"\xff\xfe", b"/*?[", "日本".encode(), bytes(range(256)), b"1"]


class KVStoreContract(WaitContract, WatchContract, LeaseContract):
    """All of it; see `StoreFixtures` for what a backend's tests give."""

    # --- one key ---------------------------------------------------------------------------------------------------------------------

    def test_round_trip(self, store: KVStore, other: KVStore) -> None:
        assert store.get("k") is None
        assert store.get_bytes("k") is None
        assert not store.exists("k")
        assert not store.delete("k")
        store.set("k", "v")
        assert other.get("k") == b"v"
        assert other.get_bytes("k") == b"v"
        assert other.exists("k")
        other.set_bytes("k", b"w")
        assert store.get("k") == b"w"
        assert store.delete("k")
        assert other.get("k") is None
        assert not other.exists("k")
        assert not other.delete("k")

    def test_text_is_utf8(self, store: KVStore) -> None:
        store.set("k", "naïve 日本")
        assert store.get("k") == "naïve 日本".encode()

    def test_awkward_keys_are_each_their_own(self, store: KVStore, other: KVStore) -> None:
        for n, key in enumerate(AWKWARD):
            store.set(key, str(n))
        assert {key: other.get(key) for key in AWKWARD} == {key: str(n).encode() for n, key in enumerate(AWKWARD)}
        assert list(other.list("")) == sorted(AWKWARD)
        assert all(other.delete(key) for key in AWKWARD)
        assert store.list("") == {}

    @pytest.mark.parametrize("value", BYTES)
    def test_values_are_bytes(self, store: KVStore, other: KVStore, value: bytes) -> None:
        store.set_bytes("k", value)
        assert other.get_bytes("k") == value
        assert other.exists("k")
        assert other.list("") == {"k": value}
        assert other.wait_for_key("k", 0) == value

    def test_five_megabytes(self, store: KVStore, other: KVStore) -> None:
        value = bytes(range(256)) * (5_000_000 // 256)
        store.set_bytes("k", value)
        assert other.get_bytes("k") == value

    def test_buffers_are_copied(self, store: KVStore) -> None:
        buffer = bytearray(b"before")
        store.set_bytes("k", memoryview(buffer))
        buffer[:] = b"after!"
        assert store.get("k") == b"before"

    def test_wrong_types(self, store: KVStore) -> None:
        wrong: Any = b"bytes"
        with pytest.raises(TypeError, match="set_bytes"):
            store.set("k", wrong)
        with pytest.raises(TypeError, match="key must be str"):
            store.get(wrong)
        with pytest.raises(TypeError, match="must be bytes"):
            store.set_bytes("k", 5)  # type: ignore[arg-type]
        with pytest.raises(ConfigError, match="UTF-8"):
            store.get("\ud800")
        assert store.list("") == {}

    def test_a_value_over_the_limit_says_the_limit(self, store: KVStore) -> None:
        if store.max_value_bytes is None:
            pytest.skip("no limit")
        store.max_value_bytes = min(store.max_value_bytes, 8 * 2**20)  # not every limit fits into a test's memory
        value = bytes(store.max_value_bytes + 1)
        for write in (
            lambda: store.set_bytes("k", value),
            lambda: store.compare_and_set("k", None, value),
            lambda: store.append("k", value),
        ):
            with pytest.raises(ValueTooLargeError, match=str(store.max_value_bytes)):
                write()
        assert store.get("k") is None
        store.set_bytes("k", value[1:])
        assert store.get("k") == value[1:]

    # --- atomic updates --------------------------------------------------------------------------------------------------------------

    def test_add(self, store: KVStore, other: KVStore) -> None:
        assert store.add("n", 5) == 5
        assert other.add("n", -7) == -2
        assert store.add("n", 0) == -2
        assert store.get("n") == b"-2"
        other.set("n", "40")
        assert store.add("n", 2) == 42
        assert store.add("new", 0) == 0
        assert store.get("new") == b"0"
        store.delete("n")
        assert other.get("n") is None
        assert other.add("n", 1) == 1

    @pytest.mark.parametrize("value", ["abc", "", "12x", " 1", "+1", "1.0", "9" * 30])
    def test_add_to_what_is_not_a_number(self, store: KVStore, value: str) -> None:
        store.set("n", value)
        with pytest.raises(StoreError, match=r"'n'.*64-bit"):
            store.add("n", 1)
        assert store.get("n") == value.encode()

    def test_add_over_64_bits(self, store: KVStore) -> None:
        store.set("n", str(2**63 - 1))
        with pytest.raises(StoreError, match="64 bits"):
            store.add("n", 1)
        assert store.add("n", -1) == 2**63 - 2

    def test_parallel_adds_are_exact(self, store: KVStore, namespace: str, add_in_parallel: AddInParallel) -> None:
        add_in_parallel(namespace, "n", 8, 150)
        assert store.get("n") == b"1200"

    def test_threads_of_one_store_add_exactly(self, store: KVStore, background: ThreadPoolExecutor) -> None:
        results = list(background.map(lambda _: [store.add("n", 1) for _ in range(10)], range(8)))
        assert sorted(n for result in results for n in result) == list(range(1, 81))

    def test_compare_and_set(self, store: KVStore, other: KVStore) -> None:
        assert store.compare_and_set("k", b"1", b"2") is None
        assert not store.exists("k")
        assert store.compare_and_set("k", None, b"1") == b"1"
        assert other.compare_and_set("k", None, b"2") == b"1"
        assert other.compare_and_set("k", b"x", b"2") == b"1"
        assert other.compare_and_set("k", b"1", b"2") == b"2"
        assert store.get("k") == b"2"
        store.set("k", "3")
        assert other.compare_and_set("k", b"2", b"4") == b"3"
        assert other.compare_and_set("k", b"3", b"3") == b"3"
        assert store.compare_and_set("missing", b"3", b"3") is None
        assert not store.exists("missing")
        store.delete("k")
        assert other.compare_and_set("k", b"3", b"4") is None
        assert other.compare_and_set("k", None, b"5") == b"5"

    def test_compare_and_set_tells_empty_from_missing(self, store: KVStore) -> None:
        assert store.compare_and_set("k", b"", b"x") is None
        assert store.compare_and_set("k", None, b"") == b""
        assert store.compare_and_set("k", None, b"x") == b""
        assert store.compare_and_set("k", b"", b"x") == b"x"
        assert store.compare_and_set("k", b"x", b"") == b""
        assert store.exists("k")

    @pytest.mark.parametrize("expected", [None, b"start"])
    def test_compare_and_set_has_one_winner(
        self, make_store: MakeStore, namespace: str, background: ThreadPoolExecutor, expected: bytes | None
    ) -> None:
        stores = [make_store(namespace=namespace) for _ in range(8)]
        if expected is not None:
            stores[0].set_bytes("k", expected)
        start = threading.Barrier(len(stores))

        def compete(n: int) -> bytes | None:
            start.wait()
            return stores[n].compare_and_set("k", expected, b"%d" % n)

        answers = list(background.map(compete, range(len(stores))))
        assert set(answers) == {stores[0].get("k")}
        assert sum(answer == b"%d" % n for n, answer in enumerate(answers)) == 1

    def test_append(self, store: KVStore, other: KVStore) -> None:
        store.append("k", b"\xff\0")
        other.append("k", b"b")
        store.append("k", b"")
        assert other.get("k") == b"\xff\0b"
        store.append("empty", b"")
        assert other.get("empty") == b""
        other.append("empty", b"12")
        assert store.get("empty") == b"12"
        assert store.add("empty", 1) == 13
        assert store.compare_and_set("k", b"\xff\0b", b"c") == b"c"
        store.append("k", b"d")
        assert store.get("k") == b"cd"

    def test_an_appended_empty_value_can_be_compared(self, store: KVStore) -> None:
        store.set("k", "")
        store.append("k", b"a")
        assert store.compare_and_set("k", b"a", b"b") == b"b"
        assert store.get("k") == b"b"

    def test_parallel_appends_lose_nothing(self, make_store: MakeStore, namespace: str, background: ThreadPoolExecutor) -> None:
        stores = [make_store(namespace=namespace) for _ in range(6)]
        list(background.map(lambda store: [store.append("k", b"ab") for _ in range(10)], stores))
        assert stores[0].get("k") == b"ab" * 60

    # --- many keys -------------------------------------------------------------------------------------------------------------------

    def test_list_and_delete_prefix_are_exact(self, store: KVStore, other: KVStore) -> None:
        keys = ["a", "a/", "a/1", "a/2", "ab", "ab/1", "b", "*", "*a"]
        for key in keys:
            store.set(key, key)
        store.add("a/n", 1)
        store.add("a/n", 1)
        assert other.list("a/") == {"a/": b"a/", "a/1": b"a/1", "a/2": b"a/2", "a/n": b"2"}
        assert list(other.list("a")) == ["a", "a/", "a/1", "a/2", "a/n", "ab", "ab/1"]
        assert list(other.list("*")) == ["*", "*a"]
        assert other.list("nothing") == {}
        assert other.delete_prefix("a/") == 4
        assert other.delete_prefix("a/") == 0
        assert list(store.list("")) == sorted(["a", "ab", "ab/1", "b", "*", "*a"])
        assert store.delete_prefix("*") == 2
        assert store.delete_prefix("") == 4
        assert other.list("") == {}

    def test_many_keys(self, store: KVStore) -> None:
        expected = {f"{n:03}": b"%d" % n for n in range(150)}
        for key, value in expected.items():
            store.set_bytes(key, value)
        assert store.list("") == expected
        assert store.delete_prefix("") == 150

    def test_namespaces_and_components_are_apart(self, make_store: MakeStore, namespace: str) -> None:
        places = [
            (namespace, "c"),
            (f"{namespace}2", "c"),
            (namespace, "c2"),
            (f"{namespace}/c", "c"),
            (namespace, "c/c"),
            (f"{namespace}%2Fc", "c"),
            (namespace, "*"),
            (f"{namespace}*", "c"),
        ]
        stores = [make_store(namespace=ns, component=component) for ns, component in places]
        for n, store in enumerate(stores):
            store.set("k", str(n))
            store.set("c/k", str(n))
        for n, store in enumerate(stores):
            assert store.list("") == {"k": b"%d" % n, "c/k": b"%d" % n}
        assert stores[0].delete_prefix("") == 2
        assert [store.exists("k") for store in stores] == [False, *[True] * 7]

    def test_component_of_a_call(self, make_store: MakeStore, namespace: str) -> None:
        store, other = make_store(namespace=namespace, component="a"), make_store(namespace=namespace, component="b")
        store.set("k", "1", component="b")
        assert store.get("k") is None
        assert not store.exists("k")
        assert other.get("k") == b"1"
        assert store.get("k", component="b") == store.get_bytes("k", component="b") == b"1"
        assert store.add("k", 1, component="b") == 2
        store.append("k", b"0", component="b")
        assert store.compare_and_set("k", b"20", b"21", component="b") == b"21"
        assert store.list("", component="b") == {"k": b"21"}
        assert store.wait_for_key("k", 0, component="b") == b"21"
        assert store.wait_for_value("k", "21", 0, component="b") == b"21"
        assert store.wait_for_keys("*", 1, "21", 0, component="b") == ["k"]
        assert store.delete_prefix("", component="b") == 1
        store.set_bytes("k", b"1", component="b")
        assert store.delete("k", component="b")
        assert other.list("") == {}

    @pytest.mark.parametrize(("namespace_", "component"), [("", "c"), ("n", ""), ("\ud800", "c")])
    def test_bad_namespace(self, make_store: MakeStore, namespace_: str, component: str) -> None:
        with pytest.raises(ConfigError, match=r"namespace|component"):
            make_store(namespace=namespace_, component=component)

    # --- closing ---------------------------------------------------------------------------------------------------------------------

    def test_use_after_close(self, store: KVStore, namespace: str) -> None:
        store.close()
        store.close()
        for use in (
            lambda: store.get("k"),
            lambda: store.get_bytes("k"),
            lambda: store.set("k", "v"),
            lambda: store.set_bytes("k", b"v"),
            lambda: store.exists("k"),
            lambda: store.delete("k"),
            lambda: store.add("k", 1),
            lambda: store.append("k", b""),
            lambda: store.compare_and_set("k", None, b""),
            lambda: store.list(""),
            lambda: store.delete_prefix(""),
            lambda: store.wait_for_key("k", 0),
            lambda: store.wait_for_value("k", "v", 0),
            lambda: store.wait_for_keys("k", 1, "1", 0),
            lambda: store.watch(),
            lambda: store.lease(1.0),
        ):
            with pytest.raises(StoreClosedError, match=namespace):
                use()
        assert "closed" in repr(store)

    def test_cleanup_takes_the_namespace_and_nothing_else(self, make_store: MakeStore, namespace: str) -> None:
        store, same = make_store(namespace=namespace), make_store(namespace=namespace, component="more")
        longer = make_store(namespace=f"{namespace}2")
        for each in (store, same, longer):
            each.set("k", "1")
            each.add("k", 1)
        store.close(cleanup=True)
        assert same.list("") == {}
        assert longer.list("") == {"k": b"2"}
        # What a cleaned namespace is used for next does not meet leftovers.
        assert same.add("k", 1) == 1
        assert same.add("k", 1) == 2
        same.close(cleanup=False)
        assert make_store(namespace=namespace, component="more").get("k") == b"2"

    def test_repr(self, store: KVStore, namespace: str) -> None:
        assert namespace in repr(store)
        assert "open" in repr(store)
