from __future__ import annotations

import logging
import multiprocessing
import os
import random
import re
import signal
import stat
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import lmdb
import posix_ipc
import pytest

from etha_ray.errors import ConfigError, QueueClosedError, QueueError, QueueFullError, UnsafePathError
from etha_ray.tensor_bus import command_queue
from etha_ray.tensor_bus.command_queue import CommandQueue
from etha_ray.tensor_bus.commands import CleanupBatch, Message, Ping, QueryStatus, RegisterTensors, Transfer
from etha_ray.tensor_bus.queue_entry import CorruptEntry
from etha_ray.tensor_bus.semaphores import queue_semaphore_name

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


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + LONG_S
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.002)


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


@pytest.fixture
def path(tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "bus.lmdb"
    yield path
    for role in ("items", "space"):
        assert not Path(f"/dev/shm/sem.{queue_semaphore_name(path, role)[1:]}").exists(), "a semaphore was left behind"


@pytest.fixture
def queue(path: Path) -> Iterator[CommandQueue]:
    queue = CommandQueue(path)
    yield queue
    queue.close()


@pytest.fixture
def small(path: Path) -> Iterator[CommandQueue]:
    queue = CommandQueue(path, capacity=5)
    yield queue
    queue.close()


@pytest.fixture
def only_posts_wake(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sleepers look at LMDB when they are posted, and otherwise not before a test gives up; forked children included."""
    monkeypatch.setattr(command_queue, "_SLICE_S", 2 * LONG_S)


# --- one process ---


def test_commands_of_all_kinds_come_out_in_order_with_positions_from_0(queue: CommandQueue) -> None:
    commands: list[Message] = [
        Transfer("b", "send", semaphore_name="/s", command_id=4, client_id="c", timestamp=1.0),
        QueryStatus("b", "transfer_signal"),
        RegisterTensors("c", [("p", b"\x00handle")]),
        Ping(),
    ]
    assert [queue.enqueue(command) for command in commands] == [0, 1, 2, 3]
    assert queue.size() == 4
    assert [queue.peek(), queue.peek()] == [commands[0]] * 2
    assert [queue.dequeue() for _ in range(5)] == [*commands, None]
    assert queue.is_empty()
    assert queue.peek() is None
    assert queue.enqueue(Ping()) == 4


def test_batches_take_what_is_there(queue: CommandQueue) -> None:
    assert queue.dequeue_batch() == []
    for number in range(10):
        queue.enqueue(batch(number))
    assert ids(queue.dequeue_batch(max_count=4)) == ["0", "1", "2", "3"]
    assert queue.size() == 6
    assert ids(queue.dequeue_batch(max_count=100, block=True)) == ["4", "5", "6", "7", "8", "9"]


def test_a_full_queue_wraps_around(small: CommandQueue) -> None:
    expected: list[str] = []
    for number in range(23):
        if small.size() == 5:
            expected.pop(0)
            small.dequeue()
        assert small.enqueue(batch(number), block=False) == number
        expected.append(str(number))
    assert drain(small) == expected
    assert_capacity_is_whole(small)


def test_a_full_queue_says_so(small: CommandQueue, path: Path) -> None:
    for number in range(5):
        small.enqueue(batch(number))
    what = re.escape(f"command queue at {path} is full (capacity 5 entries")
    with pytest.raises(QueueFullError, match=what + ".*check that its agent is running"):
        small.enqueue(batch(5), block=False)
    started = time.monotonic()
    with pytest.raises(QueueFullError, match=r"stayed so for 0\.3 s"):
        small.enqueue(batch(5), timeout=0.3)
    assert time.monotonic() - started >= 0.3
    with pytest.raises(QueueFullError):
        small.enqueue(batch(5), timeout=0)
    assert drain(small) == ["0", "1", "2", "3", "4"]


def test_waiting_for_a_command_ends_in_time(queue: CommandQueue) -> None:
    started = time.monotonic()
    assert queue.dequeue(block=True, timeout=0.3) is None
    assert queue.dequeue_batch(block=True, timeout=0.3) == []
    assert 0.6 <= time.monotonic() - started < LONG_S
    assert queue.dequeue(block=True, timeout=0) is None


def test_clear_drops_everything_and_frees_the_room(small: CommandQueue) -> None:
    for number in range(5):
        small.enqueue(batch(number))
    small.clear()
    assert small.is_empty()
    assert small.dequeue() is None
    assert_capacity_is_whole(small)


@pytest.mark.parametrize("timeout", [-1, -0.001, float("nan")])
def test_a_negative_timeout_is_refused(queue: CommandQueue, timeout: float) -> None:
    for call in (
        lambda: queue.enqueue(Ping(), timeout=timeout),
        lambda: queue.dequeue(block=True, timeout=timeout),
        lambda: queue.dequeue_batch(block=True, timeout=timeout),
    ):
        with pytest.raises(ConfigError, match="timeout is"):
            call()
    assert queue.is_empty()


def test_other_arguments_out_of_range_are_refused(queue: CommandQueue, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="max_count is 0"):
        queue.dequeue_batch(0)
    with pytest.raises(ConfigError, match="a str cannot go into the command queue"):
        queue.enqueue("hello")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"capacity of the command queue at .*never\.lmdb is 0"):
        CommandQueue(tmp_path / "never.lmdb", capacity=0)
    assert not (tmp_path / "never.lmdb").exists()


def test_bytes_are_limited_as_well_as_entries(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command_queue, "MAP_SIZE", 1 << 20)
    monkeypatch.setattr(command_queue, "_ENTRY_BYTES", 3 << 18)
    queue = CommandQueue(path)
    with pytest.raises(QueueFullError, match=r"cannot fit .* fewer tensors"):
        queue.enqueue(RegisterTensors("b", [("p", bytes(1 << 20))]))
    # Whatever the sizes, the map itself never fills up: the reader must always be able to take entries out.
    rng = random.Random(7)
    sent = received = 0
    for _ in range(30):
        with pytest.raises(QueueFullError, match="is full"):  # noqa: PT012
            while True:
                handle = bytes(rng.choice([1, 100, 1900, 2100, 5000, 50_000]))
                queue.enqueue(RegisterTensors(str(sent), [("p", handle)]), block=False)
                sent += 1
        for message in queue.dequeue_batch(rng.choice([1, 10, 1000])):
            assert isinstance(message, RegisterTensors)
            assert message.batch_id == str(received)
            received += 1
    queue.clear()
    queue.enqueue(RegisterTensors("b", [("p", bytes(500_000))]), block=False)
    queue.close()


def test_a_full_map_is_reported_with_its_size(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command_queue, "MAP_SIZE", 1 << 20)
    queue = CommandQueue(path)
    with pytest.raises(QueueFullError, match=r"no room in the LMDB map \(1048576 bytes\).*is empty"):
        queue.enqueue(RegisterTensors("b", [("p", bytes(2 << 20))]))
    assert queue.enqueue(Ping()) == 0
    queue.close()


def test_repr_tells_the_state(small: CommandQueue, path: Path) -> None:
    small.enqueue(Ping())
    assert repr(small) == f"CommandQueue(path='{path}', size=1, capacity=5)"
    small.close()
    assert repr(small) == f"CommandQueue(path='{path}', closed)"


# --- opening and closing ---


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
    until(lambda: queue._sleepers == 2)
    queue.close(destroy=False)
    for thread in threads:
        thread.join(LONG_S)
    assert len(errors) == 2
    other.enqueue(Ping())
    writer = threading.Thread(target=wait, args=(lambda: other.enqueue(Ping()),))
    writer.start()
    until(lambda: other._sleepers == 1)
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


# --- corrupt entries ---


def test_corrupt_entries_are_dropped_and_their_senders_told(small: CommandQueue, caplog: pytest.LogCaptureFixture) -> None:
    told: list[CorruptEntry] = []
    small.on_corrupt = told.append
    for number in range(5):
        small.enqueue(CleanupBatch(str(number), semaphore_name=f"/sem{number}", command_id=40 + number))
    overwrite(small, 1, lambda entry: entry[:-1] + bytes([entry[-1] ^ 1]))
    overwrite(small, 2, lambda entry: b"\xffgarbage, longer than any header that an entry has")
    overwrite(small, 3, lambda entry: b"short")
    with caplog.at_level(logging.ERROR):
        assert [small.dequeue(), small.dequeue(), small.dequeue()] == [
            CleanupBatch("0", semaphore_name="/sem0", command_id=40),
            CleanupBatch("4", semaphore_name="/sem4", command_id=44),
            None,
        ]
    assert told == [
        CorruptEntry(1, "/sem1", 41, "its body does not match its checksum"),
        CorruptEntry(2, None, None, "its header does not match its checksum"),
        CorruptEntry(3, None, None, "5 bytes are too few"),
    ]
    lines = [record.getMessage() for record in caplog.records]
    assert f"dropped the corrupt entry 2 of {small.lmdb_path}" in lines[1]
    assert "starts with ff 67 61 72" in lines[1]
    assert len(lines) == 3
    assert_capacity_is_whole(small)


def test_a_missing_entry_is_dropped(small: CommandQueue) -> None:
    told: list[CorruptEntry] = []
    small.on_corrupt = told.append
    for number in range(5):
        small.enqueue(batch(number))
    overwrite(small, 0, lambda entry: None)
    assert small.peek() is None
    assert ids(small.dequeue_batch(3)) == ["1", "2"]
    assert told == [CorruptEntry(0, None, None, "the entry is missing")]
    assert drain(small) == ["3", "4"]
    assert_capacity_is_whole(small)


def test_a_command_with_a_wrong_field_is_answered(small: CommandQueue) -> None:
    told: list[CorruptEntry] = []
    small.on_corrupt = told.append
    small.enqueue(Transfer("b", "sideways", semaphore_name="/s", command_id=3))  # type: ignore[arg-type]
    small.enqueue(batch(1))
    assert ids(small.dequeue_batch(1)) == ["1"]
    assert [(entry.semaphore_name, entry.command_id) for entry in told] == [("/s", 3)]
    assert "sideways" in told[0].reason


def test_a_failing_callback_costs_no_command(small: CommandQueue, caplog: pytest.LogCaptureFixture) -> None:
    def fail(entry: CorruptEntry) -> None:
        raise RuntimeError("no such semaphore")

    small.on_corrupt = fail
    for number in range(3):
        small.enqueue(batch(number))
    overwrite(small, 1, lambda entry: b"")
    assert drain(small) == ["0", "2"]
    assert "on_corrupt failed for entry 1" in caplog.text


def test_an_overwritten_length_does_not_unbalance_the_byte_account(small: CommandQueue) -> None:
    for number in range(4):
        small.enqueue(batch(number))
    overwrite(small, 1, lambda entry: bytes(100_000))
    overwrite(small, 2, lambda entry: b"")
    assert drain(small) == ["0", "3"]
    assert_capacity_is_whole(small)


# --- several processes ---


def test_eight_writers_keep_their_order(path: Path) -> None:
    queue = CommandQueue(path, capacity=100)

    def write(writer: int) -> None:
        own = CommandQueue(path)
        for number in range(500):
            own.enqueue(batch(f"{writer}:{number}"))
        own.close(destroy=False)

    writers = [start(write, writer) for writer in range(8)]
    received: dict[str, list[int]] = {str(writer): [] for writer in range(8)}
    for _ in range(4000):
        message = queue.dequeue(block=True, timeout=LONG_S)
        assert isinstance(message, CleanupBatch)
        writer, number = message.batch_id.split(":")
        received[writer].append(int(number))
    finish(*writers)
    assert all(numbers == list(range(500)) for numbers in received.values())
    assert_capacity_is_whole(queue)
    queue.close()


def test_writers_are_threads_too(small: CommandQueue) -> None:
    def write(writer: int) -> None:
        for number in range(200):
            small.enqueue(batch(f"{writer}:{number}"))

    threads = [threading.Thread(target=write, args=(writer,)) for writer in range(4)]
    for thread in threads:
        thread.start()
    received: list[str] = []
    while len(received) < 800:
        received += ids(small.dequeue_batch(block=True, timeout=LONG_S))
    for thread in threads:
        thread.join()
    for writer in range(4):
        own = [name for name in received if name.startswith(f"{writer}:")]
        assert own == [f"{writer}:{number}" for number in range(200)]


def test_a_process_started_apart_uses_the_queue(queue: CommandQueue, path: Path) -> None:
    code = (
        "import sys\n"
        "from etha_ray.tensor_bus.command_queue import CommandQueue\n"
        "from etha_ray.tensor_bus.commands import CleanupBatch\n"
        "queue = CommandQueue(sys.argv[1], capacity=3)\n"
        "assert queue.capacity == 50000\n"
        "for number in range(20):\n"
        "    queue.enqueue(CleanupBatch(str(number)))\n"
        "queue.close(destroy=False)\n"
    )
    child = subprocess.Popen([sys.executable, "-c", code, str(path)])
    received = []
    for _ in range(20):
        message = queue.dequeue(block=True, timeout=2 * LONG_S)
        assert message is not None
        received.append(message)
    assert ids(received) == [str(number) for number in range(20)]
    assert child.wait() == 0


def test_a_forked_child_uses_the_queue_it_inherited(queue: CommandQueue) -> None:
    queue.enqueue(batch("parent"))

    def work() -> None:
        assert queue.size() == 1
        queue.enqueue(batch("child"))
        queue.close(destroy=False)

    finish(start(work))
    assert drain(queue) == ["parent", "child"]


def test_forking_amid_the_traffic_of_threads(queue: CommandQueue) -> None:
    stop = threading.Event()

    def traffic() -> None:
        while not stop.is_set():
            queue.enqueue(batch("thread"))
            queue.dequeue(block=True, timeout=0.01)

    def work() -> None:
        queue.enqueue(batch("child"))

    threads = [threading.Thread(target=traffic) for _ in range(3)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(20):
            finish(start(work))
    finally:
        stop.set()
        for thread in threads:
            thread.join()


# --- waking ---


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
    writers = [start(lambda: small.enqueue(batch("late"))) for _ in range(4)]
    time.sleep(0.2)
    assert ids(small.dequeue_batch(5)) == ["0", "1", "2", "3", "4"]  # one post, and each passes it on
    finish(*writers)
    assert drain(small) == ["late"] * 4


def test_waiting_writers_take_turns_when_there_is_room_for_one(path: Path, only_posts_wake: None) -> None:
    queue = CommandQueue(path, capacity=1)
    queue.enqueue(batch("first"))
    writers = [start(lambda: queue.enqueue(batch("late"))) for _ in range(3)]
    time.sleep(0.2)
    received = ids([message for _ in range(4) if (message := woken(queue.dequeue))])
    assert received == ["first", "late", "late", "late"]
    finish(*writers)
    queue.close()


def test_clear_wakes_a_waiting_writer(small: CommandQueue, only_posts_wake: None) -> None:
    for number in range(5):
        small.enqueue(batch(number))
    writer = start(lambda: small.enqueue(batch("late")))
    time.sleep(0.2)
    small.clear()
    finish(writer)
    assert drain(small) == ["late"]


def test_a_writer_that_gave_up_or_was_killed_while_waiting_holds_nobody_up(small: CommandQueue, only_posts_wake: None) -> None:
    for number in range(5):
        small.enqueue(batch(number))
    with pytest.raises(QueueFullError):
        small.enqueue(batch("gave up"), timeout=0.05)
    writer = start(lambda: small.enqueue(batch("killed")))
    time.sleep(0.1)
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
    assert items.value == 0
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


# --- sudden death ---


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
    until(lambda: small._sleepers == 1)
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
    writer = start(lambda: small.enqueue(batch("late")))
    time.sleep(0.1)
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
    kill(writer)
    numbers = [int(name.split(":")[1]) for name in drain(queue)]
    assert numbers == list(range(numbers[0], numbers[0] + len(numbers)))
    assert_capacity_is_whole(queue)
    queue.close()
