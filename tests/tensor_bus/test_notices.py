"""What workers let one another know before they are a pair."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from etha_ray.errors import CoordinateTakenError, StoreError
from etha_ray.tensor_bus.board import Board
from etha_ray.tensor_bus.records import fingerprint, notice_prefix
from etha_ray.testing import eventually
from tests.tensor_bus.cluster import connect, local_cluster, process_cluster


def test_notices_of_a_topic_are_read_by_all_until_their_worker_leaves() -> None:
    with local_cluster(2) as cluster:
        one, two = cluster.client(0), cluster.client(1)
        Board(one, "topic/1").announce("a/0", b"\x00first", body=b"body")
        Board(two, "topic/1").announce("b 1", b"second", body=b"body")
        Board(two, "topic/2").announce("a/0", b"elsewhere")
        for client in (one, two):
            assert Board(client, "topic/1").read() == {"a/0": b"\x00first", "b 1": b"second"}
        Board(one, "topic/1").announce("a/0", b"again")
        assert Board(two, "topic/1").read()["a/0"] == b"again"
        assert Board(two, "topic/1").body(fingerprint(b"body")) == b"body"
        Board(one, "topic/1").withdraw("a/0")
        Board(one, "topic/1").withdraw("b 1")  # another's stays
        assert Board(two, "topic/1").read() == {"b 1": b"second"}
        two.close()
        assert Board(one, "topic/1").read() == {}


def test_a_slot_has_one_worker() -> None:
    with local_cluster(2) as cluster:
        one, two = cluster.client(0), cluster.client(1)
        Board(one, "topic").announce("a", b"1")
        with pytest.raises(CoordinateTakenError, match=r"'a' of 'topic' is taken by pid \d+ on agent 0"):
            Board(two, "topic").announce("a", b"2")
        one.close()
        Board(two, "topic").announce("a", b"2")
        assert Board(two, "topic").read() == {"a": b"2"}


def test_one_that_was_removed_by_mistake_is_put_there_again() -> None:
    """By those who meant that of the agent before this one; whoever announced it finds that out when it reads."""
    with local_cluster(2) as cluster:
        one, two = cluster.client(0), cluster.client(1)
        Board(one, "topic").announce("a", b"1")
        Board(two, "topic").announce("b", b"2")
        (key,) = (key for key in cluster.store.list(notice_prefix("topic")) if key.endswith("a"))
        kept = cluster.store.get_bytes(key)
        cluster.store.delete(key)
        assert Board(two, "topic").read() == {"b": b"2"}
        assert Board(one, "topic").read() == {"a": b"1", "b": b"2"}
        assert Board(two, "topic").read() == {"a": b"1", "b": b"2"}
        assert cluster.store.get_bytes(key) == kept
        Board(one, "topic").withdraw("a")
        assert Board(one, "topic").read() == {"b": b"2"}


def test_one_that_is_withdrawn_while_it_is_put_there_again_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    with local_cluster(1) as cluster:
        client = cluster.client(0)
        board = Board(client, "topic")
        board.announce("a", b"1")
        cluster.store.delete_prefix(notice_prefix("topic"))
        compare_and_set, asked = cluster.store.compare_and_set, threading.Event()

        def slowly(key: str, expected: bytes | None, desired: bytes, **more: Any) -> bytes | None:
            if key.startswith(notice_prefix("topic")):
                asked.set()
                board.withdraw("a")
            return compare_and_set(key, expected, desired, **more)

        monkeypatch.setattr(cluster.store, "compare_and_set", slowly)
        board.read()
        assert asked.is_set()
        eventually(lambda: not cluster.store.list(notice_prefix("topic")))
        assert board.read() == {}


def test_one_that_another_has_replaced_is_not_put_back() -> None:
    """A worker that was taken for dead learns that its slot is taken when it announces itself anew."""
    with local_cluster(2) as cluster:
        one, two = cluster.client(0), cluster.client(1)
        Board(one, "topic").announce("a", b"1")
        cluster.store.delete_prefix(notice_prefix("topic"))
        Board(two, "topic").announce("a", b"2")
        with pytest.raises(CoordinateTakenError):
            Board(one, "topic").announce("a", b"3")
        two.close()
        assert Board(one, "topic").read() == {}


def test_a_body_that_is_not_there() -> None:
    with local_cluster(1) as cluster, pytest.raises(StoreError, match="does not hold what its name says"):
        Board(cluster.client(0), "topic").body(fingerprint(b"nobody said this"))


def announce(state: dict[str, Any], slot: str) -> None:
    Board(state["client"], "topic").announce(slot, b"mine")


@pytest.mark.parametrize("who", ["worker", "agent"])
def test_the_notices_of_the_dead_are_gone(who: str) -> None:
    with process_cluster(2) as cluster:
        worker = cluster.worker()
        worker.call(connect, 0, cluster.paths[0])
        worker.call(announce, "a")
        client = cluster.client(1)
        board = Board(client, "topic")
        assert board.read() == {"a": b"mine"}
        cluster.kill(worker.pid if who == "worker" else cluster.pids[0])
        eventually(lambda: board.read() == {})
        board.announce("a", b"another's")
        client.close()
