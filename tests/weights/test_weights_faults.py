"""publish and pull while agents and workers, processes of their own, are killed and stopped: calls end, and the next ones bring what
they should."""

from __future__ import annotations

import os
import signal
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

import etha_ray
from etha_ray.errors import AgentDiedError, BatchClosedError, BatchTornError, EthaRayError, PeerLostError, TransferTimeoutError
from etha_ray.tensor_bus import losing, pinned
from etha_ray.tensor_bus.inspection import SeenAgent, inspect_agent
from etha_ray.testing import eventually
from etha_ray.transport import Copy
from etha_ray.weights import PushReport
from tests.tensor_bus.cluster import LONG, ProcessCluster, Worker, connect, process_cluster, run_agent
from tests.tensor_bus.test_atomic import Stop, Stopping
from tests.tensor_bus.test_recovery import die_at_the_first
from tests.weights import acts

TRIES = 3
"""Calls of one worker that may end with an error after a death, before one succeeds."""


class _Halfway(Stop):
    """A copy that stands still in the midst of it for as long as there is a file, and says so by another one."""

    def __init__(self, shut: Path, transport: Stopping, copies: Sequence[Copy]) -> None:
        super().__init__(transport, copies)
        self._shut = shut

    def run(self) -> int:
        if self._shut.exists():
            self.half.run()
            self._shut.with_suffix(".inside").touch()
            while self._shut.exists():
                time.sleep(0.01)
        return self.whole.run()


def halting_agent(folder: Path, arguments: list[str]) -> None:
    """An agent whose copies stand still while there is a file of its rank in ``folder``."""
    shut = folder / arguments[arguments.index("--rank") + 1]

    class Halting(Stopping):
        def prepare(self, copies: Sequence[Copy]) -> Any:
            return _Halfway(shut, self, copies)

    pinned.MappedTransport = lambda _: Halting()  # type: ignore[assignment, misc]
    run_agent(arguments)


class Scene:
    """A publisher on agent 0, which waits for so many replicas, and replicas "0", "1"... on the agents after it, each a process of its own.
    All have version 1."""

    def __init__(self, cluster: ProcessCluster, folder: Path, replicas: int, waits_for: int) -> None:
        self.cluster, self._folder, self._waits_for, self._first = cluster, folder, waits_for, 110
        self.publisher = self.published()
        self.receivers = [self.pulled(index) for index in range(replicas)]
        self.publisher.call(acts.await_replicas, replicas)
        self.publisher.start(acts.push_numbers, 1)
        for receiver in self.receivers:
            receiver.start(acts.update_numbers)
        assert [receiver.result() for receiver in self.receivers] == [1] * replicas
        self.publisher.result()

    def published(self) -> Worker:
        worker = self._worker(0)
        worker.call(acts.publish_numbers, self._waits_for)
        return worker

    def pulled(self, index: int) -> Worker:
        worker = self._worker(index + 1)
        worker.call(acts.pull_numbers, str(index))
        return worker

    def _worker(self, rank: int) -> Worker:
        worker = self.cluster.worker()
        worker.call(connect, rank, self.cluster.paths[rank])
        return worker

    def agent(self, rank: int) -> int:
        return self.cluster.pids[rank]

    def restart(self, rank: int) -> None:
        self.cluster.kill(self.agent(rank))
        self.cluster.start_agent(rank)

    def proceed(self, rank: int) -> None:
        """SIGCONT; returns once its agent is seen to be there again: until then calls end at once."""
        os.kill(self.agent(rank), signal.SIGCONT)
        eventually(lambda: self._seen(rank).life == "running")

    def _seen(self, rank: int) -> SeenAgent:
        seen = inspect_agent(rank, self.cluster.paths[rank])
        assert seen is not None
        return seen

    def under_way(self, rank: int, state: str, count: int = 1) -> Callable[[], bool]:
        """Whether as many transfers that began after this call are in that state at an agent, as it said last."""
        began = time.time()

        def look() -> bool:
            status = self._seen(rank).status
            batches = () if status is None else status.batches
            transfers = [batch.transfer for batch in batches if batch.transfer is not None]
            return sum(transfer.began >= began and transfer.state == state for transfer in transfers) == count

        return look

    def shut(self, rank: int) -> None:
        (self._folder / str(rank)).touch()

    def inside(self, rank: int) -> bool:
        return (self._folder / f"{rank}.inside").exists()

    def open(self, rank: int) -> None:
        (self._folder / f"{rank}.inside").unlink()
        (self._folder / str(rank)).unlink()

    def goes_on(self, *already: Worker) -> None:
        """All call again, but those that are ``already`` at it (`call_on`). What a push brings to all is the next thing that they take, and
        the push after that fails for nobody. Uses the versions from 110 to 199, then those from 210 to 299."""
        for worker in (self.publisher, *self.receivers):
            if worker not in already:
                self.call_on(worker)
        _, reached = self.publisher.result(2 * LONG)
        for receiver in self.receivers:
            errors, versions = receiver.result(2 * LONG)
            later = [version for version in versions if version >= reached]
            # Its agent may have taken that for a call which had ended with an error by then.
            assert later == [reached, self._final] or (later == [self._final] and errors)
        self._first += 100

    def call_on(self, worker: Worker) -> None:
        """Have it push, or update, until `goes_on` is over."""
        if worker is self.publisher:
            worker.start(acts.push_on, self._first, self._final, TRIES)
        else:
            worker.start(acts.update_on, self._final, TRIES)

    @property
    def _final(self) -> int:
        return self._first + 89


