"""Agents on GPUs, and workers with tensors there. The GPUs are of the host's memory (`tests/cuda/fake.py`), all else is real."""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import etha_ray
from etha_ray.cuda import driver, marks
from etha_ray.cuda.marks import MarksOfOthers
from etha_ray.errors import BatchClosedError, ConfigError, PeerLostError, TransferError, TransferTimeoutError, WrongDeviceError
from etha_ray.tensor_bus import own_batches
from etha_ray.tensor_bus.agent import TensorBusAgent
from etha_ray.testing import eventually, succeed
from etha_ray.transport.mapped import MappedTransport
from tests.cuda.fake import FakeGpus, install, library, uuid
from tests.tensor_bus.cluster import LONG, LocalCluster, Worker, registered
from tests.tensor_bus.gpu_cluster import GpuCluster
from tests.tensor_bus.test_gpu_processes import begin, cross, register, transfer


class FakeMark:
    """Passed when the test says so."""

    made: list[FakeMark] = []  # noqa: RUF012

    def __init__(self, ordinal: int) -> None:
        self.ordinal, self.done, self.set_times = ordinal, True, 0
        self.error: Exception | None = None
        self.made.append(self)
        self._handle = len(self.made).to_bytes(8, "little")

    def set(self) -> bytes:
        self.set_times += 1
        marks._own[self._handle] = self  # type: ignore[assignment]
        return self._handle

    def passed(self) -> bool:
        if self.error is not None:
            raise self.error
        return self.done


def mark_on(ordinal: int) -> FakeMark:
    (found,) = (mark for mark in FakeMark.made if mark.ordinal == ordinal)
    return found


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> FakeGpus:
    monkeypatch.setenv("FAKE_CUDA_DEVICES", "")
    monkeypatch.setattr(driver, "_driver", None)
    monkeypatch.setattr(own_batches, "Mark", FakeMark)
    monkeypatch.setattr(own_batches, "settle", lambda ordinal: None)
    monkeypatch.setattr(FakeMark, "made", [])
    monkeypatch.setattr(marks, "_own", weakref.WeakValueDictionary())
    return install("0,1", patch=monkeypatch.setattr)


@pytest.fixture
def cluster(gpus: FakeGpus) -> Iterator[GpuCluster]:
    with GpuCluster(2, mapped=MappedTransport(1)) as cluster:
        yield cluster
    assert gpus.held == 0


def transferred(first: Any, second: Any, **more: Any) -> None:
    succeed(
        lambda: first.transfer("send", blocking=True, timeout=LONG),
        lambda: second.transfer("recv", blocking=True, timeout=LONG, **more),
    )


def test_a_tensor_crosses_from_gpu_to_gpu(gpus: FakeGpus, cluster: GpuCluster) -> None:
    source, target = gpus.empty(30, 40).copy_(torch.randn(30, 40)), gpus.empty(30, 40, dtype=torch.bfloat16, ordinal=1).zero_()
    first, second, _, _ = cluster.batch(source, target)
    transferred(first, second)
    assert torch.equal(target, source.bfloat16())
    assert first.client.gpu == uuid(0)
    assert cluster.agents[1].describe()["gpu"] == uuid(1)


def test_atomically_and_with_digests(gpus: FakeGpus, cluster: GpuCluster) -> None:
    source, target = gpus.empty(300).copy_(torch.randn(300)), gpus.empty(300, ordinal=1).zero_()
    first, second, _, _ = cluster.batch(source, target)
    transferred(first, second, atomic=True)
    assert torch.equal(target, source)
    assert first.digest() == second.digest()


def test_a_cpu_tensor_beside_a_gpu_agent(gpus: FakeGpus, cluster: GpuCluster) -> None:
    first, second, source, target = cluster.batch()
    transferred(first, second)
    assert torch.equal(source, target)
    assert FakeMark.made == []


