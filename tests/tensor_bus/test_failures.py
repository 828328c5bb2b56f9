"""What happens when agents and workers are killed, stopped or restarted: typed errors in seconds, and nothing left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch.distributed.tensor import Replicate

from etha_ray.config import AgentPaths
from etha_ray.errors import AgentBusyError, AgentDiedError, PeerLostError, StoreUnavailableError
from etha_ray.kvstore import MemoryStore
from etha_ray.kvstore.lease import Grant
from etha_ray.layout import MeshSpec
from etha_ray.tensor_bus import reply
from etha_ray.tensor_bus.agent import TensorBusAgent
from etha_ray.tensor_bus.command_queue import CommandQueue
from etha_ray.tensor_bus.commands import Ping
from etha_ray.tensor_bus.inspection import inspect_agent
from etha_ray.tensor_bus.snapshot import AgentStatus
from etha_ray.testing import eventually, together
from tests.tensor_bus import cluster as acts
from tests.tensor_bus.cluster import LONG, ProcessCluster, Worker, free_port, left_in_shm, local_cluster, process_cluster


@pytest.fixture
def cluster() -> Iterator[ProcessCluster]:
    with process_cluster(2) as made:
        yield made


def settled(cluster: ProcessCluster, one: Worker, two: Worker, batch_id: str = "x", ranks: tuple[int, int] = (0, 1)) -> None:
    """Worker ``one`` as "a" on the first agent and ``two`` as "b" on the second, with a batch."""
    for worker, rank in zip((one, two), ranks, strict=True):
        worker.call(acts.connect, rank, cluster.paths[rank])
    joined(one, two)
    registered(one, two, batch_id)


def joined(one: Worker, two: Worker) -> None:
    for worker, name, other in ((one, "a", "b"), (two, "b", "a")):
        worker.start(acts.join_pair, "p", name, other, 1, None, None)
    for worker in (one, two):
        worker.result()


def registered(one: Worker, two: Worker, batch_id: str = "x") -> None:
    for worker, tensor in ((one, torch.arange(6.0)), (two, torch.zeros(6))):
        worker.start(acts.register, batch_id, [(tensor, "p")])
    for worker in (one, two):
        worker.result()


def works(one: Worker, two: Worker, batch_id: str = "x") -> None:
    one.call(acts.fill, batch_id, 1)
    for worker, what in ((one, "send"), (two, "recv")):
        worker.start(acts.transfer, batch_id, what)
    for worker in (one, two):
        worker.result()
    assert torch.equal(one.call(acts.read, batch_id)[0], two.call(acts.read, batch_id)[0])


def wait_started(state: dict[str, Any]) -> Any:
    return state["semaphore"].result(LONG)


class TestAgents:
    def test_killed_while_a_command_waits(self, cluster: ProcessCluster) -> None:
        one, two = cluster.worker(), cluster.worker()
        settled(cluster, one, two)
        one.call(acts.start_transfer, "x", "send")
        one.start(wait_started)
        two.start(acts.join_pair, "q", "c", "d", 1, None, None)
        cluster.kill(cluster.pids[0])
        with pytest.raises(AgentDiedError, match=r"agent 0 \(pid \d+\) died"):
            one.result(LONG / 2)
        # The peer's agent notices too, and a batch that was only registered is lost as well.
        cluster.kill(cluster.pids[1])
        with pytest.raises(AgentDiedError):
            two.result(LONG / 2)
        for worker, rank in ((one, 0), (two, 1)):
            with pytest.raises(ConnectionError):
                worker.call(acts.transfer, "x", "send")
            worker.call(acts.close_batch, "x")
            cluster.start_agent(rank)
        settled(cluster, one, two)
        works(one, two)

    @pytest.mark.parametrize("direction", ["send", "recv"])
    def test_peers_agent_killed_during_a_transfer(self, cluster: ProcessCluster, direction: str) -> None:
        one, two = cluster.worker(), cluster.worker()
        settled(cluster, one, two)
        one.start(acts.transfer, "x", direction)
        cluster.kill(cluster.pids[1])
        with pytest.raises(PeerLostError, match=r"b\[0\] is gone .*agent 1 \(pid \d+\) died"):
            one.result(LONG / 2)
        with pytest.raises(PeerLostError, match="transfers go on once that side has registered it again"):
            one.call(acts.transfer, "x", direction)
        cluster.start_agent(1)
        one.call(acts.wait_ready, "x")
        works(one, two)

    def test_stopped(self, cluster: ProcessCluster) -> None:
        """One that hangs is found by its heart, not by its process."""
        one, two = cluster.worker(), cluster.worker()
        settled(cluster, one, two)
        two.start(acts.transfer, "x", "recv")
        cluster.pause(cluster.pids[0])
        one.start(acts.transfer, "x", "send")
        with pytest.raises(AgentDiedError, match=r"agent 0 .*has not answered for \d"):
            one.result(LONG)
        with pytest.raises(PeerLostError, match="has not answered"):
            two.result(LONG)
        os.kill(cluster.pids[0], signal.SIGCONT)
        for worker in (one, two):  # it hears that the others took it for lost, and all meet again
            worker.call(acts.wait_ready, "x")
        works(one, two)

    def test_polling_notices_too(self, cluster: ProcessCluster) -> None:
        one, two = cluster.worker(), cluster.worker()
        settled(cluster, one, two)
        one.call(acts.start_transfer, "x", "send")
        one.start(poll)
        cluster.kill(cluster.pids[0])
        with pytest.raises(AgentDiedError):
            one.result(LONG / 2)

    def test_shut_down(self, cluster: ProcessCluster) -> None:
        one, two = cluster.worker(), cluster.worker()
        settled(cluster, one, two)
        one.start(acts.transfer, "x", "send")
        two.start(acts.join_pair, "q", "c", "d", 1, None, None)
        eventually(lambda: any(batch.transfer is not None for batch in status(cluster, 0).batches))
        eventually(lambda: any(pair.name == "q" for pair in status(cluster, 1).pairs))
        os.kill(cluster.pids[0], signal.SIGTERM)
        with pytest.raises(Exception, match=r"agent 0.*shut down"):
            one.result(LONG / 2)
        cluster.wait(cluster.pids[0])
        with pytest.raises(AgentDiedError, match="was shut down"):  # and did not die, though it is gone by now
            one.call(ping)
        assert not os.path.exists(cluster.paths[0].state)
        assert not os.path.exists(cluster.paths[0].command_queue)
        assert left_in_shm({cluster.pids[0]}, [cluster.paths[0]]) == []
        os.kill(cluster.pids[1], signal.SIGTERM)
        with pytest.raises(Exception, match=r"agent 1.*shut down"):
            two.result(LONG / 2)

    def test_not_started_again(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Who has not been heard yet waits for the next agent, and says so when none comes."""
        monkeypatch.setattr(reply, "SUCCESSION_TIMEOUT", 0.2)
        with process_cluster(1, restarts=True) as cluster:
            client = cluster.client(0)
            cluster.pause(cluster.pids[0])
            with ThreadPoolExecutor(1) as pool:
                waits = pool.submit(client.ping, LONG)
                eventually(lambda: client._connection.queue.size() > 0)
                cluster.kill(cluster.pids[0])
                with pytest.raises(AgentDiedError, match=r"agent 0 \(pid \d+\) died, and was not started again within \d+ s: see what"):
                    waits.result(LONG)
            client.close()

    def test_all_killed(self, cluster: ProcessCluster) -> None:
        """The fixture's end finds nothing left of anyone, once agents of the same paths have come and gone."""
        one, two = cluster.worker(), cluster.worker()
        settled(cluster, one, two)
        one.call(acts.start_transfer, "x", "send")
        for pid in (one.pid, *cluster.pids, two.pid):
            cluster.kill(pid)
        assert left_in_shm(cluster.every_pid, cluster.paths)
        for rank in range(2):
            cluster.start_agent(rank)
        three, four = cluster.worker(), cluster.worker()
        settled(cluster, three, four)
        works(three, four)