Stage = Callable[..., Scene]


@pytest.fixture
def stage(tmp_path: Path) -> Iterator[Stage]:
    """Makes a scene with so many replicas. By default the publisher waits for all of them, and the test starts again what dies."""
    with ExitStack() as stack:

        def make(replicas: int, waits_for: int | None = None, restarts: bool = True) -> Scene:
            made = process_cluster(replicas + 1, restarts=restarts, run=partial(halting_agent, tmp_path))
            return Scene(stack.enter_context(made), tmp_path, replicas, replicas if waits_for is None else waits_for)

        yield make


def ended(worker: Worker) -> Any:
    """What a call came to: its result, or the typed error that it ended with, which is no timeout."""
    try:
        return worker.result(2 * LONG)
    except TimeoutError:
        raise
    except EthaRayError as error:
        return error


ENDS = pytest.mark.parametrize("rank", [0, 1], ids=["the publisher's", "a receiver's"])


class TestAgents:
    @ENDS
    def test_killed_between_two_pushes(self, stage: Stage, rank: int) -> None:
        scene = stage(1)
        for _ in range(2):
            scene.restart(rank)
            scene.goes_on()

    @ENDS
    def test_killed_while_a_push_waits_for_an_update(self, stage: Stage, rank: int) -> None:
        scene = stage(1)
        announced = scene.under_way(0, "announced")
        scene.publisher.start(acts.push_numbers, 2)
        eventually(announced)
        scene.restart(rank)
        if rank == 0:
            assert isinstance(ended(scene.publisher), AgentDiedError)
        else:  # it waits for that agent to come back, and for the update
            assert scene.receivers[0].call(acts.update_numbers) == 2
            assert scene.publisher.result().failed == {}
        scene.goes_on()

    @ENDS
    def test_killed_while_an_update_waits_for_a_push(self, stage: Stage, rank: int) -> None:
        scene = stage(1)
        (receiver,) = scene.receivers
        waiting = scene.under_way(1, "waiting")
        if rank == 0:
            scene.call_on(receiver)
        else:
            receiver.start(acts.update_numbers)
        eventually(waiting)
        scene.restart(rank)
        if rank == 1:
            assert isinstance(ended(receiver), AgentDiedError)
            scene.call_on(receiver)
        scene.goes_on(receiver)

    @ENDS
    def test_killed_in_the_midst_of_the_copy(self, stage: Stage, rank: int) -> None:
        """The receiver is torn, says so, and is whole with the next version."""
        scene = stage(1)
        scene.shut(1)
        scene.publisher.start(acts.push_numbers, 2)
        scene.receivers[0].start(acts.update_numbers)
        eventually(lambda: scene.inside(1))
        scene.cluster.kill(scene.agent(rank))
        scene.open(1)
        received = ended(scene.receivers[0])
        assert isinstance(received, BatchTornError if rank == 0 else AgentDiedError)
        assert scene.receivers[0].call(acts.held) == (0, True)
        scene.cluster.start_agent(rank)
        if rank == 0:
            assert isinstance(ended(scene.publisher), AgentDiedError)
        else:
            assert scene.receivers[0].call(acts.update_numbers) == 2
            assert scene.publisher.result().failed == {}
        scene.goes_on()

    def test_the_publishers_stopped_and_continued(self, stage: Stage) -> None:
        scene = stage(1)
        scene.cluster.pause(scene.agent(0))
        scene.call_on(scene.receivers[0])
        scene.publisher.start(acts.push_numbers, 2)
        assert isinstance(ended(scene.publisher), AgentDiedError)
        scene.proceed(0)
        scene.goes_on(scene.receivers[0])

    def test_a_receivers_stopped_and_continued(self, stage: Stage) -> None:
        """It finds in its queue an update that nobody waits for any more, and a receiver says what it holds after that."""
        scene = stage(1)
        announced = scene.under_way(0, "announced")
        scene.publisher.start(acts.push_numbers, 2)
        eventually(announced)
        scene.cluster.pause(scene.agent(1))
        scene.receivers[0].start(acts.update_numbers)
        assert isinstance(ended(scene.receivers[0]), AgentDiedError)
        assert scene.receivers[0].call(acts.held) == (1, False)
        scene.proceed(1)
        eventually(lambda: scene.receivers[0].call(acts.held) != (1, False))
        scene.call_on(scene.receivers[0])
        ended(scene.publisher)
        scene.goes_on(scene.receivers[0])


