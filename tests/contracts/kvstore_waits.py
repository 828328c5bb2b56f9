"""What waits do in every store, whether it can tell of changes or polls."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from etha_ray.errors import ConfigError, StoreClosedError, StoreTimeoutError
from etha_ray.kvstore import KVStore
from tests.contracts.kvstore_fixtures import StoreFixtures


class WaitContract(StoreFixtures):
    def test_wait_started_after_the_put(self, store: KVStore, other: KVStore) -> None:
        other.set("k", "v")
        assert store.wait_for_key("k", 0) == b"v"
        assert store.wait_for_value("k", "v", 0) == b"v"
        assert store.wait_for_value("k", b"v", 0) == b"v"

    def test_wait_started_before_the_put(self, store: KVStore, other: KVStore, background: ThreadPoolExecutor) -> None:
        waits = [background.submit(store.wait_for_key, f"k{n}", 30) for n in range(3)]
        waits.append(background.submit(store.wait_for_value, "k0", "v", 30))
        time.sleep(0.2)
        assert not any(wait.done() for wait in waits)
        for n in range(3):
            other.set(f"k{n}", "v")
        assert [wait.result(30) for wait in waits] == [b"v"] * 4

    def test_wait_started_during_the_put(self, store: KVStore, other: KVStore, background: ThreadPoolExecutor) -> None:
        for n in range(50):
            wait = background.submit(store.wait_for_key, f"k{n}", 30)
            other.set(f"k{n}", "v")
            assert wait.result(30) == b"v"

    def test_a_wait_holds_up_nobody(self, store: KVStore, background: ThreadPoolExecutor) -> None:
        waits = [background.submit(store.wait_for_key, "k", 30) for _ in range(8)]
        time.sleep(0.05)
        for n in range(20):
            store.set("other", str(n))
            assert store.get("other") == b"%d" % n
        assert not any(wait.done() for wait in waits)
        store.set("k", "v")
        assert [wait.result(30) for wait in waits] == [b"v"] * 8

    def test_wait_for_keys(self, store: KVStore, other: KVStore, background: ThreadPoolExecutor) -> None:
        other.set("rank/1/ready", "1")
        other.set("rank/2/ready", "0")
        other.set("rank/2/other", "1")
        wait = background.submit(store.wait_for_keys, "rank/*/ready", 3, "1", 30)
        other.set("rank/10/ready", "1")
        time.sleep(0.1)
        assert not wait.done()
        other.set("rank/2/ready", "1")
        assert wait.result(30) == ["rank/1/ready", "rank/10/ready", "rank/2/ready"]
        other.set("rank/2/ready", "x")
        assert store.wait_for_keys("rank/*/ready", 3, None, 0) == ["rank/1/ready", "rank/10/ready", "rank/2/ready"]
        assert store.wait_for_keys("rank/*/ready", 0, "1", 0) == ["rank/1/ready", "rank/10/ready"]
        assert store.wait_for_keys("nothing", 0, "1", 0) == []

    def test_wait_for_keys_of_candidates(self, store: KVStore, other: KVStore, background: ThreadPoolExecutor) -> None:
        other.set("r0", "1")
        other.set("r9", "1")
        wait = background.submit(store.wait_for_keys, "r*", 2, "1", 30, ["r1", "r0", "r2", "x", "r0"])
        time.sleep(0.1)
        assert not wait.done()
        other.set("x", "1")
        other.set("r2", "1")
        assert wait.result(30) == ["r0", "r2"]
        with pytest.raises(ConfigError, match="only 3"):
            store.wait_for_keys("r*", 4, "1", 0, ["r0", "r1", "r2", "x"])
        with pytest.raises(ConfigError, match="negative"):
            store.wait_for_keys("r*", -1)

    @pytest.mark.parametrize(
        ("pattern", "expected"),
        [
            ("a?[b].*", ["a?[b].", "a?[b].\n1", "a?[b].1"]),
            ("a?[b].1", ["a?[b].1"]),
            ("*1", ["1", "a?[b].\n1", "a?[b].1", "axb.1"]),
            ("*[b]*", ["a?[b].", "a?[b].\n1", "a?[b].1"]),
            ("a**1", ["a?[b].\n1", "a?[b].1", "axb.1"]),
        ],
    )
    def test_only_the_star_is_a_wildcard(self, store: KVStore, pattern: str, expected: list[str]) -> None:
        keys = ["a?[b].", "a?[b].1", "a?[b].\n1", "axb.1", "1", "*x"]
        for key in keys:
            store.set(key, "1")
        assert store.wait_for_keys(pattern, len(expected), "1", 0) == expected
        assert store.wait_for_keys(pattern, len(expected), "1", 0, keys) == expected

    def test_timeouts(self, store: KVStore) -> None:
        store.set("there", "0")
        watch = store.watch("the")
        for timeout in (0, 0.3):
            for wait, names in (
                (lambda t: store.wait_for_key("missing", t), ["missing"]),
                (lambda t: store.wait_for_value("there", "1", t), ["there", "b'0'"]),
                (lambda t: store.wait_for_keys("the*", 2, "0", t), ["1 of 2", "the\\*", "there"]),
                (lambda t: store.wait_for_keys("the*", 1, "1", t, ["there"]), ["0 of 1", "the\\*"]),
                (watch.next, ["'the\\*'"]),
            ):
                start = time.monotonic()
                with pytest.raises(StoreTimeoutError, match=".*".join([*names, f"{timeout:g} s"])) as caught:
                    wait(timeout)
                assert isinstance(caught.value, TimeoutError)
                assert 0.9 * timeout <= time.monotonic() - start < timeout + 30  # early is wrong, late is a loaded machine

    def test_timeouts_are_kept_within_a_tenth(self, store: KVStore) -> None:
        """Never early, and late only where the machine has something else to do, which it has not ten times in a row."""
        timeout = 0.5
        for _ in range(10):
            start = time.monotonic()
            with pytest.raises(StoreTimeoutError):
                store.wait_for_key("missing", timeout)
            seconds = time.monotonic() - start
            assert seconds >= timeout
            if seconds <= 1.1 * timeout:
                return
        pytest.fail(f"the last of ten waits of {timeout} s took {seconds} s")

    def test_delete_while_waiting(self, store: KVStore, other: KVStore, background: ThreadPoolExecutor) -> None:
        other.set("k", "old")
        wait = background.submit(store.wait_for_value, "k", "new", 30)
        time.sleep(0.05)
        other.delete("k")
        time.sleep(0.05)
        assert not wait.done()
        other.set("k", "new")
        assert wait.result(30) == b"new"

    def test_reads_never_wait_while_a_key_comes_and_goes(self, store: KVStore, other: KVStore, background: ThreadPoolExecutor) -> None:
        def flicker() -> None:
            for _ in range(150):
                other.set("k", "v")
                other.delete("k")

        done = background.submit(flicker)
        while not done.done():
            assert store.get("k") in (None, b"v")
            assert store.list("") in ({}, {"k": b"v"})
        done.result()

    def test_close_while_waiting(self, store: KVStore, other: KVStore, background: ThreadPoolExecutor) -> None:
        waits = [
            background.submit(store.wait_for_key, "k", 60),
            background.submit(store.wait_for_value, "k", "v", 60),
            background.submit(store.wait_for_keys, "k*", 1, "1", 60),
        ]
        time.sleep(0.1)
        store.close(cleanup=False)
        for wait in waits:
            with pytest.raises(StoreClosedError, match="closed"):
                wait.result(20)
        other.set("k", "v")
        assert other.get("k") == b"v"
