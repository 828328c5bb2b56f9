"""Who dies is replaced, and the others go on without doing anything: agents that take up what the dead one served, workers that come
back, sides that come back with another number of ranks."""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.tensor import Shard

from etha_ray.errors import AgentDiedError, BatchClosedError, PeerLostError
from etha_ray.layout import MeshSpec
from etha_ray.tensor_bus.command_queue import CommandQueue
from etha_ray.tensor_bus.commands import BaseCommand, Ping
from etha_ray.tensor_bus.inspection import inspect_agent
from etha_ray.testing import eventually, succeed
from tests.tensor_bus import cluster as acts
from tests.tensor_bus.cluster import LONG, ProcessCluster, Side, Worker, local_cluster, process_cluster
from tests.tensor_bus.test_failures import settled, works


@pytest.fixture
def cluster() -> Iterator[ProcessCluster]:
    with process_cluster(2, restarts=True) as made:
        yield made


def held(state: dict[str, Any], batch_id: str) -> tuple[int, tuple[int, ...]]:
    handler = state["handlers"][batch_id]
    return handler.version, handler.torn


def started_is_over(state: dict[str, Any]) -> Any:
    return state["semaphore"].result(LONG)


def ping(state: dict[str, Any]) -> None:
    state["client"].ping(LONG)


@contextlib.contextmanager
def in_the_queue_of_a_dead_agent(cluster: ProcessCluster, dies: bool) -> Iterator[None]:
    """If agent 0 ``dies``: what is called within stands in its queue then, and when the next one begins."""
    if not dies:
        yield
        return
    cluster.pause(cluster.pids[0])
    queue = CommandQueue(cluster.paths[0].command_queue)
    yield
    eventually(queue.size)
    queue.close(destroy=False)
    cluster.kill(cluster.pids[0])
    cluster.start_agent(0)


def served(cluster: ProcessCluster, rank: int) -> tuple[int, int]:
    """Pairs and batches of an agent, as it said last."""
    seen = inspect_agent(rank, cluster.paths[rank])
    assert seen is not None
    return (0, 0) if seen.status is None else (len(seen.status.pairs), len(seen.status.batches))


