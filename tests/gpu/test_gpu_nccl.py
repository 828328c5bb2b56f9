"""NCCL between two processes on one GPU: its communicators, the network transport over them, and who dies or stops meanwhile.

NCCL takes two processes on one GPU if each has an NCCL_HOSTID of its own; bytes go by sockets then.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import pytest
import torch

from etha_ray.accelerator import CudaAccelerator
from etha_ray.bench.gpu_nccl import nccl_figures
from etha_ray.bench.workload import model
from etha_ray.errors import CommunicatorError, EthaRayError, OptionalDependencyError, PeerLostError, WrongDeviceError
from etha_ray.net import Address
from etha_ray.transport.nccl.communicator import SENDER
from etha_ray.transport.nccl.cupy_nccl import CupyCommunicators, load_nccl
from etha_ray.transport.network import NetworkProgram, NetworkTransport, Read, RemoteRegion, joining
from tests.contracts.communicator import CommunicatorContract
from tests.contracts.transport import bits
from tests.gpu.owner import LARGE, SOURCES
from tests.net.peer import FAILURE_TIMEOUT, ROOT, SECRET, first_word
from tests.transport.nccl.far import on_one_gpu


@pytest.fixture(scope="module", autouse=True)
def nccl() -> None:
    """NCCL takes its environment when it is first used."""
    try:
        load_nccl()
    except OptionalDependencyError as error:
        pytest.skip(str(error))
    os.environ.update(on_one_gpu(f"near-{os.getpid()}"))


class TestCupy(CommunicatorContract):
    kind = "cupy"


def test_a_message_to_oneself(cuda: CudaAccelerator) -> None:
    """What cupy's calls take, with no other process that could be wrong."""
    nccl = load_nccl()
    communicator = nccl.NcclCommunicator(1, bytes(nccl.get_unique_id()), 0)
    source = torch.arange(100_000, device=cuda.device)
    target, lane = torch.zeros_like(source), cuda.lane(alone=True)
    lane.after(cuda.current())
    with lane.current():
        nccl.groupStart()
        communicator.send(source.data_ptr(), source.nbytes, nccl.NCCL_UINT8, 0, lane.pointer)
        communicator.recv(target.data_ptr(), target.nbytes, nccl.NCCL_UINT8, 0, lane.pointer)
        nccl.groupEnd()
    lane.wait()
    assert torch.equal(source, target)
    communicator.abort()


