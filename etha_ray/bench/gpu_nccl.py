"""A model's weights from one process to another by NCCL, both on one GPU, against one message of as many bytes by cupy's own calls.

NCCL takes two processes on one GPU only if each counts as a host of its own, so bytes go by sockets, or by whatever leads out of
the host: it is what our path adds to NCCL that is measured here, not what NCCL reaches between GPUs.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import time
from collections.abc import Callable
from multiprocessing.connection import Connection as Pipe
from typing import Protocol

import torch

from etha_ray.accelerator import Accelerator, CudaAccelerator
from etha_ray.bench.bus import check_arrived
from etha_ray.bench.figures import Figure, Ratio, interleaved, median, progress
from etha_ray.bench.giver import answer, open_giver
from etha_ray.bench.network import cut, pieces
from etha_ray.bench.workload import Shards, Workload
from etha_ray.net import Address, Server
from etha_ray.transport.nccl import Communicators
from etha_ray.transport.nccl.communicator import RECEIVER, SENDER
from etha_ray.transport.nccl.cupy_nccl import CupyCommunicators, load_nccl
from etha_ray.transport.network import NetworkTransport, Read, RemoteRegion

_HOST = "127.0.0.1"
_EXPORT = "src{}"
_WARM_UPS = 2


class Kit(Protocol):
    """What each process has."""

    accelerator: Accelerator
    communicators: Communicators

    def raw(self, unique_id: bytes, rank: int) -> Callable[[torch.Tensor], None]:
        """Joins a communicator of two, and gives what sends all of a tensor by it, or receives it, and returns when that is done."""


class CudaKit:
    """The first GPU, and NCCL on it. Raises `WrongDeviceError` and `OptionalDependencyError` where there is none."""

    def __init__(self) -> None:
        self.accelerator = CudaAccelerator(0)
        self.communicators = CupyCommunicators(self.accelerator)

    def raw(self, unique_id: bytes, rank: int) -> Callable[[torch.Tensor], None]:
        """See `Kit`: as cupy has it, without what etha_ray changes."""
        nccl, lane = load_nccl(), self.accelerator.lane(alone=True)
        with lane.current():
            communicator = nccl.NcclCommunicator(2, unique_id, rank)

        def move(tensor: torch.Tensor) -> None:
            call = communicator.send if rank == SENDER else communicator.recv
            with lane.current():
                call(tensor.data_ptr(), tensor.nbytes, nccl.NCCL_UINT8, 1 - rank, lane.pointer)
            lane.wait()

        return move


CUDA_KIT = f"{__name__}:CudaKit"


def nccl_figures(steps: int, shape: str, workload: Workload, kit: str = CUDA_KIT) -> tuple[list[Figure], list[Ratio]]:
    """Measure ``steps`` transfers of what target rank 0 gets, in turns with the baseline. What arrives is compared bit for bit.

    ``kit``: MODULE:NAME of what makes a `Kit`, in both processes.

    Raises `BenchError` when wrong bytes arrive or the other process fails, and what making the kit raises.
    """
    gigabytes, name = workload.nbytes("dst", 0) / 1e9, shape.replace("-", "_").replace(".", "_")
    with open_giver(_give, workload, kit) as giver, contextlib.closing(_Taker(workload, giver, _made(kit))) as taker:
        measures = {"nccl": taker.nccl, "unchecked": taker.unchecked, "raw": taker.raw}
        for which in ("nccl", "unchecked"):
            taker.verified(which, measures[which])
        for _ in range(_WARM_UPS):
            for measure in measures.values():
                measure()
        samples = interleaved(steps, {which: _timed(measure) for which, measure in measures.items()})
        taker.verified("nccl", taker.nccl)
        staging, prepared = taker.staging_peak, taker.prepared
    seconds = {which: median(values) for which, values in samples.items()}
    what = f"{shape}, {workload.src} FSDP to {workload.dst} tensor-parallel shards"
    return [
        Figure(f"nccl_{name}_gb_per_s", gigabytes / seconds["nccl"], f"{what}, by NCCL between two processes, with checksums, median"),
        Figure(f"nccl_{name}_unchecked_gb_per_s", gigabytes / seconds["unchecked"], "the same without checksums, median"),
        Figure(f"nccl_{name}_raw_gb_per_s", gigabytes / seconds["raw"], "as many bytes in one message by cupy's communicator, median"),
        Figure(f"nccl_{name}_prepare_ms", prepared * 1e3, "connecting, joining the communicator and preparing, once"),
        Figure(f"nccl_{name}_staging_mib", staging / 2**20, "the reader's staging memory on the GPU"),
    ], [
        Ratio(f"nccl_{name}_raw", seconds["raw"] / seconds["nccl"], "one message of as many bytes over it", reach=0.90),
        Ratio(f"nccl_{name}_raw_unchecked", seconds["raw"] / seconds["unchecked"], "the same over it without checksums"),
    ]


def _timed(measure: Callable[[], None]) -> Callable[[], list[float]]:
    def run() -> list[float]:
        start = time.perf_counter()
        measure()
        return [time.perf_counter() - start]

    return run


def _made(kit: str) -> Kit:
    module, _, name = kit.partition(":")
    made: Kit = getattr(importlib.import_module(module), name)()
    return made


class _Taker:
    """This process's end: it reads, receives and compares."""

    def __init__(self, workload: Workload, giver: Pipe, kit: Kit) -> None:
        self._giver = giver
        device = kit.accelerator.device
        self._shards = Shards(workload, "dst", 0, device)
        self._version = 0
        with contextlib.ExitStack() as stack:
            secret = os.urandom(32)
            giver.send_bytes(secret)
            address = Address(_HOST, int(answer(giver)))
            self._checked, self._unchecked = (
                NetworkTransport(secret, checksums=checksums, accelerator=kit.accelerator, communicators=kit.communicators, path="nccl")
                for checksums in (True, False)
            )
            for transport in (self._checked, self._unchecked):
                stack.callback(transport.close)
            reads = []
            for piece in pieces(workload):
                target = cut(self._shards.tensors[piece.tensor], piece.target_start, piece.size)
                region = RemoteRegion(address, _EXPORT.format(piece.source), piece.tensor, piece.source_start, piece.size, target.dtype)
                reads.append(Read(region, target))
            progress(f"{workload.nbytes('dst', 0) / 1e9:.2f} GB to move by NCCL in {len(reads)} regions")
            start = time.perf_counter()
            self._by_nccl = self._checked.prepare(reads)
            self.prepared = time.perf_counter() - start
            """Seconds that the first program took to prepare."""
            self._by_unchecked = self._unchecked.prepare(reads)
            giver.send_bytes(b"join")
            self._receive = kit.raw(bytes.fromhex(answer(giver)), RECEIVER)
            self._raw = kit.accelerator.empty(workload.nbytes("dst", 0))
            self._stack = stack.pop_all()

    def verified(self, name: str, measure: Callable[[], None]) -> None:
        """Have the giver write new data, move it, and compare all of it. Raises `BenchError`."""
        self._version += 1
        self._giver.send_bytes(f"fill {self._version}".encode())
        answer(self._giver)
        measure()
        check_arrived(name, [self._shards.wrong(self._version)])

    def nccl(self) -> None:
        """Read all regions."""
        self._by_nccl.run()

    def unchecked(self) -> None:
        """The same, and nothing is compared with checksums."""
        self._by_unchecked.run()

    def raw(self) -> None:
        """Receive as many bytes in one message."""
        self._giver.send_bytes(b"raw")
        self._receive(self._raw)

    @property
    def staging_peak(self) -> int:
        """Bytes of staging memory on the device."""
        return self._checked.device_staging_peak

    def close(self) -> None:
        """End it."""
        self._stack.close()