class TestAgents:
    @pytest.mark.parametrize("dead", [(0,), (1,), (0, 1)])
    def test_killed_between_two_transfers(self, cluster: ProcessCluster, dead: tuple[int, ...]) -> None:
        """Workers call nothing but their next transfer, and it works: before, while and after another agent is started."""
        one, two = cluster.worker(), cluster.worker()
        settled(cluster, one, two)
        works(one, two)
        for rank in dead:
            cluster.kill(cluster.pids[rank])
        one.call(acts.fill, "x", 1)
        one.start(acts.transfer, "x", "send")
        two.start(acts.transfer, "x", "recv")
        for rank in dead:
            cluster.start_agent(rank)
        sent, received = one.result(), two.result()
        assert (sent.version, received.version) == (2, 2)
        assert torch.equal(one.call(acts.read, "x")[0], two.call(acts.read, "x")[0])
        works(one, two)
        assert one.call(held, "x") == two.call(held, "x") == (3, ())

    def test_killed_while_a_transfer_waits(self, cluster: ProcessCluster) -> None:
        """The one that it had taken ends with an error, that of the other side waits on, and the next one works."""
        one, two = cluster.worker(), cluster.worker()
        settled(cluster, one, two)
        works(one, two)
        two.call(acts.start_transfer, "x", "recv")
        one.call(ping)
        two.call(ping)  # after that the agent has taken the transfer
        cluster.kill(cluster.pids[1])
        with pytest.raises(AgentDiedError, match=r"agent 1 \(pid \d+\) died.* it had taken transfer for 'x'.*call again"):
            two.call(started_is_over)
        one.start(acts.transfer, "x", "send")
        cluster.start_agent(1)
        assert two.call(acts.transfer, "x", "recv").version == 2
        assert one.result().version == 2
        works(one, two)

    def test_what_stands_in_the_queue_is_done_once_by_the_next_agent(self, cluster: ProcessCluster) -> None:
        one, two = cluster.worker(), cluster.worker()
        settled(cluster, one, two)
        one.call(ping)
        cluster.pause(cluster.pids[0])
        one.call(acts.start_transfer, "x", "send")
        cluster.kill(cluster.pids[0])
        cluster.start_agent(0)
        assert two.call(acts.transfer, "x", "recv").version == 1
        assert one.call(started_is_over).version == 1
        two.call(acts.start_transfer, "x", "recv")
        works_once = two.call(is_done)
        assert not works_once, "it was sent twice"
        one.call(acts.transfer, "x", "send")
        assert two.call(started_is_over).version == 2

    @pytest.mark.parametrize("what", ["init_pair", "register", "recv", "close"])
    def test_other_commands_that_stand_in_the_queue_are_done_once(self, cluster: ProcessCluster, what: str) -> None:
        one, two = cluster.worker(), cluster.worker()
        for rank, worker in enumerate((one, two)):
            worker.call(acts.connect, rank, cluster.paths[rank])
        with in_the_queue_of_a_dead_agent(cluster, what == "init_pair"):
            one.start(acts.join_pair, "p", "a", "b", 1, None, None)
        two.call(acts.join_pair, "p", "b", "a", 1, None, None)
        one.result()
        with in_the_queue_of_a_dead_agent(cluster, what == "register"):
            one.start(acts.register, "x", [(torch.zeros(6), "p")])
        two.call(acts.register, "x", [(torch.ones(6), "p")])
        one.result()
        with in_the_queue_of_a_dead_agent(cluster, what == "recv"):
            one.call(acts.start_transfer, "x", "recv")
        assert two.call(acts.transfer, "x", "send").version == 1
        assert one.call(started_is_over).version == 1
        two.call(acts.start_transfer, "x", "send")
        assert not two.call(is_done), "it was received twice"
        assert one.call(acts.transfer, "x", "recv").version == two.call(started_is_over).version == 2
        with in_the_queue_of_a_dead_agent(cluster, what == "close"):
            one.start(acts.close_batch, "x")
        one.result()
        one.start(acts.register, "x", [(torch.ones(6), "p")])  # the next one of that name is not closed
        two.call(acts.wait_ready, "x")
        one.result()
        works(one, two)
        eventually(lambda: served(cluster, 0) == (1, 1))

    def test_what_nobody_waits_for_any_more_is_not_done(self, cluster: ProcessCluster) -> None:
        one, two = cluster.worker(), cluster.worker()
        settled(cluster, one, two)
        one.call(ping)
        cluster.pause(cluster.pids[0])
        with pytest.raises(TimeoutError):
            one.call(acts.transfer, "x", "send", 0.2)
        cluster.kill(cluster.pids[0])
        cluster.start_agent(0)
        one.call(acts.wait_ready, "x")
        two.call(acts.start_transfer, "x", "recv")
        one.call(ping)
        assert not two.call(is_done)
        one.call(acts.transfer, "x", "send")
        assert two.call(started_is_over).version == 1

    def test_killed_again_and_again(self, cluster: ProcessCluster) -> None:
        one, two = cluster.worker(), cluster.worker()
        settled(cluster, one, two)
        for step in range(3):
            cluster.kill(cluster.pids[step % 2])
            cluster.start_agent(step % 2)
            works(one, two)

    def test_its_dead_workers_are_not_taken_up(self, cluster: ProcessCluster) -> None:
        one, two, three = cluster.worker(), cluster.worker(), cluster.worker()
        settled(cluster, one, two)
        cluster.kill(cluster.pids[1])
        cluster.kill(two.pid)
        cluster.start_agent(1)
        three.call(acts.connect, 1, cluster.paths[1])
        three.call(acts.join_pair, "p", "b", "a", 1, None, None)
        three.call(acts.register, "x", [(torch.zeros(6), "p")])
        one.call(acts.wait_ready, "x")
        works(one, three)

    def test_nobody_starts_it_again(self) -> None:
        with process_cluster(2) as cluster:
            one, two = cluster.worker(), cluster.worker()
            settled(cluster, one, two)
            cluster.kill(cluster.pids[0])
            with pytest.raises(AgentDiedError, match=r"died: start it again there, and this client goes on with it"):
                one.call(acts.transfer, "x", "send")
            with pytest.raises(PeerLostError, match="is gone"):
                two.call(acts.transfer, "x", "recv")
            cluster.start_agent(0)
            two.call(acts.wait_ready, "x")
            works(one, two)


