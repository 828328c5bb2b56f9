"""What leases do in every store: their keys are ordinary keys until the lease is over, and then they are not there."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest

from etha_ray.errors import ConfigError, LeaseExpiredError, StoreClosedError, StoreTimeoutError, ValueTooLargeError
from etha_ray.kvstore import KVStore
from etha_ray.kvstore.lease import Lease
from etha_ray.kvstore.watch import KeyEvent
from tests.contracts.kvstore_fixtures import MakeStore, StoreFixtures
from tests.contracts.store_processes import StoreInAProcess, hold_lease, leased

SHORT = 1.0
"""Seconds asked for where a test waits for the end of a lease. A backend may grant more, so tests go by `Lease.ttl`."""
KEPT = 6.0
"""Where a test needs the lease to be renewed in time, on a machine that may stand still for some seconds."""
OWNED = 3.0
"""The same, where its end is waited for, too."""
LONG = 600.0


def gone(store: KVStore, *keys: str) -> None:
    """Waits until none of the keys is there."""
    deadline = time.monotonic() + 60
    while any(store.exists(key) for key in keys):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def ended(lease: Lease) -> None:
    """Waits until the lease is over as its owner sees it."""
    deadline = time.monotonic() + 60
    while lease.alive:
        assert time.monotonic() < deadline
        time.sleep(0.02)


class LeaseContract(StoreFixtures):
    def test_leased_keys_are_keys(self, store: KVStore, other: KVStore) -> None:
        with store.lease(LONG) as lease:
            assert lease.alive
            assert lease.ttl >= LONG
            lease.set("n/text", "naïve")
            lease.set_bytes("n/empty", b"")
            lease.set("elsewhere", "1", component="c2")
            other.set("n/own", "1")
            assert other.list("n/") == {"n/empty": b"", "n/own": b"1", "n/text": "naïve".encode()}
            assert other.get("n/empty") == other.wait_for_key("n/empty", 0) == b""
            assert other.exists("n/empty")
            assert other.wait_for_value("n/text", "naïve", 0) == "naïve".encode()
            assert other.wait_for_keys("n/*", 3, None, 0) == ["n/empty", "n/own", "n/text"]
            assert other.get("elsewhere", component="c2") == b"1"
            assert other.get("elsewhere") is None
            assert other.compare_and_set("n/text", None, b"x") == "naïve".encode()
            assert other.compare_and_set("n/text", b"y", b"x") == "naïve".encode()
            assert other.delete("n/text")
            assert not store.delete("n/text")
            assert store.delete_prefix("n/") == 2
            assert "alive" in repr(lease)
        assert "over" in repr(lease)

    def test_large_values_under_a_lease(self, store: KVStore, other: KVStore) -> None:
        value = bytes(range(256)) * (5_000_000 // 256)
        with store.lease(LONG) as lease:
            lease.set_bytes("k", value)
            assert other.get("k") == value
            if store.max_value_bytes is not None:
                store.max_value_bytes = min(store.max_value_bytes, 8 * 2**20)
                longest = bytes(store.max_value_bytes)
                with pytest.raises(ValueTooLargeError, match=str(store.max_value_bytes)):
                    lease.set_bytes("k", longest + b"\0")
                lease.set_bytes("k", longest)
                assert other.get("k") == longest

    def test_close_removes_the_keys_at_once(self, store: KVStore, other: KVStore) -> None:
        lease, more = store.lease(LONG), store.lease(LONG, renew=False)
        for n in range(20):
            lease.set(f"k{n}", "1")
        lease.set("k", "1", component="c2")
        more.set("of another lease", "1")
        lease.close()
        assert list(other.list("")) == ["of another lease"]
        assert other.list("", component="c2") == {}
        assert not lease.alive
        for use in (lambda: lease.set("k", "1"), lambda: lease.set_bytes("k", b"1"), lease.renew):
            with pytest.raises(LeaseExpiredError, match="closed"):
                use()
        lease.close()
        assert other.list("", component="c2") == {}
        assert more.alive
        more.renew()
        more.close()
        assert other.list("") == {}

    def test_what_is_written_otherwise_stays(self, store: KVStore, other: KVStore) -> None:
        with store.lease(LONG) as lease, store.lease(LONG) as heir:
            for key in ("set", "add", "append", "append nothing", "compare", "compare same", "deleted", "heir's", "kept"):
                lease.set(key, "1")
            lease.set_bytes("append to empty", b"")
            other.set("set", "2")
            assert other.add("add", 1) == 2
            other.append("append", b"2")
            other.append("append nothing", b"")
            other.append("append to empty", b"2")
            assert other.compare_and_set("compare", b"1", b"2") == b"2"
            assert other.compare_and_set("compare same", b"1", b"1") == b"1"
            assert other.delete("deleted")
            other.set("deleted", "2")
            heir.set("heir's", "2")
            heir.set("back", "1")
            lease.set("back", "2")
            lease.close()
            expected = {"set": b"2", "add": b"2", "append": b"12", "append nothing": b"1", "append to empty": b"2", "compare": b"2"}
            expected |= {"compare same": b"1", "deleted": b"2"}
            assert other.list("") == dict(sorted({**expected, "heir's": b"2"}.items()))
        assert other.list("") == dict(sorted(expected.items()))

    def test_what_has_run_out_is_missing(self, store: KVStore, other: KVStore) -> None:
        start = time.monotonic()
        lease = leased(store, SHORT, "get", "list/1", "list/2", "compare", "compare old", "delete", "number", "text", "wait", value="5")
        store.set("list/own", "1")
        # On a machine that stands still they may be gone before they are looked at.
        assert other.get("get") == b"5" or time.monotonic() >= start + lease.ttl
        gone(other, "get", "list/1")
        assert time.monotonic() >= start + 0.9 * lease.ttl
        ended(lease)
        for each in (store, other):
            assert each.get("get") is None
            assert not each.exists("get")
            assert each.list("") == {"list/own": b"1"}
            assert not each.delete("delete")
            assert each.compare_and_set("compare old", b"5", b"6") is None
            for wait in (
                lambda each=each: each.wait_for_key("wait", 0),
                lambda each=each: each.wait_for_value("wait", "5", 0),
                lambda each=each: each.wait_for_keys("wait*", 1, None, 0),
                lambda each=each: each.wait_for_keys("wait*", 1, "5", 0, ["wait"]),
            ):
                with pytest.raises(StoreTimeoutError):
                    wait()
        assert other.compare_and_set("compare", None, b"6") == b"6"
        assert other.add("number", 1) == 1
        other.append("text", b"a")
        assert store.get("text") == b"a"
        assert other.delete_prefix("list/") == 1
        for use in (lambda: lease.set("get", "6"), lease.renew):
            with pytest.raises(LeaseExpiredError, match=r"keys are gone.*new"):
                use()
        assert store.list("") == {"compare": b"6", "number": b"1", "text": b"a"}
        lease.close()
        assert store.list("") == {"compare": b"6", "number": b"1", "text": b"a"}

    def test_renewed_keys_stay(self, store: KVStore, other: KVStore) -> None:
        with store.lease(KEPT) as kept, store.lease(kept.ttl, renew=False) as by_hand:
            kept.set("kept", "1")
            by_hand.set("by hand", "1")
            with other.watch() as watch:
                deadline = time.monotonic() + 1.1 * kept.ttl
                while time.monotonic() < deadline:
                    with pytest.raises(StoreTimeoutError):
                        watch.next(min(by_hand.ttl / 6, deadline - time.monotonic()))
                    by_hand.renew()
            assert kept.alive
            assert by_hand.alive
            assert list(other.list("")) == ["by hand", "kept"]

    def test_one_of_many_takes_over_what_has_run_out(self, make_store: MakeStore, namespace: str, background: ThreadPoolExecutor) -> None:
        stores = [make_store(namespace=namespace) for _ in range(6)]
        leased(stores[0], SHORT, "leader", value="old")

        def take_over(n: int) -> bytes | None:
            deadline = time.monotonic() + 60
            while (now := stores[n].compare_and_set("leader", None, b"%d" % n)) == b"old":
                assert time.monotonic() < deadline
            return now

        answers = list(background.map(take_over, range(len(stores))))
        assert set(answers) == {stores[0].get("leader")}
        assert sum(answer == b"%d" % n for n, answer in enumerate(answers)) == 1

    def test_a_watch_sees_what_runs_out(self, store: KVStore, other: KVStore, background: ThreadPoolExecutor) -> None:
        leased(store, SHORT, "k")
        with other.watch() as watch:
            if "k" in watch.initial:  # else the machine stood still for so long
                assert watch.next(60) == KeyEvent("k", None)
        with store.lease(LONG) as lease, other.watch() as watch:
            lease.set("k", "2")
            assert watch.next(60) == KeyEvent("k", b"2")
            waiting = background.submit(watch.next, 60)
            lease.close()
            assert waiting.result(60) == KeyEvent("k", None)

    def test_a_wait_does_not_take_what_runs_out(self, store: KVStore, other: KVStore, background: ThreadPoolExecutor) -> None:
        leased(store, SHORT, "k")
        wait = background.submit(other.wait_for_keys, "k*", 2, "1", 60)
        gone(other, "k")
        store.set("k2", "1")
        store.set("k3", "1")
        assert wait.result(60) == ["k2", "k3"]

    def test_a_killed_owner(self, store: KVStore, namespace: str, store_in_a_process: StoreInAProcess) -> None:
        owner = store_in_a_process(namespace, hold_lease, OWNED)
        store.wait_for_key("ttl", 60)
        assert list(store.list("held/")) == ["held/a", "held/b"]
        store.set("held/b", "2")
        with store.watch("held/") as watch:
            owner.kill()
            assert watch.next(60) == KeyEvent("held/a", None)
        assert store.list("held/") == {"held/b": b"2"}
        assert store.compare_and_set("held/a", None, b"mine") == b"mine"

    def test_an_owner_that_was_stopped_too_long(self, store: KVStore, namespace: str, store_in_a_process: StoreInAProcess) -> None:
        owner = store_in_a_process(namespace, hold_lease, SHORT)
        store.wait_for_key("ttl", 60)
        os.kill(owner.pid, signal.SIGSTOP)
        gone(store, "held/a", "held/b")
        os.kill(owner.pid, signal.SIGCONT)
        store.set("go", "1")
        assert store.wait_for_key("outcome", 60) == b"expired"
        assert store.list("held/") == {}

    def test_closing_the_store_closes_its_leases(self, make_store: MakeStore, store: KVStore, namespace: str) -> None:
        for cleanup in (False, True):
            store.set("own", "1")
            closing = make_store(namespace=f"{namespace}/2" if cleanup else namespace)
            seen = make_store(namespace=closing.namespace)
            with store.lease(LONG) as kept:
                kept.set("kept", "1")
                lease = closing.lease(LONG)
                lease.set("k", "1")
                closing.close(cleanup=cleanup)
                assert not lease.alive
                assert seen.get("k") is None
                assert list(store.list("")) == ["kept", "own"]
            for use in (lambda lease=lease: lease.set("k", "1"), lambda lease=lease: lease.renew()):
                with pytest.raises(StoreClosedError, match=namespace):
                    use()
            lease.close()

    def test_nothing_of_a_lease_is_left_that_was_closed_while_in_use(
        self, store: KVStore, other: KVStore, background: ThreadPoolExecutor
    ) -> None:
        lease = store.lease(LONG)

        def set_often(thread: int) -> None:
            for n in range(100_000):
                lease.set(f"{thread}/{n % 10}", "1")

        setting = [background.submit(set_often, thread) for thread in range(4)]
        for thread in range(4):
            store.wait_for_key(f"{thread}/0", 60)
        lease.close()
        for each in setting:
            with pytest.raises(LeaseExpiredError):
                each.result(60)
        assert other.list("") == {}

    def test_a_cleaned_namespace_takes_leases_with_it(self, make_store: MakeStore, store: KVStore, namespace: str) -> None:
        with store.lease(LONG) as lease:
            lease.set("k", "1")
            make_store(namespace=namespace).close(cleanup=True)
            assert store.list("") == {}
        store.set("k", "2")
        assert store.get("k") == b"2"

    @pytest.mark.parametrize("ttl", [0, -1, float("inf"), float("nan")])
    def test_impossible_ttl(self, store: KVStore, ttl: float) -> None:
        with pytest.raises(ConfigError, match="above 0"):
            store.lease(ttl)

    def test_wrong_types_under_a_lease(self, store: KVStore) -> None:
        wrong: Callable[[], None]
        with store.lease(LONG) as lease:
            for wrong in (
                lambda: lease.set("k", b"1"),  # type: ignore[arg-type]
                lambda: lease.set_bytes("k", 1),  # type: ignore[arg-type]
                lambda: lease.set(1, "1"),  # type: ignore[arg-type]
            ):
                with pytest.raises(TypeError):
                    wrong()
        assert store.list("") == {}
