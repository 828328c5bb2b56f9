"""An owner and a reader in this process, each with a device of its own and one end of a recording communicator."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import torch

from etha_ray.errors import EthaRayError
from etha_ray.net import Server
from etha_ray.transport.network import NetworkProgram, NetworkTransport
from tests.accelerator.lanes import QueuedAccelerator
from tests.net.pair import SECRET, Pair
from tests.transport.nccl.recording import RecordingCommunicators


def end(communicators: RecordingCommunicators | str, secret: bytes = SECRET, **options: Any) -> NetworkTransport:
    """One agent's place in the network, with a device."""
    return NetworkTransport(secret, accelerator=QueuedAccelerator(), communicators=communicators, **options)


class DevicePair(Pair):
    """``sent`` and ``received`` are the communicators of the two ends."""

    def __init__(self, owner: dict[str, Any] | None = None, reader: dict[str, Any] | None = None) -> None:
        """The options of the two ends."""
        self.sent, self.received = RecordingCommunicators(), RecordingCommunicators()
        self.owner, self.reader = end(self.sent, **owner or {}), end(self.received, **reader or {})
        self.server = Server(SECRET, self.owner.services, "127.0.0.1")
        self.address = self.server.address

    def prepare(self, sources: Sequence[torch.Tensor], targets: Sequence[torch.Tensor], bucket_size: int = 1 << 16) -> NetworkProgram:
        """Export the sources as "x", and have them read into the targets."""
        self.owner.export("x", sources)
        return self.reader.prepare(self.reads(sources, targets), bucket_size)

    @property
    def groups(self) -> list[list[int]]:
        """The groups that both ends issued: the same in the same order."""
        assert self.sent.groups[0] == self.received.groups[1]
        assert self.sent.groups[1] == self.received.groups[0] == []
        return self.sent.groups[0]


class Running(threading.Thread):
    """A run on a thread of its own."""

    def __init__(self, program: NetworkProgram) -> None:
        super().__init__()
        self._program = program
        self._outcome: int | EthaRayError | None = None
        self.start()

    def run(self) -> None:
        try:
            self._outcome = self._program.run()
        except EthaRayError as error:
            self._outcome = error
        del self._program

    @property
    def outcome(self) -> int | EthaRayError:
        """What came of it: waits for that."""
        self.join()
        assert self._outcome is not None
        return self._outcome
