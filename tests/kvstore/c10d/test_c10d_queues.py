"""Queues whose producers and consumers are killed, and meet one another, before any single request to the store."""

from __future__ import annotations

import subprocess
import sys
import uuid
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from etha_ray.kvstore import MemoryStore
from etha_ray.kvstore.c10d import C10dQueueEmptyError, C10dStore
from tests.kvstore.c10d.backends import LONG, opened

COUNT = 300
VICTIMS = 3
PADDING = 1000
"""Bytes of each element: a pipe takes 65 of them, so a consumer is no further than that when it is killed, however late."""


class Killed(BaseException):
    pass


class Steps(MemoryStore):
    """Does something of the test's before its ``at``-th request."""

    at = 0
    count = 0
    action: Callable[[], object] | None = None

    def before(self, at: int, action: Callable[[], object]) -> None:
        self.at, self.action, self.count = at, action, 0

    def _step(self) -> None:
        self.count += 1
        if self.count == self.at and self.action is not None:
            action, self.action = self.action, None
            action()

    def _get(self, full: str) -> bytes | None:
        self._step()
        return super()._get(full)

    def _set(self, full: str, data: bytes) -> None:
        self._step()
        super()._set(full, data)

    def _delete(self, full: str) -> bool:
        self._step()
        return super()._delete(full)

    def _update(self, full: str, change: Any) -> bytes | None:
        self._step()
        return super()._update(full, change)


def taken_by(store: C10dStore) -> list[str]:
    """All that is left."""
    values: list[str] = []
    with suppress(C10dQueueEmptyError):
        while True:
            values.append(store.queue_pop("q", False).decode())
    return values


def fresh() -> tuple[Steps, C10dStore, C10dStore]:
    """A new queue: the store whose requests can be interrupted, a user of it, and another user."""
    steps = Steps(uuid.uuid4().hex)
    return steps, C10dStore(steps), C10dStore(MemoryStore(steps.namespace))


def die() -> None:
    raise Killed


def test_a_consumer_killed_before_any_request() -> None:
    """It loses at most its own element, and the others go on, in order."""
    lost = []
    for at in range(1, 20):
        steps, victim, other = fresh()
        for value in ("1", "2", "3"):
            other.queue_push("q", value)
        steps.before(at, die)
        try:
            assert victim.queue_pop("q") == b"1"
            finished = True
        except Killed:
            finished = False
        other.queue_push("q", "4")
        rest = taken_by(other)
        assert rest in (["1", "2", "3", "4"], ["2", "3", "4"])
        assert other.queue_len("q") == 0
        lost.append("1" not in rest)
        if finished:
            break
    assert finished
    assert lost == sorted(lost)
    assert lost[-1]


def test_a_producer_killed_before_any_request() -> None:
    """Its element is in the queue or is not, and nobody waits for it."""
    arrived = []
    for at in range(1, 20):
        steps, victim, other = fresh()
        other.queue_push("q", "1")
        steps.before(at, die)
        try:
            victim.queue_push("q", "2")
            finished = True
        except Killed:
            finished = False
        other.queue_push("q", "3")
        values = taken_by(other)
        assert values in (["1", "2", "3"], ["1", "3"])
        arrived.append("2" in values)
        if finished:
            break
    assert finished
    assert arrived == sorted(arrived)


ACTIONS: dict[str, Callable[[C10dStore], object]] = {
    "push": lambda store: store.queue_push("q", "new"),
    "pop": lambda store: store.queue_pop("q", False).decode(),
    "pop all": taken_by,
}


@pytest.mark.parametrize("outer", ["push", "pop"])
@pytest.mark.parametrize("inner", ACTIONS)
def test_one_operation_inside_another(outer: str, inner: str) -> None:
    """One that comes between any two requests of another: both answer, and leave, what one of the two orders gives."""

    def in_order(*order: str) -> tuple[dict[str, object], list[str]]:
        _, first, second = fresh()
        for value in ("1", "2", "3"):
            first.queue_push("q", value)
        answers = {which: ACTIONS[outer if which == "outer" else inner](first if which == "outer" else second) for which in order}
        return answers, taken_by(second)

    valid = [in_order("inner", "outer")] if (outer, inner) != ("pop", "pop all") else []
    valid.append(in_order("outer", "inner"))
    for at in range(1, 40):
        steps, first, second = fresh()
        for value in ("1", "2", "3"):
            first.queue_push("q", value)
        answers: dict[str, object] = {}
        steps.before(at, lambda second=second, answers=answers: answers.update(inner=ACTIONS[inner](second)))
        try:
            answers["outer"] = ACTIONS[outer](first)
        except C10dQueueEmptyError:
            # In the other order there is nothing left to pop.
            assert (outer, answers) == ("pop", {"inner": ["1", "2", "3"]})
            continue
        if steps.action is not None:
            return
        assert (answers, taken_by(second)) in valid, f"{inner} before request {at} of {outer}"
    pytest.fail("the operation does not end")


@pytest.mark.parametrize("backend", ["tcp", "etcd"])
def test_consumers_that_are_killed(backend: str, request: pytest.FixtureRequest) -> None:
    """Real processes, killed at any moment: each element goes to one of them, in order, and each victim loses one at most."""
    with opened(backend, request) as open_kv:
        kv = open_kv(uuid.uuid4().hex)
        store = C10dStore(kv, timeout=LONG)
        for n in range(COUNT):
            store.queue_push("q", f"{n} {'.' * PADDING}")
        seen: list[str] = []
        for _ in range(VICTIMS):
            command = [sys.executable, "-m", "tests.kvstore.c10d.consumer", kv._where(), kv.namespace]
            with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[3]) as process:
                assert process.stdout is not None
                seen += [process.stdout.readline().strip() for _ in range(10)]
                process.kill()
                seen += [line.strip() for line in process.stdout if line.endswith("\n")]
        rest = taken_by(store)
        assert rest
        values = [int(value.split()[0]) for value in seen + rest]
        assert values == sorted(set(values))
        assert len(values) >= COUNT - VICTIMS
