"""An owner of tensors on the first GPU, in a process of its own: ``python -m tests.gpu.owner``; ends when its standard input does."""

from __future__ import annotations

import contextlib
import sys
from functools import partial

import torch

from etha_ray.accelerator import CudaAccelerator
from etha_ray.net import Server
from etha_ray.transport.nccl.cupy_nccl import CupyCommunicators
from etha_ray.transport.network import NetworkTransport
from tests.contracts.transport import numbers, random_tensor
from tests.net.peer import FAILURE_TIMEOUT, SECRET, say

LARGE = 64 << 20
"""Elements of int32 of the tensor "large": many rounds."""

SOURCES = [
    partial(random_tensor, (3000, 1000)),
    partial(random_tensor, (1000, 700), torch.bfloat16, 1),
    lambda: random_tensor((900, 1300), seed=2).t(),
    lambda: random_tensor((777, 600), torch.uint8, 3)[:, 5:300],
    partial(numbers, (500, 900), torch.float32),
    partial(random_tensor, (7,), torch.int64, 5),
    partial(random_tensor, (64, 33), torch.complex64, 6),
    partial(random_tensor, (5, 6, 7, 8), torch.float8_e4m3fn, 7),
    *(partial(random_tensor, (11, number + 1), torch.float16, number) for number in range(200)),
]
"""What is exported as "x": both ends can make it."""


def main() -> None:
    cuda = CudaAccelerator(0)
    transport = NetworkTransport(
        SECRET, failure_timeout=FAILURE_TIMEOUT, accelerator=cuda, communicators=CupyCommunicators(cuda), memory_budget=64 << 20
    )
    with contextlib.closing(transport), contextlib.closing(Server(SECRET, transport.services, "127.0.0.1")) as server:
        held = []
        for make in SOURCES:
            source = make()
            held.append(torch.empty_strided(source.shape, source.stride(), dtype=source.dtype, device=cuda.device).copy_(source))
        transport.export("x", held)
        transport.export("large", [torch.arange(LARGE, dtype=torch.int32, device=cuda.device)])
        cuda.current().wait()
        say(server.address.port)
        sys.stdin.read()


if __name__ == "__main__":
    main()