def test_a_replica_whose_agent_is_replaced_during_a_push_is_who_it_was() -> None:
    """To the publisher it is gone for a moment, and there again with the same places, which that push still has."""
    with process_cluster(2, restarts=True) as cluster:
        clients = [cluster.client(rank) for rank in range(2)]
        source, target = torch.zeros(3), torch.zeros(3)
        with (
            etha_ray.publish({"w": source}, "plain", client=clients[0]) as sender,
            etha_ray.pull({"w": target}, "plain", client=clients[1], timeout=LONG) as receiver,
        ):
            eventually(lambda: sender.replicas == ["0"])
            link = sender._links["0"]
            for version in (1, 2):
                source.fill_(version)
                pushed = sender.start_push(timeout=LONG)
                eventually(lambda: link._busy)
                cluster.kill(cluster.pids[1])
                eventually(lambda: "0" not in sender._seen.receivers)
                cluster.start_agent(1)
                eventually(lambda: "0" in sender._seen.receivers)
                assert receiver.update(LONG) == version
                assert pushed.result(LONG).failed == {}
                assert torch.equal(source, target)
        for client in clients:
            client.close()


@pytest.mark.parametrize("what", ["push", "update", "pull"])
def test_ctrl_c_ends_what_waits_and_all_go_on(stage: Stage, what: str) -> None:
    scene = stage(1)
    worker = scene.publisher if what == "push" else scene.receivers[0]
    waits = scene.under_way(0, "announced") if what == "push" else scene.under_way(1, "waiting")
    worker.start(acts.interrupted, what)
    if what == "pull":
        scene.publisher.call(acts.await_half, True)
    else:
        eventually(waits)
    os.kill(worker.pid, signal.SIGINT)
    assert worker.result() == "KeyboardInterrupt"
    scene.publisher.call(acts.await_half, False)
    scene.goes_on()


def patient_agent(arguments: list[str]) -> None:
    """An agent whose transfers wait for members that are gone for as long as their workers let them."""
    losing.SUCCESSION_TIMEOUT = 10 * LONG
    run_agent(arguments)


def test_nobody_waits_for_one_who_has_begun_anew() -> None:
    """The agent that was to be told that it left was dead then, and the next one knows it from the journal: it may be back any moment."""
    with process_cluster(2, restarts=True, run=patient_agent) as cluster:
        clients, first = [cluster.client(rank) for rank in range(2)], cluster.worker()
        first.call(connect, 1, cluster.paths[1])
        source, target = torch.full((3,), 2.0), torch.zeros(3)
        with etha_ray.publish({"w": source}, "plain", client=clients[0]) as sender:
            first.call(acts.pull_plain, "0")
            eventually(lambda: sender.replicas == ["0"])
            link = sender._links["0"]
            cluster.kill(cluster.pids[0])
            pushed = sender.start_push(timeout=None)
            eventually(lambda: link._busy)
            cluster.kill(first.pid)
            with etha_ray.pull({"w": target}, "plain", client=clients[1], blocking=False) as receiver:
                cluster.start_agent(0)
                with pytest.raises(PeerLostError, match="were not back"):
                    pushed.result(LONG)
                pushed = sender.start_push(timeout=LONG)
                assert receiver.update(LONG) == pushed.result(LONG).version
                assert torch.equal(source, target)
        for client in clients:
            client.close()


def deaf_agent(handler: str, arguments: list[str]) -> None:
    """The first agent of rank 0 dies of the first command for this handler."""
    if arguments[arguments.index("--rank") + 1] == "0":
        die_at_the_first(handler, arguments)
    else:
        run_agent(arguments)


