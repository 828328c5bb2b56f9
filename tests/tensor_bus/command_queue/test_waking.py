"""Who waits is woken, by posts, and by nothing that is none of its business."""

from __future__ import annotations

import signal
import threading
import time
from pathlib import Path

import posix_ipc
import pytest

from etha_ray.errors import QueueFullError
from etha_ray.tensor_bus.command_queue import CommandQueue
from etha_ray.tensor_bus.semaphores import queue_semaphore_name
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
    woken,
)


def test_a_waiting_reader_is_woken(queue: CommandQueue, only_posts_wake: None) -> None:
    def echo() -> None:
        for _ in range(50):
            message = queue.dequeue(block=True)
            assert message is not None
            back.enqueue(message)

    back = CommandQueue(queue.lmdb_path.with_name("back.lmdb"))
    child = start(echo)
    for number in range(50):
        queue.enqueue(batch(number))
        assert woken(back.dequeue) == batch(number)
    finish(child)
    back.close()


def test_waiting_writers_are_woken(small: CommandQueue, only_posts_wake: None) -> None:
    for number in range(5):
        small.enqueue(batch(number))
    writers = start_waiting(lambda: small.enqueue(batch("late")), 4)
    assert ids(small.dequeue_batch(5)) == ["0", "1", "2", "3", "4"]  # one post, and each passes it on
    finish(*writers)
    assert drain(small) == ["late"] * 4


def test_waiting_writers_take_turns_when_there_is_room_for_one(path: Path, only_posts_wake: None) -> None:
    queue = CommandQueue(path, capacity=1)
    queue.enqueue(batch("first"))
    writers = start_waiting(lambda: queue.enqueue(batch("late")), 3)
    received = ids([message for _ in range(4) if (message := woken(queue.dequeue))])
    assert received == ["first", "late", "late", "late"]
    finish(*writers)
    queue.close()


def test_clear_wakes_a_waiting_writer(small: CommandQueue, only_posts_wake: None) -> None:
    for number in range(5):
        small.enqueue(batch(number))
    (writer,) = start_waiting(lambda: small.enqueue(batch("late")))
    small.clear()
    finish(writer)
    assert drain(small) == ["late"]


def test_a_writer_that_gave_up_or_was_killed_while_waiting_holds_nobody_up(small: CommandQueue, only_posts_wake: None) -> None:
    for number in range(5):
        small.enqueue(batch(number))
    with pytest.raises(QueueFullError):
        small.enqueue(batch("gave up"), timeout=0.05)
    (writer,) = start_waiting(lambda: small.enqueue(batch("killed")))
    kill(writer)
    assert drain(small) == ["0", "1", "2", "3", "4"]
    assert_capacity_is_whole(small)


@pytest.mark.parametrize("before", [True, False])
def test_wake_lets_a_blocking_call_return_early(queue: CommandQueue, only_posts_wake: None, before: bool) -> None:
    if before:
        queue.wake()
        queue.wake()
    else:
        threading.Timer(0.1, queue.wake).start()
    assert woken(queue.dequeue) is None
    # It is used up by one call, and another process may ask for it too.
    assert queue.dequeue(block=True, timeout=0.01) is None
    child = start(queue.wake)
    assert woken(queue.dequeue_batch) == []
    finish(child)


def test_wake_is_kept_for_a_blocking_call_and_costs_no_command(queue: CommandQueue) -> None:
    queue.wake()
    assert queue.dequeue() is None
    queue.enqueue(batch(0))
    assert queue.dequeue() == batch(0)
    queue.enqueue(batch(1))
    assert queue.dequeue(block=True, timeout=LONG_S) == batch(1)  # which returned early enough
    started = time.monotonic()
    assert queue.dequeue(block=True, timeout=0.1) is None
    assert time.monotonic() - started >= 0.1


def test_stray_posts_are_consumed(queue: CommandQueue, path: Path) -> None:
    items = posix_ipc.Semaphore(queue_semaphore_name(path, "items"))
    for _ in range(1000):
        items.release()
    queue.enqueue(batch(0))
    assert items.value == 1000  # enough to wake anybody
    assert queue.dequeue(block=True, timeout=LONG_S) == batch(0)
    started = time.monotonic()
    assert queue.dequeue(block=True, timeout=0.3) is None
    assert time.monotonic() - started >= 0.3
    eventually(lambda: queue.dequeue(block=True, timeout=0.01) is None and items.value == 0)
    items.close()


def test_a_signal_does_not_end_the_waiting(queue: CommandQueue) -> None:
    caught: list[int] = []
    old = signal.signal(signal.SIGALRM, lambda number, frame: caught.append(number))
    signal.setitimer(signal.ITIMER_REAL, 0.02, 0.02)
    try:
        started = time.monotonic()
        assert queue.dequeue(block=True, timeout=0.3) is None
        assert time.monotonic() - started >= 0.3
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, old)
    assert caught