def _give(pipe: Pipe, workload: Workload, kit: str) -> None:
    """The life of the other process: it holds all source ranks' shards, and sends when it is asked to."""
    os.environ["NCCL_HOSTID"] = f"giver-{os.getpid()}"  # another than this host's: see above
    made = _made(kit)
    shards = [Shards(workload, "src", index, made.accelerator.device) for index in range(workload.src)]
    raw = made.accelerator.empty(workload.nbytes("dst", 0)).zero_()
    with contextlib.ExitStack() as stack, contextlib.suppress(EOFError):
        secret = pipe.recv_bytes()
        transport = NetworkTransport(secret, accelerator=made.accelerator, communicators=made.communicators)
        server = Server(secret, transport.services, _HOST)
        stack.callback(server.close)
        stack.callback(transport.close)
        for index, held in enumerate(shards):
            transport.export(_EXPORT.format(index), held.tensors)
        pipe.send_bytes(str(server.address.port).encode())
        assert pipe.recv_bytes() == b"join"
        unique_id = made.communicators.unique_id()
        pipe.send_bytes(unique_id.hex().encode())
        send = made.raw(unique_id, SENDER)
        while True:
            request, *arguments = pipe.recv_bytes().split()
            if request == b"raw":
                send(raw)
                continue
            for held in shards:
                held.fill(int(arguments[0]))
            made.accelerator.current().wait()
            pipe.send_bytes(b"filled")
