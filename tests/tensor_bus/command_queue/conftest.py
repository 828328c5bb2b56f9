"""Queues of these tests."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from etha_ray.tensor_bus import command_queue
from etha_ray.tensor_bus.command_queue import CommandQueue
from etha_ray.tensor_bus.semaphores import queue_semaphore_name
from tests.tensor_bus.command_queue.helpers import (
    LONG_S,
)


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
