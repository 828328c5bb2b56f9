"""Opening and closing: whose files are used, and when they go."""

from __future__ import annotations

import os
import re
import stat
import threading
from collections.abc import Callable
from pathlib import Path

import lmdb
import pytest

from etha_ray.errors import QueueClosedError, QueueError, QueueFullError, UnsafePathError
from etha_ray.tensor_bus.command_queue import CommandQueue
from etha_ray.tensor_bus.commands import Ping
from etha_ray.tensor_bus.semaphores import queue_semaphore_name
from etha_ray.testing import eventually
from tests.tensor_bus.command_queue.helpers import (
    LONG_S,
    batch,
    drain,
    ids,
)


def test_what_is_in_a_queue_outlives_its_users(path: Path) -> None:
    queue = CommandQueue(path)
    queue.enqueue(batch(0))
    queue.close(destroy=False)
    again = CommandQueue(path)
    assert again.enqueue(batch(1)) == 1
    assert drain(again) == ["0", "1"]
    again.close()


def test_close_removes_everything_and_may_be_repeated(path: Path) -> None:
    queue = CommandQueue(path)
    files = [path, path.with_name(path.name + "-lock")]
    files += [Path(f"/dev/shm/sem.{queue_semaphore_name(path, role)[1:]}") for role in ("items", "space")]
    assert [stat.S_IMODE(file.stat().st_mode) for file in files] == [0o600] * 4
    assert isinstance(queue.env, lmdb.Environment)
    queue.close()
    assert not any(file.exists() for file in files)
    assert queue.env is None
    queue.close()
    queue.close(destroy=False)


def test_a_closed_queue_cannot_be_used(path: Path) -> None:
    queue = CommandQueue(path)
    queue.close()
    for call in (
        lambda: queue.enqueue(Ping()),
        queue.dequeue,
        queue.dequeue_batch,
        queue.size,
        queue.is_empty,
        queue.peek,
        queue.clear,
        queue.wake,
    ):
        with pytest.raises(QueueClosedError, match=re.escape(str(path))):
            call()


def test_closing_ends_the_waiting_of_other_threads(path: Path, only_posts_wake: None) -> None:
    queue = CommandQueue(path, capacity=1)
    errors: list[BaseException] = []

    def wait(call: Callable[[], object]) -> None:
        try:
            call()
        except QueueClosedError as error:
            errors.append(error)

    other = CommandQueue(path)
    threads = [threading.Thread(target=wait, args=(lambda: queue.dequeue(block=True),)) for _ in range(2)]
    for thread in threads:
        thread.start()
    eventually(lambda: queue._sleepers == 2)
    queue.close(destroy=False)
    for thread in threads:
        thread.join(LONG_S)
    assert len(errors) == 2
    other.enqueue(Ping())
    writer = threading.Thread(target=wait, args=(lambda: other.enqueue(Ping()),))
    writer.start()
    eventually(lambda: other._sleepers == 1)
    other.close()
    writer.join(LONG_S)
    assert len(errors) == 3


def test_two_objects_on_one_path_are_one_queue(path: Path) -> None:
    first, second = CommandQueue(path, capacity=5), CommandQueue(path, capacity=7)
    assert second.capacity == 5  # the first decides
    for number in range(5):
        (first, second)[number % 2].enqueue(batch(number))
    with pytest.raises(QueueFullError):
        second.enqueue(batch(5), block=False)
    assert ids(second.dequeue_batch(2)) == ["0", "1"]
    first.close(destroy=False)
    assert drain(second) == ["2", "3", "4"]
    second.close()


def test_destroying_a_queue_leaves_the_next_one_at_its_path_alone(path: Path) -> None:
    old = CommandQueue(path)
    old.enqueue(batch("old"))
    path.unlink()
    new = CommandQueue(path)
    new.enqueue(batch("new"))
    old.close()
    assert path.exists()
    assert drain(new) == ["new"]
    new.close()


def test_a_file_that_is_not_safely_ours_is_refused(tmp_path: Path) -> None:
    (tmp_path / "link.lmdb").symlink_to(tmp_path / "bus.lmdb")
    with pytest.raises(UnsafePathError, match="is a symlink"):
        CommandQueue(tmp_path / "link.lmdb")
    assert not (tmp_path / "bus.lmdb").exists()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file to another user")
def test_a_queue_of_another_user_is_refused(path: Path) -> None:
    CommandQueue(path).close(destroy=False)
    os.chown(path, 12345, -1)
    with pytest.raises(UnsafePathError, match="uid 12345"):
        CommandQueue(path)
    os.chown(path, os.geteuid(), -1)
    CommandQueue(path).close()


def test_a_file_that_holds_something_else_is_refused(queue: CommandQueue, path: Path) -> None:
    assert queue.env is not None
    database = queue.env.open_db(b"command_queue")
    with queue.env.begin(write=True, db=database) as txn:
        txn.put(b"\0\0", b"99")
    with pytest.raises(QueueError, match=r"format b'99'.*run the same version"):
        CommandQueue(path)
    with queue.env.begin(write=True, db=database) as txn:
        txn.put(b"\0\0", b"1")
        txn.put(b"\0", b"?")
    with pytest.raises(QueueError, match="is not a command queue, or is damaged; remove it"):
        queue.size()
