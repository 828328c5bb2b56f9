"""A program that reads from other agents: prepared once, run any number of times."""

from __future__ import annotations

import queue
import threading
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from etha_ray.errors import EthaRayError, TransferCancelledError
from etha_ray.net import Address
from etha_ray.transport.base import CopyProgram
from etha_ray.transport.network.device import Device, Path
from etha_ray.transport.network.fetching import DataPath, Job
from etha_ray.transport.network.parts import Layout, Part, Read, check_read
from etha_ray.transport.network.session import Session
from etha_ray.transport.network.streams import Fetching
from etha_ray.transport.network.taking import Taking


@dataclass(frozen=True)
class _Running:
    """A job on its way."""

    path: DataPath[Any]
    job: Job
    part: Part


class NetworkProgram(CopyProgram):
    """Made by `NetworkTransport.prepare`. Its runs take turns; programs run at the same time."""

    def __init__(
        self,
        reads: Sequence[Read],
        bucket_size: int,
        checked: bool,
        device: Device | None,
        path: Path,
        say_once: Callable[[str], None],
        session: Callable[[Address], Session],
        forget: Callable[[tuple[Address, int]], None],
    ) -> None:
        self._session = session
        self._path = path
        self._say_once = say_once
        self._nbytes = sum(read.target.numel() * read.source.dtype.itemsize for read in reads)
        grouped: dict[Address, list[int]] = {}
        for index, read in enumerate(reads):
            check_read(read, device, f"read {index}")
            if read.target.numel():
                grouped.setdefault(read.source.address, []).append(index)
        owners = sorted(grouped.items(), key=lambda item: str(item[0]))
        self._parts = [Part(address, [reads[index] for index in group], group, bucket_size, checked, device) for address, group in owners]
        self._unfinished: frozenset[int] = frozenset()
        self._targets = [read.target for read in reads]  # the parts hold addresses in them
        self._turn = threading.Lock()
        self._lock = threading.Lock()
        self._running: list[_Running] = []
        self._cancelled: TransferCancelledError | None = None
        self._under_way = False
        for part in self._parts:
            weakref.finalize(self, forget, (part.address, part.request.program)).atexit = False

    @property
    def nbytes(self) -> int:
        return self._nbytes

    @property
    def wire_nbytes(self) -> int:
        """Bytes that one run takes over the network: less than `nbytes` where the target's dtype is narrower."""
        return sum(part.wire_nbytes for part in self._parts)

    def introduce(self) -> list[tuple[Session, Layout]]:
        """Have every owner know the program, and its communicator joined if it needs one; nothing where that is so already.

        The sessions, and where what comes on them is put, in the order of the parts. Raises what `NetworkTransport.prepare` does.
        """
        sessions = [self._session(part.address) for part in self._parts]
        futures = [session.prepare(part.request) for session, part in zip(sessions, self._parts, strict=True)]
        introduced = []
        for session, future, part in zip(sessions, futures, self._parts, strict=True):
            answer = future.result()
            if self._path == "nccl":
                part.require(answer)
            elif lacks := part.lacks(answer):
                self._say_once(lacks)
            introduced.append((session, part.lay_out(answer)))
        for session, layout in introduced:
            if layout.rounds is not None:
                session.taker()
        return introduced

    def run(self) -> int:
        """Read every region into its target, and return the bytes of the sources; it has all arrived when this returns.

        Waits as long as every owner lives. Connects again where a connection was lost since the last run. After any
        error the targets may hold a mix of old and new bytes, nothing writes to them any more, and the program can be run again.

        Raises:
            PeerLostError: an owner died, was stopped or cut off, or cannot be reached; the message has its address.
            HandleExpiredError: an owner does not export a tensor any more, or not again after a restart.
            NoTransportError: an owner has another secret, or another version.
            CommunicatorError: NCCL failed, or stood still, between two agents that live.
            IntegrityError: bytes arrived with another checksum than they were sent with; the message says of which tensors.
            TransferCancelledError: `cancel` was called, or the transport was closed.
            TransferError: the transport was closed before.
        """
        with self._turn:
            with self._lock:
                self._under_way, self._cancelled = True, None
            self._unfinished = frozenset(index for part in self._parts for index in part.places)
            try:
                self._fetch(self.introduce())
                self._unfinished = frozenset()
            finally:
                with self._lock:
                    self._under_way, self._running = False, []
        return self._nbytes

    def unfinished(self) -> frozenset[int] | None:
        """As in the interface: all that was read from the owners that were lost, or given up on for their sake."""
        return self._unfinished

    def cancel(self) -> None:
        """End the run under way, if there is one: it raises `TransferCancelledError` once what was asked for has come in.

        From any thread; does not wait.
        """
        with self._lock:
            if not self._under_way:
                return
            self._cancelled = error = TransferCancelledError("the read was cancelled; its targets hold a mix of old and new bytes")
            running = list(self._running)
        for each in running:
            each.path.cancel(each.job, error)

    def _fetch(self, introduced: Sequence[tuple[Session, Layout]]) -> None:
        finished: queue.SimpleQueue[Job] = queue.SimpleQueue()
        running: list[_Running] = []
        for part, (session, layout) in zip(self._parts, introduced, strict=True):
            number = part.request.program
            if layout.buckets:
                fetching = Fetching(number, layout.buckets, finished.put, layout.describe_bucket)
                running.append(_Running(session.streams, fetching, part))
            if layout.rounds is not None:
                taking = Taking(number, layout.rounds, finished.put, layout.describe_message)
                running.append(_Running(session.taker(), taking, part))
        with self._lock:
            if self._cancelled is not None:
                raise self._cancelled
            self._running = running
        for each in running:
            each.path.submit(each.job)
        first: EthaRayError | None = None
        for _ in running:
            error = finished.get().error
            if error is not None and first is None:
                first = error
                for each in running:
                    each.path.cancel(each.job, error)
        if first is not None:
            self._unfinished = frozenset(index for each in running if each.job.error is not None for index in each.part.places)
            raise first

    def __repr__(self) -> str:
        buckets = sum(part.bucket_count for part in self._parts)
        return f"NetworkProgram({self._nbytes} bytes from {len(self._parts)} agents in {buckets} buckets)"