def status(cluster: ProcessCluster, rank: int) -> AgentStatus:
    """What an agent serves, as it has last written it down."""
    seen = inspect_agent(rank, cluster.paths[rank])
    assert seen is not None
    assert seen.status is not None
    return seen.status


def poll(state: dict[str, Any]) -> None:
    while not state["semaphore"].done():
        time.sleep(0.001)


def ping(state: dict[str, Any]) -> None:
    state["client"].ping(LONG)


class TestWorkers:
    @pytest.mark.parametrize("direction", ["send", "recv"])
    def test_killed_while_its_peer_waits(self, cluster: ProcessCluster, direction: str) -> None:
        one, two, three = cluster.worker(), cluster.worker(), cluster.worker()
        settled(cluster, one, two)
        one.start(acts.transfer, "x", direction)
        cluster.kill(two.pid)
        with pytest.raises(PeerLostError, match=rf"b\[0\] is gone \(worker pid {two.pid} died\)"):
            one.result(LONG / 2)
        # Its names are free for another, on another agent even, while the survivor keeps its client.
        one.call(acts.close_batch, "x")
        three.call(acts.connect, 0, cluster.paths[0])
        joined(one, three)
        registered(one, three)
        works(one, three)
        eventually(lambda: left_in_shm({two.pid}, []) == [])  # its agent removes that last, after its place is free

    def test_who_else_is_killed_is_named_too(self, cluster: ProcessCluster) -> None:
        """The call under way ends with the first that is seen; from then on each is named."""
        one, *others = (cluster.worker() for _ in range(3))
        for worker, rank in ((one, 0), *((other, 1) for other in others)):
            worker.call(acts.connect, rank, cluster.paths[rank])
        for index, other in enumerate(others):
            other.start(acts.join_pair, "many", "b", "a", 2, MeshSpec((2,), (index,)), [Replicate()])
        one.call(acts.join_pair, "many", "a", "b", 1, MeshSpec((1,), (0,)), [Replicate()])
        for worker in others:
            worker.result()
            worker.start(acts.register, "x", [(torch.zeros(6), "many")])
        one.call(acts.register, "x", [(torch.zeros(6), "many")])
        for worker in others:
            worker.result()
        one.start(acts.transfer, "x", "send")
        for agent in reversed(cluster.pids):  # for one to see both deaths at once, and the other to hear of both at once
            cluster.pause(agent)
        for worker in others:
            cluster.kill(worker.pid)
        queue = CommandQueue(cluster.paths[0].command_queue)
        before = queue.size()
        os.kill(cluster.pids[1], signal.SIGCONT)
        eventually(lambda: queue.size() >= before + len(others))
        queue.close(destroy=False)
        os.kill(cluster.pids[0], signal.SIGCONT)
        with pytest.raises(PeerLostError, match=r"b\[[01]\] is gone \(worker pid \d+ died\)"):
            one.result()

        def named() -> bool:
            with pytest.raises(PeerLostError) as caught:
                one.call(acts.transfer, "x", "send")
            gone = {index for index, other in enumerate(others) if f"b[{index}]" in str(caught.value)}
            return gone == {0, 1}

        eventually(named)

    def test_replaced_while_the_survivor_registers(self, cluster: ProcessCluster) -> None:
        """The survivor does not even call init_pair again."""
        one, two, three = cluster.worker(), cluster.worker(), cluster.worker()
        settled(cluster, one, two)
        one.start(acts.register, "y", [(torch.arange(6.0), "p")])
        cluster.kill(two.pid)
        three.call(acts.connect, 1, cluster.paths[1])
        three.start(acts.join_pair, "p", "b", "a", 1, None, None)
        three.result()
        three.call(acts.register, "y", [(torch.zeros(6), "p")])
        one.result()
        works(one, three, "y")

    def test_killed_while_it_is_a_bystander(self, cluster: ProcessCluster) -> None:
        one, two, three = cluster.worker(), cluster.worker(), cluster.worker()
        settled(cluster, one, two)
        three.call(acts.connect, 0, cluster.paths[0])
        three.call(ping)
        cluster.kill(three.pid)
        works(one, two)

    def test_killed_while_torch_shares_its_memory(self, cluster: ProcessCluster) -> None:
        """Other storages of it are there, and its agent remains: both must not be what tidies up."""
        one, two = cluster.worker(), cluster.worker()
        settled(cluster, one, two)
        two.start(acts.die_sharing)
        eventually(lambda: not two.process.is_alive())
        assert two.process.exitcode == -signal.SIGXFSZ
        eventually(lambda: left_in_shm({two.pid}, []) == [])
        with pytest.raises(PeerLostError, match=r"b\[0\] is gone"):
            one.call(acts.transfer, "x", "send")


