"""Agents as Ray actors: placed, found, described, restarted, ended."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
import torch

import etha_ray
from etha_ray.config import agent_paths
from etha_ray.errors import AgentBusyError, AgentDiedError, BatchTornError, ConfigError, PeerLostError, TransferCancelledError
from etha_ray.tensor_bus.inspection import inspect_agent
from etha_ray.testing import eventually, succeed, together
from tests.conftest import left_behind
from tests.tensor_bus.cluster import LONG, registered

pytestmark = pytest.mark.usefixtures("ray_cluster")


@ray.remote(num_cpus=0)
class Worker:
    """A worker of the pool in ``namespace``: one side of a pair of 1 x 1."""

    def __init__(self, namespace: str) -> None:
        os.environ["ETHA_RAY_NAMESPACE"] = namespace
        self.client, self.info = etha_ray.bootstrap_client()

    def rank(self) -> tuple[int, str]:
        return self.info.agent_rank, self.info.method

    def register(self, local: str, remote: str, values: list[float]) -> None:
        self.tensor = torch.tensor(values)
        self.client.init_pair("pair", local, remote, 1)
        self.handle = self.client.register_tensors("batch", [(self.tensor, "pair")])

    def transfer(self, kind: Any) -> int:
        return self.handle.transfer(kind, blocking=True).result().bytes

    def values(self) -> list[float]:
        return self.tensor.tolist()

    def close(self) -> None:
        self.client.close()


@pytest.fixture(scope="module")
def pool() -> Iterator[etha_ray.AgentPool]:
    """For tests that leave its agents as they found them."""
    with etha_ray.launch_agents(["cpu"] * 2, namespace=f"test-{os.getpid()}-shared") as pool:
        yield pool


def workers(namespace: str) -> tuple[Any, Any]:
    pair = Worker.remote(namespace), Worker.remote(namespace)
    ray.get([worker.rank.remote() for worker in pair])  # once both processes are there neither waits for the other's start
    ray.get([pair[0].register.remote("a", "b", [1.0, 2.0, 3.0]), pair[1].register.remote("b", "a", [0.0, 0.0, 0.0])])
    return pair


def joined(namespace: str) -> tuple[etha_ray.TensorBusClient, etha_ray.TensorBusClient]:
    """Clients of agents 0 and 1, in this process, joined in a pair "p" of 1 x 1."""
    paths = [agent_paths(rank, namespace) for rank in range(2)]
    one, two = (etha_ray.TensorBusClient(rank, path.command_queue, path.state) for rank, path in enumerate(paths))
    succeed(lambda: one.init_pair("p", "a", "b", 1, timeout=LONG), lambda: two.init_pair("p", "b", "a", 1, timeout=LONG))
    return one, two


def test_tensors_cross_between_actors(pool: etha_ray.AgentPool) -> None:
    sender, receiver = workers(pool.namespace)
    assert sorted(ray.get([sender.rank.remote(), receiver.rank.remote()])) == [(0, "ray"), (1, "ray")]
    assert ray.get([sender.transfer.remote("send"), receiver.transfer.remote("recv")]) == [12, 12]
    assert ray.get(receiver.values.remote()) == [1.0, 2.0, 3.0]
    counts = [(agent["workers"], agent["pairs"], agent["batches"]) for agent in pool.describe(LONG)]
    assert counts == [(1, 1, 1), (1, 1, 1)]
    ray.get([sender.close.remote(), receiver.close.remote()])


def test_health_is_answered_while_a_transfer_waits(pool: etha_ray.AgentPool) -> None:
    one, two = joined(pool.namespace)
    sender, receiver = registered(one, two, "p", torch.ones(3), torch.zeros(3))
    sending = sender.transfer("send")
    agent = ray.get_actor(f"{pool.namespace}/agent0", namespace="etha_ray")
    assert ray.get([agent.health.remote() for _ in range(20)], timeout=30) == [True] * 20
    assert not sending.done()  # type: ignore[attr-defined]
    receiver.transfer("recv", blocking=True, timeout=LONG)
    assert sending.result(LONG).bytes == 12  # type: ignore[attr-defined]
    for client in (one, two):
        client.close()


def test_pool_describes_its_agents(pool: etha_ray.AgentPool) -> None:
    assert pool.ranks == [0, 1]
    described = pool.describe(LONG)
    node = ray.get_runtime_context().get_node_id()
    for rank, agent in enumerate(described):
        paths = agent_paths(rank, pool.namespace)
        assert (agent["rank"], agent["device"], agent["state"], agent["node_id"]) == (rank, "cpu", "running", node)
        assert (agent["command_queue_path"], agent["state_path"]) == (paths.command_queue, paths.state)
        assert Path(f"/proc/{agent['pid']}").exists()
    assert described[0]["pid"] != described[1]["pid"]


def test_a_second_pool_of_the_same_name_is_refused(pool: etha_ray.AgentPool) -> None:
    with pytest.raises(AgentBusyError, match=pool.namespace):
        etha_ray.launch_agents(["cpu"], namespace=pool.namespace)
    assert [agent["state"] for agent in pool.describe(LONG)] == ["running", "running"]


def test_auto_gives_a_node_without_gpus_one_cpu_agent_beside_another_pools(pool: etha_ray.AgentPool, namespace: str) -> None:
    with etha_ray.launch_agents(namespace=namespace) as other:
        (agent,) = other.describe(LONG)
        assert (agent["rank"], agent["device"]) == (0, "cpu")
        assert agent["pid"] not in {agent["pid"] for agent in pool.describe(LONG)}


def test_agents_take_no_share_of_the_cluster(pool: etha_ray.AgentPool) -> None:
    eventually(lambda: ray.available_resources().get("CPU") == ray.cluster_resources()["CPU"])  # Ray counts what has ended a moment later


def test_shutdown_leaves_nothing(namespace: str) -> None:
    pool = etha_ray.launch_agents(["cpu"], namespace=namespace)
    paths = agent_paths(0, namespace)
    assert Path(paths.command_queue).exists()
    pids = [agent["pid"] for agent in pool.describe(LONG)]
    assert len(left_behind(namespace, pids)) >= 5
    pool.shutdown()
    pool.shutdown()
    assert left_behind(namespace, pids) == []
    assert [agent["state"] for agent in pool.describe(LONG)] == ["stopped"]


def test_shutdown_ends_whatever_waits(namespace: str) -> None:
    pool = etha_ray.launch_agents(["cpu"] * 2, namespace=namespace)
    pids = [agent["pid"] for agent in pool.describe(LONG)]
    one, two = joined(namespace)
    sent, _ = registered(one, two, "p", torch.ones(3), torch.zeros(3), "sent")
    _, received = registered(one, two, "p", torch.ones(3), torch.zeros(3), "received")
    publisher = etha_ray.publish({"w": torch.ones(3)}, "taken-by-nobody", client=one, world_size=1, rank=0)
    waits: list[Callable[[], Any]] = [
        lambda: one.init_pair("q", "a", "b", 1, timeout=LONG),
        lambda: one.register_tensors("y", [(torch.ones(3), "p")], timeout=LONG),
        lambda: sent.transfer("send", blocking=True, timeout=LONG),
        lambda: received.transfer("recv", blocking=True, timeout=LONG),
        lambda: publisher.push(timeout=LONG),
        lambda: etha_ray.pull({"w": torch.zeros(3)}, "given-by-nobody", client=two, world_size=1, rank=0, timeout=LONG),
    ]

    def shut_down() -> None:
        for rank, waiting in ((0, 3), (1, 1)):

            def wait(rank: int = rank, waiting: int = waiting) -> bool:
                seen = inspect_agent(rank, agent_paths(rank, namespace))
                if seen is None or seen.status is None:
                    return False
                batches = [batch for batch in seen.status.batches if batch.waits_for or batch.transfer]
                return len([pair for pair in seen.status.pairs if pair.waits_for]) + len(batches) == waiting

            eventually(wait)
        pool.shutdown()

    *ended, _ = together(*waits, shut_down)
    assert [isinstance(each, AgentDiedError | TransferCancelledError | PeerLostError) for each in ended] == [True] * len(waits), ended
    for each in (publisher, one, two):
        each.close()
    assert left_behind(namespace, pids) == []


def test_shutdown_amid_the_bytes(namespace: str) -> None:
    """Over TCP with next to no memory to stage in, so that it takes its time. Whoever waits gets an error, or has all of it."""
    pool = etha_ray.launch_agents(["cpu"] * 2, namespace=namespace, transport="tcp", memory_budget=1 << 17)
    pids = [agent["pid"] for agent in pool.describe(LONG)]
    one, two = joined(namespace)
    source, target = torch.ones(1 << 27), torch.zeros(1 << 27)
    handles = registered(one, two, "p", source, target)
    sent, received = handles[0].transfer("send"), handles[1].transfer("recv")

    def moves() -> bool:
        seen = inspect_agent(1, agent_paths(1, namespace))
        batches = () if seen is None or seen.status is None else seen.status.batches
        return any(batch.transfer is not None and batch.transfer.state == "moving" for batch in batches)

    eventually(moves)
    assert 0 < int(torch.count_nonzero(target)) < target.numel()
    pool.shutdown()
    for waits in (sent, received):
        with contextlib.suppress(AgentDiedError, TransferCancelledError, PeerLostError, BatchTornError):
            waits.result(LONG)
            assert torch.equal(source, target)
    one.close()
    two.close()
    assert left_behind(namespace, pids) == []


def test_what_is_asked_of_a_pool_reaches_its_agents(namespace: str) -> None:
    with etha_ray.launch_agents(["cpu"], namespace=namespace, transport="tcp", integrity="on", memory_budget=1 << 20):
        agent = ray.get_actor(f"{namespace}/agent0", namespace="etha_ray")
        assert ray.get(agent.__ray_call__.remote(_settings)) == ("tcp", "CheckedTransport", 1 << 20, True)


def _settings(actor: Any) -> tuple[Any, ...]:
    agent = actor._agent
    network = agent._network.transport
    return agent._service._batches._ways.choice, type(agent._mapped).__name__, network.memory_budget, network.checksums


def test_a_killed_agent_is_restarted_and_its_workers_go_on(namespace: str) -> None:
    """They do nothing but their next transfer. What the killed ones left is removed at shutdown."""
    with etha_ray.launch_agents(["cpu"] * 2, namespace=namespace) as pool:
        one, two = joined(namespace)
        source, target = torch.arange(5.0), torch.zeros(5)
        sender, receiver = registered(one, two, "p", source, target)
        old = pool.describe(LONG)[0]["pid"]
        os.kill(old, signal.SIGKILL)
        eventually(lambda: not Path(f"/proc/{old}/fd").exists())
        succeed(
            lambda: sender.transfer("send", blocking=True, timeout=2 * LONG),
            lambda: receiver.transfer("recv", blocking=True, timeout=2 * LONG),
        )
        assert torch.equal(source, target)
        one.close()
        two.close()
        first, second = (agent["pid"] for agent in pool.describe(LONG))
        assert first != old
        os.kill(second, signal.SIGKILL)
    assert left_behind(namespace, [old, first, second]) == []


@pytest.mark.parametrize(
    ("devices", "message"),
    [("all", "auto"), ([], "empty"), (["gpu"], "cuda:0"), (["cuda:0", "cuda:0"], "twice"), (["cpu", "cuda:x"], "cuda:x")],
)
def test_devices_that_make_no_sense_are_refused(devices: Any, message: str, namespace: str) -> None:
    with pytest.raises(ConfigError, match=message):
        etha_ray.launch_agents(devices, namespace=namespace)


def test_a_bad_namespace_is_refused() -> None:
    with pytest.raises(ConfigError, match="namespace"):
        etha_ray.launch_agents(["cpu"], namespace="../up")


def test_a_smaller_pool_removes_what_a_killed_one_left(namespace: str) -> None:
    script = f"""
        import os, signal, ray, etha_ray
        ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False, logging_level="error")
        pool = etha_ray.launch_agents(["cpu"] * 2, namespace="{namespace}")
        pids = [agent["pid"] for agent in pool.describe(60)]
        print(*pids, flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
    """
    ended = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], stdout=subprocess.PIPE, text=True, check=False, timeout=250)
    assert ended.returncode == -signal.SIGKILL
    eventually(lambda: not any(Path(f"/proc/{pid}").exists() for pid in ended.stdout.split()))  # Ray ends the agents of a killed driver
    folder = Path(agent_paths(0, namespace).state).parent
    assert list(folder.glob("agent_rank1_*"))
    with etha_ray.launch_agents(["cpu"], namespace=namespace):
        assert not list(folder.glob("agent_rank1_*"))
    assert left_behind(namespace, map(int, ended.stdout.split())) == []
