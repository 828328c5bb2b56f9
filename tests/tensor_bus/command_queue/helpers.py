"""Commands, processes and damage, for the tests of the queue."""

from __future__ import annotations

import multiprocessing
import struct
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from typing import Any

import pytest

from etha_ray.errors import QueueFullError
from etha_ray.tensor_bus import command_queue
from etha_ray.tensor_bus.command_queue import CommandQueue
from etha_ray.tensor_bus.commands import CleanupBatch
from etha_ray.tensor_bus.messages import Message

fork = multiprocessing.get_context("fork")
LONG_S = 30.0  # never reached, unless something that must happen does not


def batch(number: int | str) -> CleanupBatch:
    return CleanupBatch(batch_id=str(number))


def ids(messages: list[Message]) -> list[str]:
    assert all(isinstance(message, CleanupBatch) for message in messages)
    return [message.batch_id for message in messages if isinstance(message, CleanupBatch)]


def drain(queue: CommandQueue) -> list[str]:
    found: list[str] = []
    while messages := queue.dequeue_batch():
        found += ids(messages)
    return found


def start(action: Callable[..., Any], *args: Any) -> BaseProcess:
    process = fork.Process(target=action, args=args)
    process.start()
    return process


def start_waiting(action: Callable[[], object], count: int = 1) -> list[BaseProcess]:
    """Fork children that do ``action`` on a queue, and return once each of them sleeps in it, or is about to: a post would wake it."""
    asleep, sleep = fork.Semaphore(0), command_queue.acquire

    def wait(*given: Any) -> None:
        asleep.release()
        sleep(*given)

    def child() -> None:
        command_queue.acquire = wait
        action()

    children = [start(child) for _ in range(count)]
    for _ in children:
        assert asleep.acquire(timeout=LONG_S)
    return children


def woken(call: Callable[..., Any]) -> Any:
    """What ``call(block=True)`` returns, which it must do long before its time is over."""
    started = time.monotonic()
    result = call(block=True, timeout=2 * LONG_S)
    assert time.monotonic() - started < LONG_S
    return result


def finish(*processes: BaseProcess) -> None:
    """All of them end well, and in time."""
    end = time.monotonic() + LONG_S
    for process in processes:
        process.join(max(0.0, end - time.monotonic()))
    hanging = [process for process in processes if process.is_alive()]
    for process in hanging:
        process.kill()
    assert not hanging
    assert [process.exitcode for process in processes] == [0] * len(processes)


def kill(process: BaseProcess) -> None:
    process.kill()
    process.join()


def overwrite(queue: CommandQueue, position: int, change: Callable[[bytes], bytes | None]) -> None:
    """Damage an entry behind the queue's back."""
    assert queue.env is not None
    key = struct.pack(">Q", position)
    with queue.env.begin(write=True, db=queue.env.open_db(b"command_queue")) as txn:
        old = txn.get(key)
        assert old is not None
        new = change(old)
        txn.delete(key) if new is None else txn.put(key, new)


def assert_capacity_is_whole(queue: CommandQueue) -> None:
    assert queue.is_empty()
    for number in range(queue.capacity):
        queue.enqueue(batch(number), block=False)
    with pytest.raises(QueueFullError):
        queue.enqueue(batch("too many"), block=False)
    assert drain(queue) == [str(number) for number in range(queue.capacity)]
