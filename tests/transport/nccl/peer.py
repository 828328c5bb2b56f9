"""The other end with a device, in a process of its own: ``python -m tests.transport.nccl.peer ROLE ARGUMENTS``."""

from __future__ import annotations

import contextlib
import sys

import torch

from etha_ray.net import Address, Server
from etha_ray.transport.network import Read, RemoteRegion
from tests.net.peer import FAILURE_TIMEOUT, SECRET, say, source
from tests.transport.nccl.pair import end
from tests.transport.nccl.recording import RecordingCommunicators


def own(elements: str) -> None:
    """Export a tensor of int32 as "weights"."""
    transport = end(RecordingCommunicators(), SECRET, failure_timeout=FAILURE_TIMEOUT)
    with contextlib.closing(transport), contextlib.closing(Server(SECRET, transport.services, "127.0.0.1")) as server:
        transport.export("weights", [source(0, int(elements))])
        say(server.address.port)
        sys.stdin.read()


def read(secret: str, address: str, elements: str) -> None:
    """Read it again and again."""
    transport = end(RecordingCommunicators(), bytes.fromhex(secret), failure_timeout=FAILURE_TIMEOUT)
    size = (int(elements),)
    region = RemoteRegion(Address.parse(address), "weights", 0, (0,), size, torch.int32)
    program = transport.prepare([Read(region, torch.zeros(size, dtype=torch.int32))], bucket_size=1 << 16)
    say("ready")
    while True:
        program.run()


if __name__ == "__main__":
    {"own": own, "read": read}[sys.argv[1]](*sys.argv[2:])
