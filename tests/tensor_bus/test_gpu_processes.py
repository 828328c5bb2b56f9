"""Agents and workers, all of them processes, whose GPUs are of the host's memory (`tests/cuda/fake.py`)."""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest

from etha_ray.errors import BatchClosedError, PeerLostError
from etha_ray.tensor_bus import own_batches, pinned
from etha_ray.transport.mapped import MappedTransport
from tests.cuda.fake import install, library, uuid
from tests.tensor_bus.cluster import LONG, ProcessCluster, Worker, connect, process_cluster


def gpu_agent(path: str, arguments: list[str]) -> None:
    """An agent on the GPU of its rank, which sees that one alone."""
    from etha_ray.tensor_bus.agent import main

    rank = arguments[arguments.index("--rank") + 1]
    install(rank, path)
    pinned.Pinned.transport = lambda self, threads: MappedTransport(threads)  # type: ignore[method-assign]
    main([*arguments, "--device", f"cuda:{rank}"])


@pytest.fixture(scope="module")
def agents() -> Iterator[ProcessCluster]:
    with process_cluster(2, restarts=True, run=partial(gpu_agent, library())) as cluster:
        yield cluster


class NoMark:
    """What is launched on these GPUs is done at once."""

    def __init__(self, ordinal: int) -> None:
        pass

    def set(self) -> bytes:
        return b""


def begin(state: dict[str, Any], path: str, devices: str, rank: int, paths: Any, pair: str) -> str:
    state["gpus"] = install(devices, path)
    own_batches.Mark = NoMark  # type: ignore[misc, assignment]
    own_batches.settle = lambda ordinal: None
    connect(state, rank, paths)
    state["client"].init_pair(pair, *("ab" if rank == 0 else "ba"), 1, timeout=LONG)
    return str(state["client"].gpu)


def register(state: dict[str, Any], pair: str, ordinal: int, value: float, growing: bool) -> None:
    gpus = state["gpus"]
    at = gpus.expandable(4, ordinal) + 1000 if growing else gpus.allocate(40_000, ordinal)
    state["tensor"] = gpus.tensor(at, (10_000,)).fill_(value)
    state["handler"] = state["client"].register_tensors(pair, [(state["tensor"], pair)], timeout=LONG)


def transfer(state: dict[str, Any], direction: str) -> None:
    state["handler"].transfer(direction, blocking=True, timeout=LONG)


def fill(state: dict[str, Any], value: float) -> None:
    state["tensor"].fill_(value)


def total(state: dict[str, Any]) -> float:
    return float(state["tensor"].sum())


def cross(first: Worker, second: Worker) -> None:
    first.start(transfer, "send")
    second.call(transfer, "recv")
    first.result()


def pair_of(agents: ProcessCluster, pair: str, growing: bool) -> tuple[Worker, Worker]:
    """Of GPU 0, which the first worker calls cuda:1, and of GPU 1, which the second sees alone."""
    first, second = agents.worker(), agents.worker()
    first.start(begin, library(), "1,0", 0, agents.paths[0], pair)
    second.start(begin, library(), "1", 1, agents.paths[1], pair)
    assert [first.result(), second.result()] == [uuid(0), uuid(1)]
    first.start(register, pair, 1, 3.0, growing)
    second.call(register, pair, 0, 0.0, growing)
    first.result()
    return first, second


@pytest.mark.parametrize("growing", [False, True], ids=["cudaMalloc", "expandable"])
class TestProcesses:
    def test_workers_that_see_their_gpu_under_another_number(self, agents: ProcessCluster, growing: bool) -> None:
        first, second = pair_of(agents, f"cross {growing}", growing)
        cross(first, second)
        assert second.call(total) == 30_000
        first.call(fill, 4.0)
        cross(first, second)
        assert second.call(total) == 40_000

    def test_a_worker_is_killed(self, agents: ProcessCluster, growing: bool) -> None:
        first, second = pair_of(agents, f"killed {growing}", growing)
        os.kill(first.pid, 9)
        with pytest.raises((PeerLostError, BatchClosedError)):
            second.call(transfer, "recv")
        assert second.call(total) == 0

    def test_an_agent_is_killed_and_the_next_one_opens_the_memory_again(self, agents: ProcessCluster, growing: bool) -> None:
        first, second = pair_of(agents, f"succeeded {growing}", growing)
        cross(first, second)
        first.call(fill, 5.0)
        for rank in range(2):
            agents.kill(agents.pids[rank])
            agents.start_agent(rank)
            cross(first, second)
            assert second.call(total) == 50_000
