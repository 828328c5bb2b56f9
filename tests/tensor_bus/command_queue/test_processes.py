"""Several processes and threads use one queue."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path

from etha_ray.tensor_bus.command_queue import CommandQueue
from etha_ray.tensor_bus.commands import CleanupBatch
from tests.tensor_bus.command_queue.helpers import (
    LONG_S,
    assert_capacity_is_whole,
    batch,
    drain,
    finish,
    ids,
    start,
)


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
