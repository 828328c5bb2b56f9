"""A process that is stopped in the midst of a write keeps others from it, and from nothing else; they hear who it is."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import signal
import threading
from collections.abc import Callable, Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch

from etha_ray.errors import AgentDiedError, QueueHeldError
from etha_ray.tensor_bus import command_queue, lmdb_file, write_lock
from etha_ray.tensor_bus.command_queue import CommandQueue
from etha_ray.tensor_bus.lmdb_file import open_file
from etha_ray.tensor_bus.state_file import StateFile
from etha_ray.tensor_bus.write_lock import WriteLock
from etha_ray.testing import eventually
from tests.tensor_bus import cluster as acts
from tests.tensor_bus.cluster import LONG, ProcessCluster, Worker, local_cluster, process_cluster
from tests.tensor_bus.command_queue.helpers import assert_capacity_is_whole, batch, drain, finish, kill, start
from tests.tensor_bus.test_failures import settled, works


def state_of(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def stop_here() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def stopping_in(function: str) -> None:
    """This process stops where it comes to ``function`` of the command queue's module for the first time, and goes on with it later."""
    real = getattr(command_queue, function)

    def stopped(*given: Any) -> Any:
        setattr(command_queue, function, real)
        stop_here()
        return real(*given)

    setattr(command_queue, function, stopped)


@contextlib.contextmanager
def stopped(action: Callable[[], object]) -> Iterator[BaseProcess]:
    """A forked child that stops itself in ``action``, once it stands still; killed in the end, if it has not been."""
    child = start(action)
    pid = child.pid
    assert pid is not None
    try:
        eventually(lambda: state_of(pid) == "T")
        yield child
    finally:
        kill(child)


def go_on(process: BaseProcess) -> None:
    assert process.pid is not None
    os.kill(process.pid, signal.SIGCONT)


@pytest.fixture
def queue(tmp_path: Path) -> Iterator[CommandQueue]:
    queue = CommandQueue(tmp_path / "bus.lmdb", capacity=5)
    yield queue
    queue.close()


@pytest.fixture
def holder(queue: CommandQueue) -> Iterator[BaseProcess]:
    """A child that has stopped while it put its command into the queue."""

    def write() -> None:
        stopping_in("_write_state")
        queue.enqueue(batch("held"))

    with stopped(write) as child:
        yield child


