"""The other end, in a process of its own: ``python -m tests.net.peer ROLE ARGUMENTS``; ends when its standard input does.

Roles without tensors do not load torch, which takes longer than what they do.
"""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from etha_ray.errors import EthaRayError
from etha_ray.net import Address, Channel, Server, accept_channels, connect

if TYPE_CHECKING:
    import torch

SECRET = bytes(range(32))
FAILURE_TIMEOUT = 3.0
ROOT = Path(__file__).parents[2]


def source(index: int, elements: int) -> torch.Tensor:
    """The tensor that an owner exports at ``index``: both ends can make it."""
    import torch

    generator = torch.Generator().manual_seed(index)
    return torch.randint(-(2**31), 2**31 - 1, (elements,), dtype=torch.int32, generator=generator)


def echo(host: str) -> None:
    """Serve channels that answer each message with itself."""
    service = accept_channels(lambda channel, message: channel.send(message), lambda *_: None, failure_timeout=FAILURE_TIMEOUT)
    with contextlib.closing(Server(SECRET, {"echo": service}, host)) as server:
        say(server.address.port)
        sys.stdin.read()


def call(address: str) -> None:
    """Open a channel, and send one message on it."""

    def lost(channel: Channel, reason: EthaRayError) -> None:
        say("lost")

    channel = connect(Address.parse(address), SECRET, "test", lambda *_: None, lost, hello=b"peer", failure_timeout=FAILURE_TIMEOUT)
    channel.send(b"here I am")
    sys.stdin.read()
    channel.close()


def own(host: str, port: str, tensors: str, elements: str) -> None:
    """Export ``tensors`` tensors of int32 as "weights", if any."""
    from etha_ray.transport.network import NetworkTransport

    transport = NetworkTransport(SECRET, failure_timeout=FAILURE_TIMEOUT)
    with contextlib.closing(transport), contextlib.closing(Server(SECRET, transport.services, host, int(port))) as server:
        if int(tensors):
            transport.export("weights", [source(index, int(elements)) for index in range(int(tensors))])
        say(server.address.port)
        sys.stdin.read()


def say(what: object) -> None:
    print(what, flush=True)


@contextlib.contextmanager
def peer(role: str, *arguments: str, prefix: Sequence[str] = (), module: str = "tests.net.peer") -> Iterator[subprocess.Popen[str]]:
    """Start one; it is killed when the block is left. What it says first is read by `first_word`."""
    process = subprocess.Popen(
        [*prefix, sys.executable, "-m", module, role, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )
    try:
        with process:
            try:
                yield process
            finally:
                process.kill()
    finally:
        process.wait()


def first_word(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    word = process.stdout.readline().strip()
    assert word, "the peer ended"
    return word


if __name__ == "__main__":
    {"echo": echo, "call": call, "own": own}[sys.argv[1]](*sys.argv[2:])