class TestTakingOver:
    def test_a_live_agents_place_is_taken(self) -> None:
        with local_cluster() as cluster:
            with pytest.raises(AgentBusyError, match=r"agent 0 \(pid \d+\) already serves .*namespace of its own"):
                cluster.start_agent(0)
            cluster.client(0).ping(LONG)

    def test_another_process_is_refused_too(self, cluster: ProcessCluster) -> None:
        cluster.client(0).close()  # it serves by now
        with pytest.raises(AgentBusyError, match="already serves"):
            TensorBusAgent(0, MemoryStore(), paths=cluster.paths[0])

    def test_many_agents_race_for_a_place(self, tmp_path: Any) -> None:
        store, paths = MemoryStore(str(tmp_path)), AgentPaths(f"{tmp_path}/c.lmdb", f"{tmp_path}/s.lmdb")
        for _ in range(5):
            made = together(*[lambda: TensorBusAgent(0, store, paths=paths, threads=1) for _ in range(4)])
            agents = [agent for agent in made if isinstance(agent, TensorBusAgent)]
            assert sorted(type(agent).__name__ for agent in made) == ["AgentBusyError"] * 3 + ["TensorBusAgent"]
            agents[0].start()
            agents[0].stop()
            assert os.listdir(tmp_path) == []

    def test_the_next_agent_answers_what_the_last_one_left(self) -> None:
        with local_cluster(1) as cluster:
            client = cluster.client()
            queue = client.command_queue
            cluster.agents[0]._stopping.set()
            queue.wake()
            assert cluster.agents[0]._stopped.wait(LONG)
            with pytest.raises(AgentDiedError):
                client.ping()
            cluster.agents[0] = cluster.start_agent(0)
            with pytest.raises(AgentDiedError):
                client.ping()
            stranger = cluster.client()
            stranger._connection.client_id = "somebody else"
            with pytest.raises(AgentDiedError, match="restarted and does not know this client"):
                stranger.init_pair("p", "a", "b", 1)
            del stranger.client_id
            cluster.clients.remove(stranger)
            stranger.client_id = "gone"
            stranger.close()

    def test_agent_that_cannot_reach_its_store_leaves_nothing(self, tmp_path: Any) -> None:
        paths = AgentPaths(f"{tmp_path}/c.lmdb", f"{tmp_path}/s.lmdb")
        with pytest.raises(StoreUnavailableError):
            TensorBusAgent(0, _BrokenStore("n"), paths=paths)
        assert os.listdir(tmp_path) == []
        assert [name for name in left_in_shm({os.getpid()}, [paths]) if not name.startswith("sem.command")] == []


