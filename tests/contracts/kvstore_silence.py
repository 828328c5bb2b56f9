"""What every store whose server is a process of its own does while that process stands still: the part of the contract on silence."""

from __future__ import annotations

import math
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import pytest

from etha_ray.errors import StoreClosedError, StoreUnavailableError
from etha_ray.kvstore import KVStore, Lease
from etha_ray.kvstore.patience import ATTEMPT
from etha_ray.testing import eventually

LONG = 100.0
"""Seconds that are never reached, unless something that must end does not."""


def operations(store: KVStore, lease: Lease) -> dict[str, Callable[[], object]]:
    """All that asks a store's server."""
    return {
        "set": lambda: store.set("k", "v"),
        "set_bytes": lambda: store.set_bytes("k", b"v"),
        "get": lambda: store.get("k"),
        "get_bytes": lambda: store.get_bytes("k"),
        "exists": lambda: store.exists("k"),
        "delete": lambda: store.delete("k"),
        "add": lambda: store.add("n", 1),
        "append": lambda: store.append("k", b"v"),
        "compare_and_set": lambda: store.compare_and_set("k", None, b"v"),
        "list": lambda: store.list(),
        "delete_prefix": lambda: store.delete_prefix("k"),
        "watch": lambda: store.watch("k"),
        "lease": lambda: store.lease(60),
        "Lease.set": lambda: lease.set("leased", "v"),
        "Lease.renew": lambda: lease.renew(),
    }


def waits(store: KVStore) -> dict[str, Callable[[float], object]]:
    """All that waits in a store for so many seconds. Made while the server answers."""
    watch = store.watch("never")
    return {
        "wait_for_key": lambda timeout: store.wait_for_key("never", timeout),
        "wait_for_value": lambda timeout: store.wait_for_value("never", "v", timeout),
        "wait_for_keys": lambda timeout: store.wait_for_keys("never*", 1, timeout=timeout),
        "wait_for_keys of candidates": lambda timeout: store.wait_for_keys("never*", 1, timeout=timeout, candidate_keys=["never"]),
        "Watch.next": watch.next,
    }


class SilenceContract:
    """``silent`` makes the server stand still; ``give(store, seconds)`` is as if the store had been made with that timeout, which may be
    too short for a test's busy machine to do anything else."""

    @pytest.fixture
    def open_store(self) -> Callable[[str], KVStore]:
        """By its namespace."""
        raise NotImplementedError

    @pytest.fixture
    def silent(self) -> Callable[[], AbstractContextManager[None]]:
        raise NotImplementedError

    def give(self, store: KVStore, seconds: float) -> None:
        raise NotImplementedError

    @pytest.fixture
    def store(self, open_store: Callable[[str], KVStore]) -> Iterator[KVStore]:
        made = open_store(uuid.uuid4().hex)
        yield made
        made.close()

    @contextmanager
    def given(self, store: KVStore, seconds: float) -> Iterator[None]:
        self.give(store, seconds)
        try:
            yield
        finally:
            self.give(store, math.inf)

    def test_each_call_ends_and_afterwards_all_goes_on(self, store: KVStore, silent: Callable[[], AbstractContextManager[None]]) -> None:
        lease = store.lease(600, renew=False)
        calls = operations(store, lease)
        with ThreadPoolExecutor(len(calls)) as pool:
            with silent(), self.given(store, 0.5):
                for _ in range(2):  # also after one was given up
                    ends = {what: pool.submit(call) for what, call in calls.items()}
                    for what, end in ends.items():
                        with pytest.raises(StoreUnavailableError):
                            print(what, end.result(LONG))
            for what, call in operations(store, lease).items():
                print(what, pool.submit(call).result(LONG))
        lease.close()

    def test_a_wait_ends_in_its_own_time(self, store: KVStore, silent: Callable[[], AbstractContextManager[None]]) -> None:
        calls = waits(store)
        with ThreadPoolExecutor(len(calls)) as pool:
            with silent(), self.given(store, 10 * LONG):
                ends = {what: pool.submit(call, 0.2) for what, call in calls.items()}
                for what, end in ends.items():
                    with pytest.raises(StoreUnavailableError):
                        print(what, end.result(LONG))
            ends = {what: pool.submit(call, LONG) for what, call in calls.items()}
            store.set("never", "v")
            with pytest.raises(Exception, match="never"):  # nobody has set them to "1", which it waits for
                calls["wait_for_keys"](0)
            store.set("never", "1")
            for what in ("wait_for_key", "wait_for_keys", "wait_for_keys of candidates", "Watch.next"):
                print(what, ends[what].result(LONG))
            store.set("never", "v")
            ends["wait_for_value"].result(LONG)

    def test_no_answer_is_taken_for_that_to_another_question(
        self, store: KVStore, silent: Callable[[], AbstractContextManager[None]]
    ) -> None:
        for key in "abc":
            store.set(key, key)
        for key in "abc":
            with silent(), self.given(store, 0.5), pytest.raises(StoreUnavailableError):
                store.get(key)
            assert [store.get(each) for each in "cba"] == [b"c", b"b", b"a"]

    def test_closing(self, open_store: Callable[[str], KVStore], silent: Callable[[], AbstractContextManager[None]]) -> None:
        store = open_store(uuid.uuid4().hex)
        lease = store.lease(3)
        with ThreadPoolExecutor(4) as pool, silent(), self.given(store, 2 * ATTEMPT):
            eventually(lambda: lease.silence > 0)
            calls: list[Future[Any]] = [pool.submit(store.wait_for_key, "never", LONG), pool.submit(store.get, "k")]
            pool.submit(store.close).result(LONG)
            for call in calls:
                with pytest.raises((StoreClosedError, StoreUnavailableError)):
                    call.result(LONG)
