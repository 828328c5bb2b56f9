"""Who is there, from what is announced: complete sides, what is missing, and what is no notice at all."""

from __future__ import annotations

import threading
from typing import Any

import msgspec
import pytest

from etha_ray.errors import StoreError
from etha_ray.testing import eventually
from etha_ray.weights.parties import Seen, Watcher, receiver_slot, seen, sender_slot
from etha_ray.weights.tables import Notice, encode_notice


def notice(world_size: int) -> bytes:
    return encode_notice(Notice("token", world_size, "table"))


def test_sides_that_are_complete_and_those_that_are_not() -> None:
    notices = {sender_slot(rank): notice(2) for rank in range(2)}
    notices |= {receiver_slot("a", 1): notice(3), receiver_slot("b", 0): notice(1), receiver_slot("c", 0): notice(1)}
    notices[receiver_slot("c", 1)] = notice(2)
    found = seen(notices)
    assert found.senders is not None
    assert len(found.senders) == 2
    assert {name for name, there in found.receivers.items() if there} == {"b"}
    assert found.missing == {"a": "ranks [0, 2] of 3 are not there", "c": "its ranks say that there are 1 or 2 of them"}
    assert seen({}).missing == {"sender": "nobody is there"}


def test_many_that_are_missing_are_not_all_listed() -> None:
    assert seen({sender_slot(3): notice(1 << 20)}).missing["sender"] == (
        "ranks [0, 1, 2, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, ...] of 1048576 are not there"
    )


@pytest.mark.parametrize("size", [0, -1, (1 << 20) + 1, 1 << 63])
def test_a_side_of_an_impossible_size_is_no_notice(size: int) -> None:
    data = msgspec.msgpack.encode({"token": "token", "world_size": size, "table": "table"})
    with pytest.raises(StoreError, match="a notice of weights cannot be read"):
        seen({sender_slot(0): data})


@pytest.mark.parametrize("slot", ["sender", "sender/x", "sender/1", "sender/00000000/x", "", "receiver/a/-0000001"])
def test_a_slot_that_is_no_ranks(slot: str) -> None:
    with pytest.raises(StoreError, match="which is no rank's: another program writes to this namespace"):
        seen({slot: notice(1)})


def test_who_looks_goes_on_whatever_fails(caplog: pytest.LogCaptureFixture) -> None:
    failing = threading.Event()
    failing.set()
    looked: list[Seen] = []

    class Board:
        def read(self) -> dict[str, bytes]:
            if failing.is_set():
                raise ZeroDivisionError("what is this")
            return {}

    board: Any = Board()
    watcher = Watcher(board, looked.append)
    eventually(lambda: watcher.problem == "ZeroDivisionError: what is this")
    failing.clear()
    watcher.hurry()
    eventually(lambda: looked and not watcher.problem)
    watcher.close()
    assert "who publishes and pulls cannot be seen" in caplog.text