def die_at_the_first(handler: str, arguments: list[str]) -> None:
    """An agent that takes the first command for this handler, and dies of it; the next one does not."""
    from etha_ray.tensor_bus import agent
    from etha_ray.tensor_bus.service import BusService

    died = Path(tempfile.gettempdir()) / f"{arguments[arguments.index('--namespace') + 1]}.died"
    handle = getattr(BusService, handler)

    def die(service: BusService, command: BaseCommand) -> None:
        if died.exists():
            handle(service, command)
        else:
            died.touch()
            os.kill(os.getpid(), signal.SIGKILL)

    setattr(BusService, handler, die)
    agent.main(arguments)


def test_a_batch_whose_agent_dies_as_it_closes_is_closed() -> None:
    with process_cluster(2, restarts=True, run=partial(die_at_the_first, "_on_cleanup")) as cluster:
        one, two = cluster.worker(), cluster.worker()
        settled(cluster, one, two)
        one.start(acts.close_batch, "x")
        cluster.wait(cluster.pids[0])
        cluster.start_agent(0)
        one.result()
        two.call(acts.close_batch, "x")
        one.start(acts.register, "x", [(torch.arange(6.0), "p")])
        two.call(acts.register, "x", [(torch.zeros(6), "p")])
        one.result()
        works(one, two)
        (Path(tempfile.gettempdir()) / f"{cluster.namespace}.died").unlink()


def _fail_after_a_ping(arguments: list[str]) -> None:
    """An agent whose loop fails once it has answered a ping; that of the next one does not."""
    from etha_ray.tensor_bus import agent
    from etha_ray.tensor_bus.service import BusService

    died = Path(tempfile.gettempdir()) / f"{arguments[arguments.index('--namespace') + 1]}.died"
    handle, expire = BusService.handle, BusService.expire
    pings: list[Ping] = []

    def look(service: BusService, message: Any) -> None:
        handle(service, message)
        pings.extend([message] if isinstance(message, Ping) else [])

    def fail(service: BusService, now: float) -> None:
        if pings and not died.exists():
            died.touch()
            raise RuntimeError("a fault of the agent's")
        expire(service, now)

    BusService.handle, BusService.expire = look, fail  # type: ignore[method-assign]
    agent.main(arguments)


def test_an_agent_whose_loop_fails_dies_and_the_next_one_goes_on() -> None:
    """It does not tell everybody in order that it is over."""
    with process_cluster(2, restarts=True, run=_fail_after_a_ping) as cluster:
        one, two = cluster.worker(), cluster.worker()
        settled(cluster, one, two)
        one.call(ping)
        cluster.wait(cluster.pids[0])
        cluster.start_agent(0)
        works(one, two)
    (Path(tempfile.gettempdir()) / f"{cluster.namespace}.died").unlink()


def leave(state: dict[str, Any]) -> None:
    state["client"].close()


def test_a_client_whose_agent_dies_as_it_leaves_leaves_its_place() -> None:
    """Its process lives, so the next agent would take it for one that is still there."""
    with process_cluster(2, restarts=True, run=partial(die_at_the_first, "_on_goodbye")) as cluster:
        one, two = cluster.worker(), cluster.worker()
        settled(cluster, one, two)
        one.start(leave)
        cluster.wait(cluster.pids[0])
        one.result()
        cluster.start_agent(0)
        two.call(leave)
        settled(cluster, one, two)
        works(one, two)
    (Path(tempfile.gettempdir()) / f"{cluster.namespace}.died").unlink()


def is_done(state: dict[str, Any]) -> bool:
    time.sleep(0.3)  # long enough for a transfer that should not be
    return bool(state["semaphore"].done())


class TestWorkers:
    @pytest.mark.parametrize("rank", [0, 1])
    def test_killed_and_replaced(self, cluster: ProcessCluster, rank: int) -> None:
        """By one on the same agent or another; the survivor does nothing but call again."""
        one, two, three = cluster.worker(), cluster.worker(), cluster.worker()
        settled(cluster, one, two)
        works(one, two)
        cluster.kill(two.pid)
        eventually(lambda: isinstance(_outcome(one), PeerLostError))
        three.call(acts.connect, rank, cluster.paths[rank])
        three.call(acts.join_pair, "p", "b", "a", 1, None, None)
        three.call(acts.register, "x", [(torch.zeros(6), "p")])
        assert three.call(held, "x") == (0, ())
        works(one, three)
        version, torn = three.call(held, "x")
        assert (version, torn) == one.call(held, "x")
        assert version > 1  # by how much: sends that failed have used numbers
        assert torn == ()

    def test_left_and_came_back(self, cluster: ProcessCluster) -> None:
        one, two, three = cluster.worker(), cluster.worker(), cluster.worker()
        settled(cluster, one, two)
        two.close()
        with pytest.raises(BatchClosedError, match=r"b\[0\] is gone \(its client was closed\): transfers go on once"):
            one.call(acts.transfer, "x", "send")
        three.call(acts.connect, 1, cluster.paths[1])
        three.call(acts.join_pair, "p", "b", "a", 1, None, None)
        three.call(acts.register, "x", [(torch.zeros(6), "p")])
        works(one, three)


