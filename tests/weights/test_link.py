"""What a rank has with another side when something fails while they connect: what passes, what stays, and what is said of it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import TimeoutError as FutureTimeoutError
from typing import Any

import pytest
import torch

from etha_ray.errors import (
    AgentDiedError,
    AgentNotFoundError,
    BatchUnmatchedError,
    EthaRayError,
    StoreError,
    StoreUnavailableError,
    TransferTimeoutError,
)
from etha_ray.testing import eventually
from etha_ray.weights.parties import Tables
from tests.tensor_bus.cluster import LONG
from tests.weights.test_publish import sides, sync


def agree_fails(monkeypatch: pytest.MonkeyPatch, error: EthaRayError, fails: Callable[[int], bool], thread: str = "") -> list[str]:
    """When a link whose thread is named so looks up the tables, and ``fails`` of how often; the names of those threads, as they look."""
    asked: list[str] = []
    of = Tables.of

    def looked_up(tables: Tables, notices: Any) -> Any:
        name = threading.current_thread().name
        if thread in name:
            asked.append(name)
            if fails(len(asked)):
                raise error
        return of(tables, notices)

    monkeypatch.setattr(Tables, "of", looked_up)
    return asked


def test_a_store_that_was_away_for_a_moment_is_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the one whose question it did not answer: the other side has its answer, and waits."""
    asked = agree_fails(monkeypatch, StoreUnavailableError("it did not answer"), lambda count: count == 1)
    with sides() as at:
        target = torch.zeros(2)
        sync(at.publish({"w": torch.ones(2)}), at.pull({"w": target}))
        assert torch.equal(target, torch.ones(2))
    assert len(asked) >= 3


def test_why_nothing_comes_of_trying_again_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    agree_fails(monkeypatch, StoreUnavailableError("it did not answer"), lambda _: True)
    with sides() as at:
        sender, receiver = at.publish({"w": torch.zeros(1)}), at.pull({"w": torch.zeros(1)}, blocking=False)
        eventually(lambda: "it did not answer" in receiver._state() and "it did not answer" in sender._state())
        with pytest.raises(TransferTimeoutError, match="replica '0' is connecting again and again: it did not answer"):
            sender.push(timeout=0.2)
        with pytest.raises(BatchUnmatchedError, match=r"a try that goes better than the last \(it did not answer\)"):
            receiver.update(0.2)


def test_what_will_be_so_at_the_next_try_is_raised_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = agree_fails(monkeypatch, StoreError("run the same version on both sides"), lambda _: True)
    with sides() as at:
        sender, receiver = at.publish({"w": torch.zeros(1)}), at.pull({"w": torch.zeros(1)}, blocking=False)
        for call in (lambda: receiver.update(None), lambda: sender.push(timeout=None)):
            with pytest.raises(StoreError, match="run the same version"):
                call()
    assert len(asked) == 2


@pytest.mark.parametrize("kind", [AgentDiedError, AgentNotFoundError])
def test_one_whose_agent_died_while_it_connected_goes_on_with_the_next(kind: type[EthaRayError], monkeypatch: pytest.MonkeyPatch) -> None:
    """The others only see that it has not registered yet: they are the same to it as before, and wait. Who pushes while it connects with
    the next hears of that one, not of the last."""
    heard, connecting, succeeds = threading.Event(), threading.Event(), threading.Event()

    def fails(_: int) -> bool:
        if not heard.is_set():
            return True
        connecting.set()
        assert succeeds.wait(LONG)
        return False

    agree_fails(monkeypatch, kind("it was killed"), fails, "replica")
    with sides() as at:
        target = torch.zeros(2)
        sender, receiver = at.publish({"w": torch.ones(2)}), at.pull({"w": target}, blocking=False)
        with pytest.raises(kind, match="it was killed"):
            sender.push(timeout=LONG)
        heard.set()
        assert connecting.wait(LONG)
        push = sender.start_push(timeout=LONG)
        with pytest.raises(FutureTimeoutError):
            push.result(0.2)
        succeeds.set()
        assert receiver.update(LONG) == 1
        assert push.result(LONG).version == 1
        assert torch.equal(target, torch.ones(2))


def test_an_agent_that_stood_still_is_no_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor is one whose successor is there a moment later: others are seen again, and whoever is new."""
    with sides() as at:
        sender = at.publish({"w": torch.ones(2)})
        board, read, gone = sender._member.board, sender._member.board.read, threading.Event()
        gone.set()

        def answered(*given: Any) -> Any:
            if gone.is_set():
                raise AgentDiedError("agent 0 gives no sign")
            return read(*given)

        monkeypatch.setattr(board, "read", answered)
        with pytest.raises(AgentDiedError, match="gives no sign"):
            sender.push(timeout=LONG)
        gone.clear()
        push = sender.start_push(timeout=LONG)  # it does not hear of what is over
        target = torch.zeros(2)
        receiver = at.pull({"w": target})
        assert receiver.update(LONG) == push.result(LONG).version
        assert torch.equal(target, torch.ones(2))