@contextlib.contextmanager
def owner() -> Iterator[tuple[subprocess.Popen[str], Address]]:
    """A process that exports `SOURCES` on this GPU."""
    environment = {**os.environ, **on_one_gpu(f"owner-{time.monotonic_ns()}")}
    with subprocess.Popen(
        [sys.executable, "-m", "tests.gpu.owner"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=environment
    ) as process:
        try:
            yield process, Address("127.0.0.1", int(first_word(process)))
        finally:
            process.kill()


@pytest.fixture
def reader(cuda: CudaAccelerator) -> Iterator[NetworkTransport]:
    transport = NetworkTransport(
        SECRET,
        failure_timeout=FAILURE_TIMEOUT,
        accelerator=cuda,
        communicators=CupyCommunicators(cuda),
        path="nccl",
        memory_budget=64 << 20,
    )
    with contextlib.closing(transport):
        yield transport


def region(address: Address, index: int, source: torch.Tensor) -> RemoteRegion:
    return RemoteRegion(address, "x", index, (0,) * source.dim(), tuple(source.shape), source.dtype)


def whole(
    reader: NetworkTransport, address: Address, device: torch.device
) -> tuple[NetworkProgram, list[torch.Tensor], list[torch.Tensor]]:
    """Everything, into targets of other strides and, where that can be, another dtype; and what is to be there."""
    sources = [make() for make in SOURCES]
    targets = []
    for number, source in enumerate(sources):
        dtype = torch.bfloat16 if source.dtype == torch.float32 else source.dtype
        size = tuple(reversed(source.shape))
        strided = number % 2 and source.dim() > 1
        target = torch.zeros(size, dtype=dtype, device=device).permute(*reversed(range(len(size)))) if strided else None
        targets.append(torch.zeros(source.shape, dtype=dtype, device=device) if target is None else target)
    reads = [Read(region(address, index, source), target) for index, (source, target) in enumerate(zip(sources, targets, strict=True))]
    return reader.prepare(reads, 1 << 20), targets, [source.to(target.dtype) for source, target in zip(sources, targets, strict=True)]


def test_all_kinds_of_regions_arrive_again_and_again(reader: NetworkTransport, cuda: CudaAccelerator) -> None:
    with owner() as (_, address):
        program, targets, wanted = whole(reader, address, cuda.device)
        for _ in range(3):
            for target in targets:
                target.zero_()
            assert program.run() == program.nbytes
            assert [bits(target.cpu()) for target in targets] == [bits(each) for each in wanted]
        assert 0 < reader.device_staging_peak <= 64 << 20
        assert reader.staging_peak == 0


def test_devices_at_one_end_or_none_go_by_tcp(cuda: CudaAccelerator) -> None:
    """From a GPU into a GPU without NCCL, and from a GPU into the CPU."""
    with owner() as (_, address):
        for device, accelerator in ((cuda.device, cuda), (torch.device("cpu"), None)):
            transport = NetworkTransport(SECRET, failure_timeout=FAILURE_TIMEOUT, accelerator=accelerator)
            with contextlib.closing(transport) as reader:
                program, targets, wanted = whole(reader, address, device)
                program.run()
                assert [bits(target.cpu()) for target in targets] == [bits(each) for each in wanted]
                assert reader.device_staging_peak == 0


def test_a_device_that_the_agent_has_not_is_refused(cuda: CudaAccelerator) -> None:
    tensor = torch.zeros(4, device=cuda.device)
    with contextlib.closing(NetworkTransport(SECRET)) as without:
        with pytest.raises(WrongDeviceError, match="tensor 0 is on cuda:0, and this agent has only the CPU"):
            without.export("x", [tensor])
        with pytest.raises(WrongDeviceError, match="read 0: its target is on cuda:0"):
            without.prepare([Read(region(Address("127.0.0.1", 1), 0, tensor), tensor)])


@pytest.mark.parametrize("how", [signal.SIGSTOP, signal.SIGKILL], ids=["stopped", "killed"])
def test_an_owner_that_dies_midway(how: signal.Signals, reader: NetworkTransport, cuda: CudaAccelerator) -> None:
    """The communicator is aborted, which frees the GPU, and the next one works."""
    with owner() as (process, address):
        outcome: list[EthaRayError] = []
        target = torch.zeros(LARGE, dtype=torch.int32, device=cuda.device)
        program = reader.prepare([Read(RemoteRegion(address, "large", 0, (0,), (LARGE,), torch.int32), target)], 1 << 20)
        program.run()
        runs = [0]

        def again() -> None:
            try:
                while True:
                    program.run()
                    runs[0] += 1
            except EthaRayError as error:
                outcome.append(error)

        thread = threading.Thread(target=again)
        thread.start()
        while not runs[0]:
            time.sleep(1e-3)
        process.send_signal(how)
        thread.join(60)
        assert not thread.is_alive()
        assert isinstance(outcome[0], PeerLostError), outcome[0]
        assert str(address) in str(outcome[0])
        cuda.current().wait()
        if how == signal.SIGSTOP:
            process.send_signal(signal.SIGCONT)
            target.zero_()
            program.run()
            assert torch.equal(target.cpu(), torch.arange(LARGE, dtype=torch.int32))
    with owner() as (_, address):
        fresh, targets, wanted = whole(reader, address, cuda.device)
        fresh.run()
        assert [bits(each.cpu()) for each in targets] == [bits(each) for each in wanted]


def test_an_end_that_nobody_joins_is_given_up(cuda: CudaAccelerator, monkeypatch: pytest.MonkeyPatch) -> None:
    """The owner here makes a communicator that the reader, which only pretends, never joins."""
    monkeypatch.setattr(joining, "JOIN_TIMEOUT", 2.0)

    class Pretends(CupyCommunicators):
        def join(self, unique_id: bytes, rank: int) -> object:  # type: ignore[override]
            return super().join(unique_id if rank == SENDER else self.unique_id(), rank)

    with owner() as (_, address):
        transport = NetworkTransport(SECRET, failure_timeout=FAILURE_TIMEOUT, accelerator=cuda, communicators=Pretends(cuda), path="nccl")
        with contextlib.closing(transport) as reader, pytest.raises(CommunicatorError, match=rf"{address}.*within 2 s.*NCCL_SOCKET_IFNAME"):
            whole(reader, address, cuda.device)


def test_the_bench(cuda: CudaAccelerator) -> None:
    figures, ratios = nccl_figures(2, "tiny", model("tiny", 2, 2, "bfloat16"))
    assert all(each.value > 0 for each in (*figures, *ratios))
