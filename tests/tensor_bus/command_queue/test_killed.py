"""Processes that are killed at any moment cost no command but their own, and no room."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from etha_ray.tensor_bus import command_queue
from etha_ray.tensor_bus.command_queue import CommandQueue
from etha_ray.tensor_bus.messages import Message
from etha_ray.testing import eventually
from tests.tensor_bus.command_queue.helpers import (
    LONG_S,
    assert_capacity_is_whole,
    batch,
    drain,
    finish,
    ids,
    kill,
    start,
    start_waiting,
)


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def killed_in(monkeypatch: pytest.MonkeyPatch, function: str, action: Callable[[], object]) -> None:
    """Fork a child that is killed where ``action`` comes to ``function`` of the module."""
    monkeypatch.setattr(command_queue, function, lambda *args: die())
    child = start(action)
    monkeypatch.undo()
    child.join(LONG_S)
    assert child.exitcode == -signal.SIGKILL


def test_a_writer_killed_inside_its_transaction_has_written_nothing(small: CommandQueue, monkeypatch: pytest.MonkeyPatch) -> None:
    killed_in(monkeypatch, "_write_state", lambda: small.enqueue(batch("lost")))
    assert small.is_empty()
    assert_capacity_is_whole(small)


def test_a_writer_killed_before_it_posts_delays_its_command_only(small: CommandQueue, monkeypatch: pytest.MonkeyPatch) -> None:
    received: list[Message | None] = []
    reader = threading.Thread(target=lambda: received.append(small.dequeue(block=True)), daemon=True)
    reader.start()
    eventually(lambda: small._sleepers == 1)
    killed_in(monkeypatch, "_post", lambda: small.enqueue(batch("kept")))
    reader.join(LONG_S)
    assert received == [batch("kept")]
    assert_capacity_is_whole(small)


def test_a_reader_killed_inside_its_transaction_has_taken_nothing(small: CommandQueue, monkeypatch: pytest.MonkeyPatch) -> None:
    small.enqueue(batch("kept"))
    killed_in(monkeypatch, "_write_state", small.dequeue)
    assert drain(small) == ["kept"]
    assert_capacity_is_whole(small)


def test_a_reader_killed_before_it_posts_delays_a_writer_only(small: CommandQueue, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(5):
        small.enqueue(batch(number))
    (writer,) = start_waiting(lambda: small.enqueue(batch("late")))
    killed_in(monkeypatch, "_post", small.dequeue)
    finish(writer)
    assert drain(small) == ["1", "2", "3", "4", "late"]
    assert_capacity_is_whole(small)


def write_for_ever(path: Path, name: str) -> None:
    queue = CommandQueue(path)
    number = 0
    while True:
        queue.enqueue(batch(f"{name}:{number}"))
        number += 1


def test_writers_killed_at_any_moment_cost_nothing(path: Path) -> None:
    queue = CommandQueue(path, capacity=20)
    rng = random.Random(11)
    received: dict[str, list[int]] = {}

    def read_for(seconds: float) -> None:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            for name in ids(queue.dequeue_batch(8, block=True, timeout=0.02)):
                writer, number = name.split(":")
                received.setdefault(writer, []).append(int(number))

    writers = [start(write_for_ever, path, f"w{number}") for number in range(2)]
    for turn in range(30):
        writers.append(start(write_for_ever, path, f"t{turn}"))
        read_for(rng.uniform(0.005, 0.04))
        kill(writers.pop(rng.randrange(len(writers))))
        before = sum(map(len, received.values()))
        end = time.monotonic() + LONG_S
        while sum(map(len, received.values())) == before:  # the others go on
            read_for(0.01)
            assert time.monotonic() < end
    for writer in writers:
        kill(writer)
    while not queue.is_empty():
        read_for(0)
        queue.dequeue_batch(100)
    for numbers in received.values():
        assert numbers == list(range(len(numbers)))
    assert_capacity_is_whole(queue)
    queue.close()


def test_readers_killed_at_any_moment_cost_no_room(path: Path) -> None:
    queue = CommandQueue(path, capacity=20)
    rng = random.Random(12)

    def read_for_ever() -> None:
        own = CommandQueue(path)
        while True:
            own.dequeue_batch(3, block=True)

    writer = start(write_for_ever, path, "w")
    for _ in range(30):
        reader = start(read_for_ever)
        time.sleep(rng.uniform(0.005, 0.04))
        kill(reader)
        first = queue.dequeue(block=True, timeout=LONG_S)
        assert first is not None  # the writer goes on
    eventually(lambda: queue.size() == queue.capacity)
    kill(writer)
    numbers = [int(name.split(":")[1]) for name in drain(queue)]
    assert numbers == list(range(numbers[0], numbers[0] + len(numbers)))
    assert_capacity_is_whole(queue)
    queue.close()
