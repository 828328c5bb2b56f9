"""Reading from an owner as a one-sided transport, for the contract of these."""

from __future__ import annotations

import itertools
import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from etha_ray.errors import WrongDeviceError
from etha_ray.net import Server
from etha_ray.transport import Capabilities, Copy, CopyProgram, MappedTransport, OneSidedTransport
from etha_ray.transport.base import check_copy
from etha_ray.transport.network import NetworkProgram, NetworkTransport, Read, RemoteRegion


class ThroughTheNetwork(OneSidedTransport):
    """Copies whose sources are exported and read back. What combines several is read into scratch, and combined there."""

    def __init__(self, owner: Mapping[str, Any], reader: Mapping[str, Any]) -> None:
        """The options of the two ends."""
        secret = os.urandom(32)
        self._owner, self._reader = NetworkTransport(secret, **owner), NetworkTransport(secret, **reader)
        self._server = Server(secret, self._owner.services, "127.0.0.1")
        self._mapped = MappedTransport(threads=1)
        self._numbers = itertools.count()

    @property
    def capabilities(self) -> Capabilities:
        return self._reader.capabilities

    def prepare(self, copies: Sequence[Copy]) -> CopyProgram:
        reads: list[Read] = []
        combined: list[Copy] = []
        for index, copy in enumerate(copies):
            check_copy(copy, f"copy {index}")
            for tensor in (*copy.sources, copy.target):
                if tensor.device.type != "cpu":
                    raise WrongDeviceError(f"copy {index}: a {tensor.device} tensor")
            targets = (copy.target,) if copy.op is None else tuple(torch.empty_like(source) for source in copy.sources)
            if copy.op is not None:
                combined.append(Copy(targets, copy.target, copy.op, copy.divisor))
            export = self._owner.export(f"copy {next(self._numbers)}", copy.sources)
            for position, (source, target) in enumerate(zip(copy.sources, targets, strict=True)):
                size = tuple(source.shape)
                region = RemoteRegion(self._server.address, export.name, position, (0,) * len(size), size, source.dtype)
                reads.append(Read(region, target))
        return _Program(self._reader.prepare(reads, bucket_size=1 << 20), self._mapped.prepare(combined))

    def close(self) -> None:
        for each in (self._reader, self._owner, self._server, self._mapped):
            each.close()


class _Program(CopyProgram):
    def __init__(self, reading: NetworkProgram, combining: CopyProgram) -> None:
        self._reading, self._combining = reading, combining

    @property
    def nbytes(self) -> int:
        return self._reading.nbytes

    def run(self) -> int:
        count = self._reading.run()
        self._combining.run()
        return count