def _outcome(worker: Worker) -> BaseException | None:
    """What a send without a receiver ends with, None if only its time was up."""
    try:
        worker.call(acts.transfer, "x", "send", 0.05)
    except PeerLostError as error:
        return error
    except TimeoutError:
        return None
    raise AssertionError("somebody received it")


def test_a_side_comes_back_with_another_number_of_ranks() -> None:
    """The other side plans anew by itself."""
    whole = torch.arange(24.0).reshape(8, 3)
    with local_cluster() as cluster:
        senders = cluster.side("a", "b", [0, 1], (2,), [Shard(0)])
        handlers: dict[int, Any] = {}

        def give(index: int) -> None:
            side = senders[index]
            if index not in handlers:
                side.join()
                handlers[index] = side.client.register_tensors("x", [(side.cut(whole), "pair")], timeout=LONG)
            handlers[index].wait_ready(LONG)
            handlers[index].transfer("send", blocking=True, timeout=LONG)

        def take(side: Side, part: torch.Tensor) -> None:
            side.join()
            handler = side.client.register_tensors("x", [(part, "pair")], timeout=LONG)
            assert handler.version == 0
            handler.transfer("recv", blocking=True, timeout=LONG)

        for ranks, dim in ((2, 0), (3, 1), (1, 0)):
            sides = cluster.side("b", "a", [index % 2 for index in range(ranks)], (ranks,), [Shard(dim)])
            parts = [side.cut(torch.zeros(8, 3)) for side in sides]
            takes = [lambda side=side, part=part: take(side, part) for side, part in zip(sides, parts, strict=True)]
            succeed(lambda: give(0), lambda: give(1), *takes)
            for side, part in zip(sides, parts, strict=True):
                assert torch.equal(part, side.cut(whole))
                side.client.close()


def send_again(state: dict[str, Any], batch_id: str) -> int:
    """Transfers, and nothing else, until one succeeds; how many did not."""
    for failed in itertools.count():
        try:
            state["handlers"][batch_id].transfer("send", blocking=True, timeout=LONG)
        except PeerLostError:
            time.sleep(0.05)
        else:
            return failed
    raise AssertionError("unreachable")


@pytest.mark.parametrize("ranks", [1, 3])
def test_killed_ranks_come_back_in_another_number(cluster: ProcessCluster, ranks: int) -> None:
    """The survivor only calls its next transfers."""
    sender, *receivers = (cluster.worker() for _ in range(3))
    whole = torch.arange(24.0).reshape(6, 4)

    def joined(worker: Worker, rank: int, name: str, other: str, size: int, index: int, part: torch.Tensor) -> None:
        worker.call(acts.connect, rank, cluster.paths[rank])
        worker.start(acts.join_pair, "p", name, other, size, MeshSpec((size,), (index,)), [Shard(0)])
        worker.result()
        worker.call(acts.register, "x", [(part, "p")])

    def all_join(sides: list[tuple[Any, ...]]) -> None:
        succeed(*[lambda side=side: joined(*side) for side in sides])  # type: ignore[misc]

    all_join(
        [(sender, 0, "a", "b", 1, 0, whole), *((each, 1, "b", "a", 2, index, torch.zeros(3, 4)) for index, each in enumerate(receivers))]
    )
    for worker in receivers:
        cluster.kill(worker.pid)
    others = [cluster.worker() for _ in range(ranks)]
    sender.start(send_again, "x")
    all_join([(each, 1, "b", "a", ranks, index, torch.zeros(6 // ranks, 4)) for index, each in enumerate(others)])
    for worker in others:
        worker.start(acts.transfer, "x", "recv")
    for worker in others:
        worker.result()
    assert sender.result() >= 0
    assert torch.equal(torch.cat([worker.call(acts.read, "x")[0] for worker in others]), whole)
