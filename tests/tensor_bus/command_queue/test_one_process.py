"""Order, room, limits and waiting, in one process."""

from __future__ import annotations

import random
import re
import time
from pathlib import Path

import pytest

from etha_ray.errors import ConfigError, QueueFullError
from etha_ray.tensor_bus import command_queue
from etha_ray.tensor_bus.command_queue import CommandQueue
from etha_ray.tensor_bus.commands import Ping, QueryStatus, RegisterTensors, Transfer
from etha_ray.tensor_bus.messages import Message
from tests.tensor_bus.command_queue.helpers import (
    LONG_S,
    assert_capacity_is_whole,
    batch,
    drain,
    ids,
)


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
