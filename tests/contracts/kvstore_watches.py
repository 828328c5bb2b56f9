"""What watches do in every store: the last change of each key is never lost."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from etha_ray.errors import StoreClosedError, StoreTimeoutError
from etha_ray.kvstore import KVStore
from etha_ray.kvstore.watch import KeyEvent, Watch
from tests.contracts.kvstore_fixtures import MakeStore, StoreFixtures
from tests.contracts.store_processes import StoreInAProcess, write_often

WRITERS = 4
WRITES = 150


def replay(watch: Watch) -> dict[str, bytes]:
    """``initial`` with all events on top, up to the one that says that the last of `WRITERS` writers is done."""
    state = dict(watch.initial)
    while sum(key.endswith("/done") for key in state) < WRITERS:
        event = watch.next(60)
        assert event.value != state.get(event.key), "an event tells a change"
        if event.value is None:
            del state[event.key]
        else:
            state[event.key] = event.value
    return state


class WatchContract(StoreFixtures):
    def test_initial_then_changes(self, store: KVStore, other: KVStore) -> None:
        store.set("a/2", "2")
        store.set("a/1", "1")
        store.set("b", "1")
        store.set("a/1", "other", component="c2")
        with store.watch("a/") as watch:
            assert list(watch.initial.items()) == [("a/1", b"1"), ("a/2", b"2")]
            with pytest.raises(StoreTimeoutError, match=r"'a/\*'.*0 s"):
                watch.next(0)
            other.set("a/1", "3")
            assert watch.next(60) == KeyEvent("a/1", b"3")
            other.set("b", "2")
            other.set("a", "2")
            other.set("a/2", "other", component="c2")
            other.delete("a/2")
            assert watch.next(60) == KeyEvent("a/2", None)
            other.set_bytes("a/2", b"\xff\0")
            assert watch.next(60) == KeyEvent("a/2", b"\xff\0")
            assert other.add("a/n", 1) == 1
            assert watch.next(60) == KeyEvent("a/n", b"1")
            other.append("a/n", b"0")
            assert watch.next(60) == KeyEvent("a/n", b"10")
            assert other.compare_and_set("a/*", None, b"") == b""
            assert watch.next(60) == KeyEvent("a/*", b"")
            other.delete_prefix("a/")
            assert {watch.next(60) for _ in range(4)} == {KeyEvent(f"a/{key}", None) for key in ("1", "2", "n", "*")}
            with pytest.raises(StoreTimeoutError) as caught:
                watch.next(0.1)
            assert isinstance(caught.value, TimeoutError)
            assert list(watch.initial) == ["a/1", "a/2"]

    def test_component_of_a_watch(self, make_store: MakeStore, store: KVStore, namespace: str) -> None:
        elsewhere = make_store(namespace=namespace, component="c2")
        elsewhere.set("k", "1")
        with store.watch(component="c2") as watch:
            assert watch.initial == {"k": b"1"}
            elsewhere.delete("k")
            assert watch.next(60) == KeyEvent("k", None)

    def test_deleted_and_made_again(self, store: KVStore, other: KVStore) -> None:
        store.set("k", "1")
        with store.watch() as watch:
            other.delete("k")
            other.set("k", "2")
            events = []
            while not events or events[-1] != KeyEvent("k", b"2"):
                events.append(watch.next(60))
            assert events[:-1] in ([], [KeyEvent("k", None)])
            with pytest.raises(StoreTimeoutError):
                watch.next(0)

    def test_a_waiting_watch_sees_every_change_that_it_waits_for(
        self, store: KVStore, other: KVStore, background: ThreadPoolExecutor
    ) -> None:
        with store.watch() as watch:
            for n in range(50):
                event = background.submit(watch.next, 60)
                other.set("k", str(n))
                assert event.result(60) == KeyEvent("k", b"%d" % n)

    def test_a_storm_of_threads(self, make_store: MakeStore, store: KVStore, namespace: str, background: ThreadPoolExecutor) -> None:
        store.set("0/0", "before")
        writing = [make_store(namespace=namespace) for _ in range(WRITERS)]
        with store.watch() as watch:
            done = [background.submit(write_often, writer, str(n), WRITES) for n, writer in enumerate(writing)]
            assert replay(watch) == store.list("")
            for each in done:
                each.result(60)

    def test_a_storm_of_processes(self, store: KVStore, namespace: str, store_in_a_process: StoreInAProcess) -> None:
        with store.watch() as watch:
            processes = [store_in_a_process(namespace, write_often, str(n), WRITES) for n in range(WRITERS)]
            assert replay(watch) == store.list("")
            for process in processes:
                process.join()

    def test_a_watch_holds_up_nobody(self, store: KVStore, background: ThreadPoolExecutor) -> None:
        with store.watch("k") as watch:
            event = background.submit(watch.next, 60)
            for n in range(20):
                store.set("other", str(n))
                assert store.get("other") == b"%d" % n
            assert not event.done()
            store.set("k", "1")
            assert event.result(60) == KeyEvent("k", b"1")

    def test_cleaning_up_is_a_change(self, make_store: MakeStore, store: KVStore, namespace: str) -> None:
        store.set("k", "1")
        with store.watch() as watch:
            make_store(namespace=namespace).close(cleanup=True)
            assert watch.next(60) == KeyEvent("k", None)

    def test_close_the_watch_while_it_waits(self, store: KVStore, background: ThreadPoolExecutor) -> None:
        watch, iterated = store.watch("a"), store.watch("b")
        waiting, iterating = background.submit(watch.next, 60), background.submit(list, iterated)
        store.set("b", "1")
        assert "open" in repr(watch)
        watch.close()
        with pytest.raises(StoreClosedError, match="watch"):
            waiting.result(60)
        with pytest.raises(StoreClosedError, match="watch"):
            watch.next(0)
        iterated.close()
        assert iterating.result(60) in ([], [KeyEvent("b", b"1")])
        watch.close()
        assert "closed" in repr(watch)
        store.set("a", "1")
        assert store.get("a") == b"1"

    def test_close_the_store_while_a_watch_waits(self, store: KVStore, other: KVStore, background: ThreadPoolExecutor) -> None:
        watch, iterated = store.watch(), store.watch()
        waiting, iterating = background.submit(watch.next, 60), background.submit(list, iterated)
        store.close(cleanup=False)
        for each in (waiting, iterating):
            with pytest.raises(StoreClosedError, match="closed"):
                each.result(60)
        with pytest.raises(StoreClosedError, match="closed"):
            watch.next(0)
        watch.close()
        iterated.close()
        other.set("k", "1")
        assert other.get("k") == b"1"

    def test_iterating(self, store: KVStore, other: KVStore, background: ThreadPoolExecutor) -> None:
        with store.watch() as watch:

            def take() -> Iterator[KeyEvent]:
                for event in watch:
                    yield event
                    if event.key == "last":
                        return

            events = background.submit(lambda: list(take()))
            other.set("a", "1")
            other.set("last", "1")
            assert set(events.result(60)) == {KeyEvent("a", b"1"), KeyEvent("last", b"1")}