def test_a_model_is_pushed_when_the_callers_gpu_has_made_it(gpus: FakeGpus, cluster: GpuCluster, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other threads send, whose streams know nothing of the caller's."""
    settled: list[tuple[int, str]] = []
    monkeypatch.setattr("etha_ray.weights.member.settle", lambda ordinal: settled.append((ordinal, threading.current_thread().name)))
    source, target = gpus.empty(300).copy_(torch.randn(300)), gpus.empty(300, ordinal=1).zero_()
    with (
        etha_ray.publish({"w": source}, "policy", client=cluster.client(0)) as sender,
        etha_ray.pull({"w": target}, "policy", client=cluster.client(1), timeout=LONG) as receiver,
    ):
        pushed = sender.start_push(timeout=LONG)
        assert settled[0] == (0, threading.current_thread().name)
        receiver.update(LONG)
        pushed.result(LONG)
    assert torch.equal(source, target)


class TestWrongDevice:
    def test_another_gpu_than_the_agents(self, gpus: FakeGpus, cluster: GpuCluster) -> None:
        one, _ = cluster.pair()
        with pytest.raises(
            WrongDeviceError, match=rf"tensor 0 of batch 'x' is a cuda:1 tensor \({uuid(1)}\).*agent is on cuda:0 .*{uuid(0)}"
        ):
            one.register_tensors("x", [(gpus.empty(3, ordinal=1), "pair")])

    def test_a_cpu_agent(self, gpus: FakeGpus) -> None:
        with LocalCluster(2) as cluster:
            one, _ = cluster.pair()
            with pytest.raises(WrongDeviceError, match="is a cuda:0 tensor on a CPU agent; move it"):
                one.register_tensors("x", [(gpus.empty(3), "pair")])

    def test_an_agent_whose_torch_has_no_cuda(self, gpus: FakeGpus, monkeypatch: pytest.MonkeyPatch) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(torch.version, "cuda", None)
            cluster = GpuCluster(2, mapped=MappedTransport(1))
        with cluster:
            first, second, source, target = cluster.batch()
            transferred(first, second)  # what is on the CPU crosses all the same
            assert torch.equal(source, target)
            one, _ = cluster.pair()
            with pytest.raises(
                WrongDeviceError, match=r"is a cuda:0 tensor, and the agent of cuda:0 cannot use CUDA: torch .* has no CUDA"
            ):
                one.register_tensors("x", [(gpus.empty(3), "pair")])

    @pytest.mark.parametrize("device", ["gpu", "cuda", "cuda:x", ""])
    def test_what_is_no_device(self, cluster: GpuCluster, device: str) -> None:
        with pytest.raises(ConfigError, match=rf"device '{device}' is not understood"):
            TensorBusAgent(7, cluster.store, device=device)


class TestPendingWork:
    """What a worker launched before it asked for a transfer is done first, and nobody stands still for it."""

    def test_a_send_is_announced_when_it_is_done(self, gpus: FakeGpus, cluster: GpuCluster) -> None:
        first, second, source, target = cluster.batch(gpus.empty(9).fill_(1), gpus.empty(9, ordinal=1).zero_())
        sends = mark_on(0)
        sends.done = False
        sending, receiving = first.transfer("send"), second.transfer("recv")
        with pytest.raises(TimeoutError):
            receiving.result(0.3)
        first.client.ping()
        source.fill_(2)
        sends.done = True
        sending.result(LONG)
        receiving.result(LONG)
        assert target.eq(2).all()

    def test_a_target_is_not_written_before(self, gpus: FakeGpus, cluster: GpuCluster) -> None:
        first, second, _, target = cluster.batch(gpus.empty(9).fill_(1), gpus.empty(9, ordinal=1).zero_())
        receives = mark_on(1)
        receives.done = False
        sending, receiving = first.transfer("send"), second.transfer("recv")
        with pytest.raises(TimeoutError):
            sending.result(0.3)
        assert target.eq(0).all()
        receives.done = True
        receiving.result(LONG)
        assert target.eq(1).all()

    def test_it_may_take_too_long(self, gpus: FakeGpus, cluster: GpuCluster) -> None:
        first, second, source, target = cluster.batch(gpus.empty(9).fill_(1), gpus.empty(9, ordinal=1).zero_())
        mark_on(0).done = False
        with pytest.raises(TransferTimeoutError, match="its worker's GPU has not done what was launched before it"):
            first.transfer("send", blocking=True, timeout=0.2)
        mark_on(0).done = True
        transferred(first, second)
        assert torch.equal(source, target)
        assert mark_on(0).set_times == 2

    def test_the_gpu_fails(self, gpus: FakeGpus, cluster: GpuCluster) -> None:
        first, second, source, target = cluster.batch(gpus.empty(9).fill_(1), gpus.empty(9, ordinal=1).zero_())
        mark_on(0).error = RuntimeError("CUDA error: an illegal memory access was encountered")
        with pytest.raises(TransferError, match=r"the worker's GPU .* illegal memory access"):
            first.transfer("send", blocking=True, timeout=LONG)
        mark_on(0).error = None
        transferred(first, second)
        assert torch.equal(source, target)

    def test_it_is_forgotten_with_the_batch(self, gpus: FakeGpus, cluster: GpuCluster, monkeypatch: pytest.MonkeyPatch) -> None:
        """Also by the thread that looks at it, which might have looked once more: CUDA may give another mark the same handle."""
        first, second, _, _ = cluster.batch(gpus.empty(9), gpus.empty(9, ordinal=1))
        mark_on(0).done = False
        calls: list[str] = []
        passed, forget = MarksOfOthers.passed, MarksOfOthers.forget
        monkeypatch.setattr(MarksOfOthers, "passed", lambda *given: calls.append("passed") or passed(*given))
        monkeypatch.setattr(MarksOfOthers, "forget", lambda *given: calls.append("forget") or forget(*given))
        sending = first.transfer("send")
        first.close()
        with pytest.raises(Exception, match="closed"):
            sending.result(LONG)
        eventually(lambda: calls.count("forget") == 2)
        assert calls[-1] == "forget"
        second.close()

    def test_it_lives_as_long_as_the_client_and_is_used_again(self, gpus: FakeGpus, cluster: GpuCluster) -> None:
        """The agent may still look at it when the worker is told that its batch is closed."""
        one, two = cluster.pair("pair")
        for turn in range(3):
            source, target = gpus.empty(9).fill_(turn), gpus.empty(9, ordinal=1).zero_()
            first, second = registered(one, two, "pair", source, target)
            transferred(first, second)
            assert torch.equal(source, target)
            first.close(blocking=turn == 1)
            second.close()
            eventually(lambda: not any(agent._service.counts()["batches"] for agent in cluster.agents.values()))
        assert mark_on(0).set_times == 3


@pytest.mark.parametrize("growing", [False, True], ids=["cudaMalloc", "expandable"])
def test_agents_let_go_of_a_killed_workers_memory(gpus: FakeGpus, cluster: GpuCluster, growing: bool) -> None:
    workers = Worker(), Worker()
    try:
        for rank, worker in enumerate(workers):
            worker.start(begin, library(), str(rank), rank, cluster.paths[rank], "pair")
        for worker in workers:
            worker.result()
            worker.start(register, "pair", 0, 3.0, growing)
        for worker in workers:
            worker.result()
        cross(*workers)
        assert gpus.held > 0
        os.kill(workers[0].pid, 9)
        with pytest.raises((PeerLostError, BatchClosedError)):
            workers[1].call(transfer, "recv")
    finally:
        workers[0].close()
        workers[1].close()
    eventually(lambda: gpus.held == 0)  # without a word to Python's collector
