"""The receiving end of a communicator in a process of its own: ``python -m tests.transport.nccl.far KIND``.

It is asked by lines on its standard input, of numbers: the unique id as bytes, then the sizes of each group. It answers with what
arrived, as checksums.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from typing import cast

import torch
import xxhash

from etha_ray.accelerator import Accelerator, CudaAccelerator
from etha_ray.testing import eventually
from etha_ray.transport.nccl import Communicators
from etha_ray.transport.nccl.communicator import RECEIVER
from etha_ray.transport.nccl.cupy_nccl import CupyCommunicators
from tests.accelerator.lanes import QueuedAccelerator
from tests.net.peer import ROOT, first_word, say
from tests.transport.nccl.recording import RecordingCommunicators

PATIENCE = 120.0


def on_one_gpu(host: str) -> dict[str, str]:
    """The environment in which NCCL takes processes that share a GPU: each for a host of its own, so that bytes go by sockets."""
    return {
        "NCCL_HOSTID": host,
        "NCCL_SOCKET_IFNAME": "lo",
        "NCCL_IB_DISABLE": "1",
        "NCCL_MNNVL_ENABLE": "0",
        "NCCL_RAS_ENABLE": "0",
    }


def made(kind: str) -> tuple[Accelerator, Communicators]:
    """The accelerator and the communicators of a kind."""
    if kind == "recording":
        return QueuedAccelerator(), RecordingCommunicators()
    cuda = CudaAccelerator(0)
    return cuda, CupyCommunicators(cuda)


def digest(tensor: torch.Tensor) -> str:
    """Of its bytes."""
    return xxhash.xxh3_64(cast(bytes, tensor.cpu().numpy())).hexdigest()


class Far:
    """The process, from here."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process

    def ask(self, numbers: Sequence[int]) -> None:
        """Have it join, and later receive a group."""
        assert self.process.stdin is not None
        print(*numbers, file=self.process.stdin, flush=True)

    def answer(self) -> str:
        """What it says next."""
        return first_word(self.process)


@contextlib.contextmanager
def far(kind: str) -> Iterator[Far]:
    """Start one; it is killed when the block is left."""
    command = [sys.executable, "-m", "tests.transport.nccl.far", kind]
    environment = {**os.environ, **on_one_gpu(f"far-{os.getpid()}-{time.monotonic_ns()}")}
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=environment) as process:
        try:
            yield Far(process)
        finally:
            process.kill()


def main(kind: str) -> None:
    accelerator, communicators = made(kind)
    lane = accelerator.lane(alone=True)
    communicator = communicators.join(bytes(map(int, sys.stdin.readline().split())), RECEIVER)
    eventually(communicator.ready)
    say("joined")
    for line in sys.stdin:
        memory = [accelerator.empty(int(size)) for size in line.split()]
        communicator.receive([(each.data_ptr(), each.nbytes) for each in memory], lane)
        eventually(communicator.ready)
        eventually(lane.done)
        say("-".join(map(digest, memory)))


if __name__ == "__main__":
    main(sys.argv[1])
