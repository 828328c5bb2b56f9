"""Who is waited for, and for how long, when several are given something at a time."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from etha_ray.errors import PeerLostError, TransferTimeoutError
from etha_ray.weights.fanout import Fanout
from tests.tensor_bus.cluster import LONG


class Calls:
    """What is done with replicas: each waits until it is let go, or hurried."""

    def __init__(self, names: str) -> None:
        self.go = {name: threading.Event() for name in names}
        self.hurried: list[str] = []

    def __call__(self, name: str, more: str) -> str:
        assert more == name.upper()
        assert self.go[name].wait(LONG)
        if name in self.hurried:
            raise TransferTimeoutError(name)
        return more

    def hurry(self, name: str) -> None:
        self.hurried.append(name)
        self.go[name].set()


def run(fanout: Fanout[str], calls: Calls) -> None:
    fanout.run({name: name.upper() for name in calls.go}, calls)


@contextmanager
def running(fanout: Fanout[str], calls: Calls) -> Iterator[None]:
    """Meanwhile it runs."""
    thread = threading.Thread(target=run, args=(fanout, calls))
    thread.start()
    yield
    thread.join(LONG)
    assert not thread.is_alive()


def test_each_is_called_at_a_time_with_the_others() -> None:
    met = threading.Barrier(3)
    fanout = Fanout[str](1, None, lambda _: None)

    def call(name: str, more: str) -> str:
        met.wait(LONG)
        if name == "b":
            raise PeerLostError("b is gone")
        return name + more

    fanout.run({"a": "1", "b": "2", "c": "3"}, call)
    assert fanout.done == {"a": "a1", "c": "c3"}
    assert isinstance(fanout.failed.pop("b"), PeerLostError)
    assert (fanout.failed, fanout.late) == ({}, False)


def test_nobody_is_nothing_to_do() -> None:
    fanout = Fanout[str](1, 0.0, lambda _: None)
    fanout.run({}, lambda *_: "never")
    assert (fanout.done, fanout.failed) == ({}, {})


@pytest.mark.parametrize("order", ["ab", "ba"])
def test_stragglers_are_hurried_once_enough_are_done(order: str) -> None:
    """Also if the straggler is the one that the calling thread is busy with."""
    calls = Calls(order)
    fanout = Fanout[str](1, 0.01, calls.hurry)
    calls.go["a"].set()
    run(fanout, calls)
    assert calls.hurried == ["b"]
    assert fanout.done == {"a": "A"}
    assert list(fanout.failed) == ["b"]
    assert fanout.late


def test_nobody_is_hurried_before_enough_are_done() -> None:
    calls = Calls("abc")
    fanout = Fanout[str](2, 0.0, calls.hurry)
    with running(fanout, calls):
        calls.go["a"].set()
        assert not calls.go["c"].wait(0.3)
        assert (calls.hurried, fanout.late) == ([], False)
        calls.go["b"].set()
    assert calls.hurried == ["c"]


def test_nobody_is_hurried_while_there_is_time() -> None:
    calls = Calls("abc")
    fanout = Fanout[str](1, LONG, calls.hurry)
    with running(fanout, calls):
        for name in calls.go:
            calls.go[name].set()
    assert calls.hurried == []
    assert sorted(fanout.done) == ["a", "b", "c"]


def test_a_failure_is_nobody_that_is_done() -> None:
    calls = Calls("abc")
    fanout = Fanout[str](1, 0.0, calls.hurry)

    def call(name: str, more: str) -> str:
        if name == "a":
            raise PeerLostError("a is gone")
        return calls(name, more)

    thread = threading.Thread(target=lambda: fanout.run({name: name.upper() for name in calls.go}, call))
    thread.start()
    assert not calls.go["b"].wait(0.3)
    calls.go["b"].set()
    thread.join(LONG)
    assert not thread.is_alive()
    assert calls.hurried == ["c"]
    assert (list(fanout.done), sorted(fanout.failed)) == (["b"], ["a", "c"])


def test_who_did_not_hear_it_is_hurried_again() -> None:
    calls = Calls("ab")
    heard = threading.Semaphore(0)

    def hurry(name: str) -> None:
        heard.release()
        if len(calls.hurried) == 2:
            calls.hurry(name)
        else:
            calls.hurried.append(name)

    fanout = Fanout[str](1, 0.0, hurry)
    calls.go["a"].set()
    run(fanout, calls)
    assert calls.hurried == ["b", "b", "b"]
    assert list(fanout.failed) == ["b"]
