"""What is wrong in the queue is dropped, and its sender told; it costs no room."""

from __future__ import annotations

import logging
import zlib

import pytest

from etha_ray.tensor_bus import command_queue
from etha_ray.tensor_bus.command_queue import CommandQueue
from etha_ray.tensor_bus.commands import CleanupBatch, Transfer
from etha_ray.tensor_bus.queue_entry import _AFTER_CHECKSUM, _CHECKSUM, CorruptEntry
from tests.tensor_bus.command_queue.helpers import (
    assert_capacity_is_whole,
    batch,
    drain,
    ids,
    overwrite,
)


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
    lines = [record.getMessage() for record in caplog.records if record.name == command_queue.__name__]
    assert f"dropped the corrupt entry 2 of {small.lmdb_path}" in lines[1]
    assert "starts with ff 67 61 72" in lines[1]
    assert len(lines) == 3
    assert_capacity_is_whole(small)


def test_a_header_that_is_right_may_have_a_name_that_is_none(small: CommandQueue) -> None:
    told: list[CorruptEntry] = []
    small.on_corrupt = told.append
    small.enqueue(batch(0))
    name = b"/\xff\xfe"
    checked = _AFTER_CHECKSUM.pack(0, 5, len(name)) + name
    overwrite(small, 0, lambda entry: _CHECKSUM.pack(zlib.crc32(checked)) + checked)
    assert small.dequeue() is None
    assert [(entry.semaphore_name, entry.command_id) for entry in told] == [(None, 5)]
    assert told[0].reason.startswith("its semaphore's name is none: 'utf-8' codec can't decode byte 0xff")


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