@pytest.mark.parametrize("handler", ["_on_init_pair", "_on_register"])
def test_the_publishers_agent_dies_of_what_it_hears_as_they_connect(handler: str) -> None:
    """The next one does not know of it, and nobody waits for an answer to that."""
    with process_cluster(2, restarts=True, run=partial(deaf_agent, handler)) as cluster:
        publisher, receiver = cluster.worker(), cluster.worker()
        for rank, worker in enumerate((publisher, receiver)):
            worker.call(connect, rank, cluster.paths[rank])
        publisher.call(acts.publish_numbers, 1)
        receiver.call(acts.pull_numbers, "0")
        cluster.wait(cluster.pids[0])
        cluster.start_agent(0)
        publisher.start(acts.push_on, 1, 9, TRIES)
        receiver.start(acts.update_on, 9, TRIES)
        for worker in (publisher, receiver):
            errors, _ = worker.result(2 * LONG)
            assert all(isinstance(error, AgentDiedError | PeerLostError | BatchClosedError) for error in errors), errors
    (Path(tempfile.gettempdir()) / f"{cluster.namespace}.died").unlink()


class TestReceivers:
    def test_killed_during_a_push_and_replaced(self, stage: Stage) -> None:
        """Before its update, and in the midst of the copy."""
        scene = stage(1)
        announced = scene.under_way(0, "announced")
        scene.publisher.start(acts.push_numbers, 2)
        eventually(announced)
        scene.cluster.kill(scene.receivers[0].pid)
        assert isinstance(ended(scene.publisher), PeerLostError)
        scene.receivers = [scene.pulled(0)]
        scene.goes_on()
        scene.shut(1)
        scene.publisher.start(acts.push_numbers, 200)
        scene.receivers[0].start(acts.update_numbers)
        eventually(lambda: scene.inside(1))
        scene.cluster.kill(scene.receivers[0].pid)
        scene.open(1)
        assert isinstance(ended(scene.publisher), PeerLostError | PushReport)  # its agent may not have seen that by the copy's end
        scene.receivers = [scene.pulled(0)]
        scene.goes_on()

    def test_the_publisher_is_killed_and_replaced_while_they_wait(self, stage: Stage) -> None:
        scene = stage(2)
        waiting = [scene.under_way(rank, "waiting") for rank in (1, 2)]
        for receiver in scene.receivers:
            scene.call_on(receiver)
        for each in waiting:
            eventually(each)
        scene.cluster.kill(scene.publisher.pid)
        scene.publisher = scene.published()
        scene.goes_on(*scene.receivers)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "stopped"])
@pytest.mark.parametrize("victim", ["worker", "agent"])
def test_a_replica_that_fails_keeps_nothing_from_the_other(stage: Stage, victim: str, number: signal.Signals) -> None:
    """Nobody replaces it. The other has its version while the push may still wait for the one that fails, and gets the next ones."""
    scene = stage(2, waits_for=1, restarts=False)
    good, bad = scene.receivers
    pid = bad.pid if victim == "worker" else scene.agent(2)
    announced = scene.under_way(0, "announced", 2)
    scene.publisher.start(acts.push_numbers, 2)
    eventually(announced)
    if number == signal.SIGKILL:
        scene.cluster.kill(pid)
    else:
        scene.cluster.pause(pid, 2)
    assert good.call(acts.update_numbers) == 2
    if (victim, number) == ("worker", signal.SIGSTOP):
        assert not scene.publisher.answers(), "it waits for who only stands still until its time is up"
        scene.cluster.kill(pid)
    report = ended(scene.publisher)
    assert list(report.replicas) == ["0"]
    assert isinstance(report.failed["1"], PeerLostError)
    for version in (3, 4):
        scene.publisher.start(acts.push_numbers, version)
        assert good.call(acts.update_numbers) == version
        assert list(ended(scene.publisher).replicas) == ["0"]
    if (victim, number) == ("agent", signal.SIGSTOP):
        scene.proceed(2)


def test_a_replica_that_stands_still_holds_up_each_push_for_so_long_only(stage: Stage) -> None:
    """Once it goes on it gets the version of then."""
    scene = stage(2, waits_for=1, restarts=False)
    good, bad = scene.receivers
    scene.cluster.pause(bad.pid, 2)
    for version in (2, 3):
        scene.publisher.start(acts.push_numbers, version, 0.2)
        assert good.call(acts.update_numbers) == version
        report = ended(scene.publisher)
        assert list(report.replicas) == ["0"]
        assert isinstance(report.failed["1"], TransferTimeoutError)
    os.kill(bad.pid, signal.SIGCONT)
    assert bad.call(acts.held) == (1, False)
    scene.publisher.start(acts.push_numbers, 4)
    for receiver in scene.receivers:
        receiver.start(acts.update_numbers)
    assert [receiver.result() for receiver in scene.receivers] == [4, 4]
    assert ended(scene.publisher).failed == {}
