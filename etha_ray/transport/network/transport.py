"""An agent's place in the network: what it gives to others, and what it reads of them, within one memory budget."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections import deque
from collections.abc import Mapping, Sequence

import torch

from etha_ray.accelerator import Accelerator
from etha_ray.config import FAILURE_TIMEOUT
from etha_ray.errors import ConfigError, TransferError
from etha_ray.net import Address, Service
from etha_ray.net.handshake import check_secret
from etha_ray.transport.base import Capabilities, OneSidedTransport
from etha_ray.transport.buckets import DEFAULT_BUCKET_SIZE
from etha_ray.transport.mapped import MappedTransport
from etha_ray.transport.nccl import Communicators
from etha_ray.transport.network.device import Device, Path
from etha_ray.transport.network.exports import Export, Exports
from etha_ray.transport.network.parts import Read
from etha_ray.transport.network.program import NetworkProgram
from etha_ray.transport.network.session import Session
from etha_ray.transport.network.staging import MIN_BUCKET_SIZE, Staging, fitting

logger = logging.getLogger(__name__)

DEFAULT_MEMORY_BUDGET = 256 << 20
"""Bytes of staging memory that an agent may have."""

STREAMS = 4
"""TCP connections to each owner; measured."""


class NetworkTransport:
    """Gives tensors to agents of other hosts, and reads theirs. One for each agent.

    Whoever gives needs a `Server` that has this transport's `services`, with the same secret.

    Args:
        secret: of the pool; see `etha_ray.net`.
        memory_budget: bytes of staging memory over all running programs, in both directions together, and as much on the device.
            Half of it is for sending and half for receiving: with one for both, two agents could each fill theirs with what waits
            for the other.
        streams: TCP connections to each owner.
        failure_timeout: seconds after which a silent agent counts as lost; the same on all agents.
        checksums: what this end reads is compared with the checksums of what was sent. Owners make them for who asks.
        accelerator: the agent's device. Tensors in its memory can be given and read too.
        communicators: carry bytes between the devices of two agents; or why there are none, with what to install.
        path: "auto": what is on a device at both ends goes by communicator if both have them, and all else by TCP, through this
            host's memory; "tcp": all does; "nccl": reads that would not go by communicator are refused.

    Raises:
        ConfigError: an argument is out of range.
    """

    def __init__(
        self,
        secret: bytes,
        *,
        memory_budget: int = DEFAULT_MEMORY_BUDGET,
        streams: int = STREAMS,
        failure_timeout: float = FAILURE_TIMEOUT,
        checksums: bool = True,
        accelerator: Accelerator | None = None,
        communicators: Communicators | str = "",
        path: Path = "auto",
    ) -> None:
        if memory_budget < 2 * MIN_BUCKET_SIZE or streams < 1:
            raise ConfigError(
                f"memory budget {memory_budget} and {streams} streams: give at least {2 * MIN_BUCKET_SIZE} bytes and 1 stream"
            )
        self._secret = check_secret(secret)
        self.memory_budget = memory_budget
        self._streams = streams
        self._failure_timeout = failure_timeout
        self.checksums = checksums
        self._path: Path = path
        self._device: Device | None = None
        self._copier: OneSidedTransport = MappedTransport(threads=1)
        self._sending, self._receiving = Staging(memory_budget // 2), Staging(memory_budget // 2)
        if accelerator is not None:
            self._device = Device(accelerator, "its path is 'tcp'" if path == "tcp" else communicators, memory_budget)
            self._copier = self._device.copier
            self._sending, self._receiving = (Staging(memory_budget // 2, self._device.host_memory) for _ in range(2))
        self._exports = Exports(self._sending, self._copier, failure_timeout, self._device)
        self._said: set[str] = set()
        self._lock = threading.Lock()
        self._sessions: dict[Address, Session] = {}
        self._dropped: deque[tuple[Address, int]] = deque()
        self._closed = False

    @property
    def capabilities(self) -> Capabilities:
        """Those of an agent with this device."""
        devices = {"cpu"} if self._device is None else {"cpu", self._device.accelerator.device.type}
        return Capabilities(
            same_host_only=False, devices=frozenset(devices), needs_staging=False, one_sided=True, casts=True, combines=False
        )

    @property
    def services(self) -> Mapping[str, Service]:
        """For the agent's `Server`."""
        return self._exports.services

    @property
    def staging_peak(self) -> int:
        """Most bytes of this host's staging memory that there were, of both directions: never above the budget."""
        return self._sending.peak + self._receiving.peak

    @property
    def device_staging_peak(self) -> int:
        """As `staging_peak`, of the device's memory: what was taken is kept."""
        return 0 if self._device is None else self._device.staging_nbytes

    def export(self, name: str, tensors: Sequence[torch.Tensor]) -> Export:
        """Make tensors of any strides readable by ``name``, until the export is closed.

        Raises:
            ConfigError: the name is taken.
            WrongDeviceError, NotShareableError: a tensor is not a dense one, on the CPU or the agent's device.
        """
        return self._exports.export(name, tensors)

    def prepare(self, reads: Sequence[Read], bucket_size: int = DEFAULT_BUCKET_SIZE) -> NetworkProgram:
        """The program that does ``reads``: connected, checked by the owners and cut into buckets; no byte of a tensor moves.

        Reads without elements are dropped; an empty list is fine.

        Raises:
            TensorMismatchError: a target does not fit its region, or a region its tensor; or the dtypes cannot be cast.
            WrongDeviceError: a target is neither on the CPU nor on the agent's device.
            ConfigError: the bucket size is too small. One that either side's budget is too small for becomes as large as that allows.
            NoTransportError: it cannot go by the path that was asked for; or as `NetworkProgram.run`.
            HandleExpiredError, PeerLostError, CommunicatorError, TransferError: as `NetworkProgram.run`.
        """
        bucket_size = fitting(bucket_size, self._receiving.limit)
        self._forget_dropped()
        # A program may be collected anywhere, under any lock: that it is gone is only noted then.
        program = NetworkProgram(
            reads, bucket_size, self.checksums, self._device, self._path, self._say_once, self._session, self._dropped.append
        )
        program.introduce()
        return program

    def close(self) -> None:
        """End all exports, runs and connections, and join the threads. May be called twice. Close the server after."""
        with self._lock:
            self._closed = True
            sessions = list(self._sessions.values())
            self._sessions.clear()
        for session in sessions:
            session.close()
        self._exports.close()
        self._sending.clear()
        self._receiving.clear()

    def _session(self, address: Address) -> Session:
        with self._lock:
            if self._closed:
                raise TransferError("the transport was closed; make a new one and prepare the reads again")
            session = self._sessions.get(address)
            if session is not None and session.error is None:
                return session
            fresh = self._sessions[address] = Session(
                address, self._secret, self._device, self._receiving, self._copier, self._streams, self._failure_timeout
            )
        if session is not None:
            session.close()
        return fresh

    def _say_once(self, lacks: str) -> None:
        """Log why tensors on devices go by TCP, unless that was asked for."""
        with self._lock:
            said = lacks in self._said or self._path == "tcp"
            self._said.add(lacks)
        if not said:
            logger.warning("tensors on GPUs go by TCP, through this host's memory: %s (said once)", lacks)

    def _forget_dropped(self) -> None:
        """Have owners forget the programs that are gone."""
        with contextlib.suppress(IndexError):  # there are no more
            while True:
                address, program = self._dropped.popleft()
                with self._lock:
                    session = self._sessions.get(address)
                if session is not None:
                    session.forget(program, tell=True)

    def __repr__(self) -> str:
        return f"NetworkTransport({len(self._sessions)} connections{', closed' if self._closed else ''})"