class _BrokenStore(MemoryStore):
    def _grant(self, ttl: float) -> Grant:
        raise StoreUnavailableError("it is down")


class TestStore:
    def test_dead_store(self) -> None:
        with process_cluster(2) as cluster:
            one, two = cluster.worker(), cluster.worker()
            settled(cluster, one, two)
            cluster.master.close()
            works(one, two)  # a transfer needs no store

    def test_broken_store_becomes_an_outcome(self, monkeypatch: pytest.MonkeyPatch) -> None:
        with local_cluster() as cluster:
            first, second, source, target = cluster.batch()

            def broken(*_: object) -> Any:
                raise StoreUnavailableError("it is down")

            monkeypatch.setattr(cluster.store, "_list", broken)
            with pytest.raises(StoreUnavailableError, match="it is down"):
                first.client.init_pair("q", "a", "b", 1)
            with pytest.raises(StoreUnavailableError, match="it is down"):
                first.client.register_tensors("y", [(torch.ones(2), "pair of batch")])
            first.transfer("send")
            second.transfer("recv").result(LONG)
            assert torch.equal(source, target)
            monkeypatch.undo()

    def test_an_agent_that_is_surprised_says_so(self, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
        with local_cluster(1) as cluster:
            client = cluster.client()

            def surprised(command: object) -> None:
                raise ZeroDivisionError("what is this")

            monkeypatch.setitem(cluster.agents[0]._service._handlers, Ping, surprised)
            with pytest.raises(RuntimeError, match=r"ZeroDivisionError: what is this\s+in the agent:\s+Traceback"):
                client.ping()
            monkeypatch.undo()
            client.ping()
            assert "agent failed on Ping" in caplog.text


def test_the_command_line() -> None:
    """Without a store it says so and ends, and where none is named, too; its help needs none."""
    without = [sys.executable, "-m", "etha_ray.tensor_bus.agent", "--store", f"etcd://127.0.0.1:{free_port()}", "--rank", "1"]
    environment = {name: value for name, value in os.environ.items() if name != "ETHA_RAY_STORE"}
    all_three = [without, [*without[:3], "--help"], [*without[:3], "--rank", "1"]]
    failed, done, nowhere = [
        subprocess.Popen(each, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment) for each in all_three
    ]
    (_, said), (helped, _), (_, asked) = [each.communicate(timeout=2 * LONG) for each in (failed, done, nowhere)]
    assert asked.splitlines()[-1].endswith("give --store, or ETHA_RAY_STORE in the environment, which hides a password in it")
    assert (failed.returncode, done.returncode) == (1, 0)
    assert "agent 1 cannot start: " in said
    assert "Traceback" not in said
    assert "--store" in helped
