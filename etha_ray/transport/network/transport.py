"""An agent's place in the network: what it gives to others, and what it reads of them, within one memory budget."""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from collections.abc import Mapping, Sequence

import torch

from etha_ray.config import FAILURE_TIMEOUT
from etha_ray.errors import ConfigError, TransferError
from etha_ray.net import Address, Service
from etha_ray.net.handshake import check_secret
from etha_ray.transport.base import Capabilities
from etha_ray.transport.buckets import DEFAULT_BUCKET_SIZE
from etha_ray.transport.mapped import MappedTransport
from etha_ray.transport.network.exports import Export, Exports
from etha_ray.transport.network.program import NetworkProgram, Read
from etha_ray.transport.network.session import Session
from etha_ray.transport.network.staging import MIN_BUCKET_SIZE, Staging, check_bucket_size

DEFAULT_MEMORY_BUDGET = 256 << 20
"""Bytes of staging memory that an agent may have."""

STREAMS = 4
"""TCP connections to each owner; measured."""


class NetworkTransport:
    """Gives tensors to agents of other hosts, and reads theirs. One for each agent.

    Whoever gives needs a `Server` that has this transport's `services`, with the same secret.

    Args:
        secret: of the pool; see `etha_ray.net`.
        memory_budget: bytes of staging memory over all running programs, in both directions together. Half of it is for
            sending and half for receiving: with one for both, two agents could each fill theirs with what waits for the other.
        streams: TCP connections to each owner.
        failure_timeout: seconds after which a silent agent counts as lost; the same on all agents.
        checksums: what this end reads is compared with the checksums of what was sent. Owners make them for who asks.

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
        self._sending, self._receiving = Staging(memory_budget // 2), Staging(memory_budget // 2)
        self._copier = MappedTransport(threads=1)
        self._exports = Exports(self._sending, failure_timeout)
        self._lock = threading.Lock()
        self._sessions: dict[Address, Session] = {}
        self._dropped: deque[tuple[Address, int]] = deque()
        self._closed = False

    @property
    def capabilities(self) -> Capabilities:
        """The same for every instance."""
        return Capabilities(
            same_host_only=False, devices=frozenset({"cpu"}), needs_staging=False, one_sided=True, casts=True, combines=False
        )

    @property
    def services(self) -> Mapping[str, Service]:
        """For the agent's `Server`."""
        return self._exports.services

    @property
    def staging_peak(self) -> int:
        """Most bytes of staging memory that there were, of both directions: never above the budget."""
        return self._sending.peak + self._receiving.peak

    def export(self, name: str, tensors: Sequence[torch.Tensor]) -> Export:
        """Make tensors of any strides readable by ``name``, until the export is closed.

        Raises:
            ConfigError: the name is taken.
            WrongDeviceError, NotShareableError: a tensor is not a dense one on the CPU.
        """
        return self._exports.export(name, tensors)

    def prepare(self, reads: Sequence[Read], bucket_size: int = DEFAULT_BUCKET_SIZE) -> NetworkProgram:
        """The program that does ``reads``: connected, checked by the owners and cut into buckets; no byte of a tensor moves.

        Reads without elements are dropped; an empty list is fine.

        Raises:
            TensorMismatchError: a target does not fit its region, or a region its tensor; or the dtypes cannot be cast.
            WrongDeviceError: a target is not on the CPU.
            ConfigError: the bucket size is out of range on either side.
            HandleExpiredError, PeerLostError, NoTransportError, TransferError: as `NetworkProgram.run`.
        """
        check_bucket_size(bucket_size, self._receiving.limit, "this side's")
        self._forget_dropped()
        # A program may be collected anywhere, under any lock: that it is gone is only noted then.
        program = NetworkProgram(reads, bucket_size, self.checksums, self._session, self._dropped.append)
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
                address, self._secret, self._receiving, self._copier, self._streams, self._failure_timeout
            )
        if session is not None:
            session.close()
        return fresh

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