class TestQueue:
    def test_everything_else_ends_and_says_who_it_is(self, queue: CommandQueue, holder: BaseProcess) -> None:
        calls: list[Callable[[], object]] = [
            lambda: queue.enqueue(batch("x"), block=False),
            lambda: queue.enqueue(batch("x"), timeout=0.1),
            lambda: queue.enqueue(batch("x")),
            lambda: queue.dequeue(block=True),
            lambda: queue.dequeue_batch(),
            queue.size,
            queue.head,
            queue.peek,
            queue.clear,
        ]
        for call in calls:
            with pytest.raises(QueueHeldError, match=rf"process {holder.pid} \(.*\), which is stopped, is in the midst of a write"):
                call()
        queue.wake()  # only wakes

    def test_who_opens_it_hears_that_too(self, queue: CommandQueue, holder: BaseProcess) -> None:
        path = queue.lmdb_path

        def open_it() -> None:
            with pytest.raises(QueueHeldError, match=f"process {holder.pid} "):
                CommandQueue(path)

        finish(start(open_it))

    def test_many_threads_do_not_wait_one_after_the_other(self, queue: CommandQueue, holder: BaseProcess) -> None:
        raised: list[float] = []

        def put() -> None:
            with pytest.raises(QueueHeldError) as caught:
                queue.enqueue(batch("x"))
            raised.append(float(re.findall(r"within ([\d.]+) s", str(caught.value))[0]))

        threads = [threading.Thread(target=put, daemon=True) for _ in range(10)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(LONG)
        assert len(raised) == 10
        assert sorted(raised)[5] < write_lock.FAILURE_TIMEOUT, raised

    def test_once_it_is_killed_all_goes_on(self, queue: CommandQueue, holder: BaseProcess) -> None:
        with pytest.raises(QueueHeldError):
            queue.size()
        kill(holder)
        assert drain(queue) == []
        assert_capacity_is_whole(queue)

    def test_once_it_goes_on_so_do_those_who_wait(self, queue: CommandQueue, holder: BaseProcess) -> None:
        waiter = threading.Thread(target=lambda: queue.enqueue(batch("after")), daemon=True)
        waiter.start()
        go_on(holder)
        finish(holder)
        waiter.join(LONG)
        assert drain(queue) == ["held", "after"]
        assert_capacity_is_whole(queue)

    def test_who_looks_again_and_again_is_told(self, queue: CommandQueue, holder: BaseProcess, monkeypatch: pytest.MonkeyPatch) -> None:
        now = [100.0]
        monkeypatch.setattr(write_lock.time, "monotonic", lambda: now.__setitem__(0, now[0] + 0.01) or now[0])
        queue.check_free()
        now[0] += 4.0
        queue.check_free()
        now[0] += 1.5
        with pytest.raises(QueueHeldError, match=f"process {holder.pid} "):
            queue.check_free()
        kill(holder)
        queue.check_free()

    def test_who_has_it_in_turns_is_not_stuck(self, queue: CommandQueue, monkeypatch: pytest.MonkeyPatch) -> None:
        owners = iter([7, 7, 0, 7, 7, 7])
        now = [100.0]
        monkeypatch.setattr(write_lock.time, "monotonic", lambda: now[0])
        monkeypatch.setattr(WriteLock, "owner", property(lambda _: next(owners)))
        for _ in range(6):
            queue.check_free()
            now[0] += 2.0


class TestFiles:
    def test_it_lies_where_it_is_looked_for(self, tmp_path: Path) -> None:
        with open_file(tmp_path / "a.lmdb", map_size=1 << 20, max_dbs=1, create=True) as file:
            assert file.write_lock.owner == 0
            with file.env.begin(write=True):
                assert file.write_lock.owner == threading.get_native_id()
                file.write_lock.confirm()
            assert file.write_lock.visible
            assert file.write_lock.owner == 0

    def test_an_lmdb_that_has_it_elsewhere_is_not_looked_at(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(write_lock, "_PLACE", 30)
        with open_file(tmp_path / "a.lmdb", map_size=1 << 20, max_dbs=1, create=True) as file:
            with file.env.begin(write=True):
                file.write_lock.confirm()
            assert not file.write_lock.visible
            monkeypatch.undo()
            with file.env.begin(write=True):
                file.write_lock.await_free(0.0)

    def test_looking_keeps_the_locks_of_this_process(self, tmp_path: Path) -> None:
        """Closing any descriptor of the lock file would give back LMDB's own, and the next process to open it would clear it."""
        path = tmp_path / "a.lmdb"
        with open_file(path, map_size=1 << 20, max_dbs=1, create=True):
            inode = os.stat(f"{path}-lock").st_ino
            assert [line for line in Path("/proc/locks").read_text().splitlines() if f":{inode} " in line]

    def test_descriptors_are_given_back(self, tmp_path: Path) -> None:
        def count() -> int:
            return len(os.listdir("/proc/self/fd"))

        before = count()
        for _ in range(3):
            open_file(tmp_path / "a.lmdb", map_size=1 << 20, max_dbs=1, create=True).close()
        assert count() == before

    def test_an_agent_that_is_stopped_while_it_writes_its_state(self, tmp_path: Path) -> None:
        """Who has that open reads on."""
        path = str(tmp_path / "state.lmdb")
        state = StateFile(path, create=True)
        state.put(b"k", b"v")

        def write() -> None:
            with state._transaction(write=True) as txn:
                txn.put(b"k", b"w")
                stop_here()

        with stopped(write) as agent:

            def open_it() -> None:
                with pytest.raises(QueueHeldError, match=f"process {agent.pid} "):
                    StateFile(path)

            finish(start(open_it))
            assert state.get(b"k") == b"v"
        state.close(destroy=True)

    def test_who_is_stopped_while_it_opens_a_file_keeps_nobody_for_ever(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(lmdb_file, "FAILURE_TIMEOUT", 0.3)
        path = tmp_path / "a.lmdb"

        def hold() -> None:
            with path.open("wb") as file:
                fcntl.flock(file, fcntl.LOCK_EX)
                stop_here()

        with stopped(hold), pytest.raises(QueueHeldError, match=r"opening or removing it, and was not done within 0\.3 s"):
            open_file(path, map_size=1 << 20, max_dbs=1, create=True)
        open_file(path, map_size=1 << 20, max_dbs=1, create=True).close()

    def test_a_thread_that_is_in_a_transaction_is_told_instead_of_waiting_for_itself(self, tmp_path: Path) -> None:
        """As a signal handler would."""
        with (
            open_file(tmp_path / "a.lmdb", map_size=1 << 20, max_dbs=1, create=True) as file,
            file.env.begin(write=True),
            pytest.raises(QueueHeldError, match=f"process {os.getpid()} "),
        ):
            file.write_lock.await_free(0.1)


@pytest.fixture
def cluster() -> Iterator[ProcessCluster]:
    with process_cluster(2) as made:
        yield made


def ping(state: dict[str, Any], stops: bool = False) -> None:
    if stops:
        stopping_in("_write_state")
    state["client"].ping(LONG)


class TestAgents:
    def test_the_agents_log_says_who_it_is(self, caplog: pytest.LogCaptureFixture) -> None:
        with local_cluster(1) as cluster:
            client = cluster.client()

            def write() -> None:
                stopping_in("_write_state")
                CommandQueue(cluster.paths[0].command_queue).enqueue(batch("held"))

            with stopped(write) as child:
                eventually(lambda: re.search(rf"agent 0 can take no commands: .* process {child.pid} ", caplog.text))
            client.ping(LONG)

    def test_a_worker_that_is_stopped_in_a_write(self, cluster: ProcessCluster) -> None:
        """Its agent and the other workers hear of it; the agent lives on, and all go on once it is killed."""
        one, two, third = cluster.worker(), cluster.worker(), cluster.worker()
        settled(cluster, one, two)
        third.call(acts.connect, 0, cluster.paths[0])
        two.call(acts.start_transfer, "x", "recv")
        third.start(ping, True)
        eventually(lambda: state_of(third.pid) == "T")
        with pytest.raises(QueueHeldError, match=f"process {third.pid} "):
            one.call(acts.transfer, "x", "send")
        cluster.kill(third.pid)
        works_again(cluster, one, two)

    def test_who_waits_for_an_answer_that_cannot_be_asked_for(self, cluster: ProcessCluster) -> None:
        one, third = cluster.worker(), cluster.worker()
        for worker in (one, third):
            worker.call(acts.connect, 0, cluster.paths[0])
        one.start(acts.join_pair, "p", "a", "b", 1, None, None)  # nobody else comes
        eventually(lambda: "p" in " ".join(cluster.master.list()))
        third.start(ping, True)
        eventually(lambda: state_of(third.pid) == "T")
        with pytest.raises(QueueHeldError, match=f"process {third.pid} "):
            one.result()
        os.kill(third.pid, signal.SIGCONT)
        third.result()
        one.call(ping)

    def test_an_agent_that_is_stopped_in_a_write(self, tmp_path: Path) -> None:
        with process_cluster(1, run=agent_that_stops) as cluster:
            worker = cluster.worker()
            worker.call(acts.connect, 0, cluster.paths[0])
            os.kill(cluster.pids[0], signal.SIGUSR1)
            with pytest.raises(AgentDiedError, match="stopped or stuck"):
                worker.call(ping)
            os.kill(cluster.pids[0], signal.SIGCONT)
            eventually(lambda: state_of(cluster.pids[0]) != "T")
            worker.call(ping)


def agent_that_stops(arguments: list[str]) -> None:
    signal.signal(signal.SIGUSR1, lambda *_: stopping_in("_write_state"))
    acts.run_agent(arguments)


def works_again(cluster: ProcessCluster, one: Worker, two: Worker) -> None:
    """The transfer of ``two`` that still waits gets what ``one`` sends now."""
    before = list(cluster.pids)
    one.call(acts.transfer, "x", "send")
    two.call(wait_started)
    assert torch.equal(one.call(acts.read, "x")[0], two.call(acts.read, "x")[0])
    works(one, two)
    assert cluster.pids == before


def wait_started(state: dict[str, Any]) -> Any:
    return state["semaphore"].result(LONG)
