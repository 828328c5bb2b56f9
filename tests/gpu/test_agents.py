"""Agents and workers, all of them processes, on one GPU: what crosses, and what goes wrong."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

from etha_ray.errors import BatchClosedError, EthaRayError, PeerLostError, WrongDeviceError
from etha_ray.testing import succeed
from tests.gpu import workers
from tests.tensor_bus.cluster import LONG, LocalCluster, ProcessCluster, Worker, process_cluster
from tests.tensor_bus.gpu_cluster import GpuCluster


def gpu_agent(arguments: list[str]) -> None:
    """An agent on the first GPU."""
    from etha_ray.tensor_bus.agent import main

    main([*arguments, "--device", "cuda:0"])


@pytest.fixture(scope="module")
def agents() -> Iterator[ProcessCluster]:
    """Two agents of the first GPU."""
    with process_cluster(2, run=gpu_agent) as cluster:
        yield cluster


Pair = tuple[Worker, Worker]


def joined(agents: ProcessCluster, *, expandable: bool = False) -> Pair:
    """Two workers beside the agents, as the two sides of a pair."""
    pair = agents.worker(), agents.worker()
    for worker in pair:
        worker.start(workers.begin)
    for worker in pair:
        worker.result(120)
        if expandable:
            worker.call(workers.use_expandable)
    for rank, (worker, names) in enumerate(zip(pair, (("a", "b"), ("b", "a")), strict=True)):
        worker.start(workers.join, rank, agents.paths[rank], *names)
    for worker in pair:
        assert worker.result(120).startswith("GPU-")
    return pair


@pytest.fixture
def pair(agents: ProcessCluster) -> Iterator[Pair]:
    pair = joined(agents)
    yield pair
    for worker in pair:
        if worker.process.is_alive():
            worker.close()


def register(pair: Pair) -> None:
    for worker in pair:
        worker.start(workers.register)
    for worker in pair:
        worker.result(120)


def cross(pair: Pair, atomic: bool = False) -> None:
    pair[0].start(workers.transfer, "send")
    pair[1].call(workers.transfer, "recv", atomic)
    pair[0].result()


def test_a_tensor_crosses_and_is_cast(pair: Pair) -> None:
    pair[0].call(workers.make_random, 300, 500)
    pair[1].call(workers.make, 300, 500, 0.0, torch.bfloat16)
    register(pair)
    cross(pair)
    assert torch.equal(pair[1].call(workers.values), pair[0].call(workers.values).bfloat16())


@pytest.mark.parametrize("atomic", [False, True], ids=["in place", "atomic"])
def test_digests_agree(pair: Pair, atomic: bool) -> None:
    pair[0].call(workers.make_random, 300, 500)
    pair[1].call(workers.make, 300, 500)
    register(pair)
    cross(pair, atomic)
    assert torch.equal(pair[1].call(workers.values), pair[0].call(workers.values))
    assert pair[0].call(workers.digest) == pair[1].call(workers.digest)


def test_expandable_segments(agents: ProcessCluster) -> None:
    pair = joined(agents, expandable=True)
    try:
        pair[0].call(workers.make_random, 3000, 5000)
        pair[1].call(workers.make, 3000, 5000)
        register(pair)
        cross(pair)
        assert torch.equal(pair[1].call(workers.values), pair[0].call(workers.values))
        for worker in pair:
            worker.call(workers.close_batch)
    finally:
        for worker in pair:
            worker.close()


def test_from_a_gpu_to_the_cpu_and_back(pair: Pair) -> None:
    pair[0].call(workers.make_random, 300, 500)
    pair[1].call(workers.use_cpu, 300, 500)
    register(pair)
    cross(pair)
    assert torch.equal(pair[1].call(workers.values), pair[0].call(workers.values))
    cross((pair[1], pair[0]))
    assert torch.equal(pair[1].call(workers.values), pair[0].call(workers.values))


class TestPendingKernels:
    def test_what_is_sent_is_what_the_gpu_writes_before(self, pair: Pair) -> None:
        pair[0].call(workers.make, 1000, 1000, 1.0)
        pair[1].call(workers.make, 1000, 1000)
        register(pair)
        for value in (7.0, 8.0):
            pair[0].start(workers.late_send, value)
            pair[1].call(workers.transfer, "recv")
            pair[0].result()
            assert pair[1].call(workers.sum_of) == value * 1e6

    def test_a_target_is_read_before_it_is_written(self, pair: Pair) -> None:
        pair[0].call(workers.make, 1000, 1000, 1.0)
        pair[1].call(workers.make, 1000, 1000, 3.0)
        register(pair)
        pair[0].start(workers.transfer, "send")
        assert pair[1].call(workers.receive_after_reading) == 3e6
        pair[0].result()
        assert pair[1].call(workers.sum_of) == 1e6


def test_a_worker_is_killed(agents: ProcessCluster, pair: Pair) -> None:
    pair[0].call(workers.make, 100, 100, 1.0)
    pair[1].call(workers.make, 100, 100)
    register(pair)
    cross(pair)
    os.kill(pair[0].pid, 9)
    pair[0].process.join()
    with pytest.raises((PeerLostError, BatchClosedError, TimeoutError)):
        pair[1].call(workers.transfer, "recv")
    assert pair[1].call(workers.sum_of) == 10_000
    pair[1].close()
    again = joined(agents)  # the agents go on
    try:
        again[0].call(workers.make, 100, 100, 2.0)
        again[1].call(workers.make, 100, 100)
        register(again)
        cross(again)
        assert again[1].call(workers.sum_of) == 20_000
    finally:
        for worker in again:
            worker.close()


def test_a_gpu_tensor_on_a_cpu_agent() -> None:
    with LocalCluster(2) as cluster:
        one, _ = cluster.pair()
        with pytest.raises(WrongDeviceError, match="is a cuda:0 tensor on a CPU agent; move it"):
            one.register_tensors("x", [(torch.ones(3, device="cuda:0"), "pair")])


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_another_gpu_than_the_agents(agents: ProcessCluster, pair: Pair) -> None:
    pair[0].call(workers.make, 3, 3, 1.0, torch.float32, 1)
    with pytest.raises(EthaRayError, match="is a cuda:1 tensor"):
        pair[0].call(workers.register)


def test_clients_and_agents_of_one_process() -> None:
    with GpuCluster([0]) as cluster:
        one, two = cluster.pair(ranks=(0, 0))
        source, target = torch.randn(300, 500, device="cuda:0"), torch.zeros(300, 500, device="cuda:0")
        first, second = succeed(
            lambda: one.register_tensors("batch", [(source, "pair")], timeout=LONG),
            lambda: two.register_tensors("batch", [(target, "pair")], timeout=LONG),
        )
        for _ in range(2):
            torch.cuda._sleep(workers.LONG_TIME)
            source.add_(1)
            sending = first.transfer("send")
            second.transfer("recv", blocking=True, timeout=LONG)
            sending.result(LONG)
            assert torch.equal(source, target)
