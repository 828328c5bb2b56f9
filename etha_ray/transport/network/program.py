"""What is to be read, and a program that reads it: prepared once, run any number of times."""

from __future__ import annotations

import itertools
import queue
import threading
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from etha_ray.dtypes import DTYPES
from etha_ray.errors import EthaRayError, TransferCancelledError, WrongDeviceError
from etha_ray.net import Address
from etha_ray.transport.base import Copy, CopyProgram, check_copy
from etha_ray.transport.buckets import Member, Region, cut_into_buckets
from etha_ray.transport.network import wire
from etha_ray.transport.network.runs import BucketMemory, lay_out
from etha_ray.transport.network.session import Fetching, Session

_numbers = itertools.count(1)
_SHOWN = 3


@dataclass(frozen=True, slots=True)
class RemoteRegion:
    """A box of a tensor that another agent exported."""

    address: Address
    """Of the owner's server."""
    export: str
    index: int
    """Of the tensor among the export's."""
    start: tuple[int, ...]
    size: tuple[int, ...]
    """Per dimension."""
    dtype: torch.dtype
    """The tensor's."""


@dataclass(frozen=True, slots=True)
class Read:
    """A target and where its values come from. Where the dtypes differ the values are cast, as ``Tensor.copy_`` does."""

    source: RemoteRegion
    target: torch.Tensor
    """On the CPU, of the region's size, of any strides."""
    name: str = ""
    """What errors call it."""


@dataclass(frozen=True)
class _Part:
    """What comes from one owner."""

    address: Address
    request: wire.Prepare
    buckets: list[BucketMemory]
    reads: list[int]
    names: list[str]

    def describe(self, number: int) -> str:
        """What the bucket of this number has of which tensors."""
        regions = self.request.regions
        cut = cut_into_buckets([Region(each.size, DTYPES[each.wire].itemsize) for each in regions], self.request.bucket_size)
        shown = [self._show(member) for member in cut[number].members]
        more = f" and {len(shown) - _SHOWN} more" if len(shown) > _SHOWN else ""
        return "; ".join(shown[:_SHOWN]) + more

    def _show(self, member: Member) -> str:
        region, name = self.request.regions[member.region], self.names[member.region]
        start = [first + within for first, within in zip(region.start, member.start, strict=True)]
        return (
            f"{name or f'tensor {region.index} of export {region.export!r}'}, {list(member.size)} elements from {start} on of the sender's"
        )


class NetworkProgram(CopyProgram):
    """Made by `NetworkTransport.prepare`. Its runs take turns; programs run at the same time."""

    def __init__(
        self,
        reads: Sequence[Read],
        bucket_size: int,
        checked: bool,
        session: Callable[[Address], Session],
        forget: Callable[[tuple[Address, int]], None],
    ) -> None:
        self._session = session
        self._nbytes = sum(read.target.numel() * read.source.dtype.itemsize for read in reads)
        grouped: dict[Address, list[int]] = {}
        for index, read in enumerate(reads):
            _check(read, f"read {index}")
            if read.target.numel():
                grouped.setdefault(read.source.address, []).append(index)
        owners = sorted(grouped.items(), key=lambda item: str(item[0]))
        self._parts = [_part(address, [reads[index] for index in group], group, bucket_size, checked) for address, group in owners]
        self._unfinished: frozenset[int] = frozenset()
        self._targets = [read.target for read in reads]  # the parts hold addresses in them
        self._turn = threading.Lock()
        self._lock = threading.Lock()
        self._running: list[tuple[Session, Fetching]] = []
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
        return sum(bucket.nbytes for part in self._parts for bucket in part.buckets)

    def introduce(self) -> list[Session]:
        """Have every owner know the program; nothing where they do already. The sessions, in the order of the parts.

        Raises what `NetworkTransport.prepare` does.
        """
        sessions = [self._session(part.address) for part in self._parts]
        futures = [session.prepare(part.request) for session, part in zip(sessions, self._parts, strict=True)]
        for future in futures:
            future.result()
        return sessions

    def run(self) -> int:
        """Read every region into its target, and return the bytes of the sources; it has all arrived when this returns.

        Waits as long as every owner lives. Connects again where a connection was lost since the last run. After any
        error the targets may hold a mix of old and new bytes, nothing writes to them any more, and the program can be run again.

        Raises:
            PeerLostError: an owner died, was stopped or cut off, or cannot be reached; the message has its address.
            HandleExpiredError: an owner does not export a tensor any more, or not again after a restart.
            NoTransportError: an owner has another secret, or another version.
            IntegrityError: bytes arrived with another checksum than they were sent with; the message says of which tensors.
            TransferCancelledError: `cancel` was called, or the transport was closed.
            TransferError: the transport was closed before.
        """
        with self._turn:
            with self._lock:
                self._under_way, self._cancelled = True, None
            self._unfinished = frozenset(index for part in self._parts for index in part.reads)
            try:
                sessions = self.introduce()
                self._fetch(sessions)
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
        for session, fetching in running:
            session.cancel(fetching, error)

    def _fetch(self, sessions: Sequence[Session]) -> None:
        finished: queue.SimpleQueue[Fetching] = queue.SimpleQueue()
        running = [
            (session, Fetching(part.request.program, part.buckets, finished.put, part.describe))
            for session, part in zip(sessions, self._parts, strict=True)
        ]
        with self._lock:
            if self._cancelled is not None:
                raise self._cancelled
            self._running = running
        for session, fetching in running:
            session.submit(fetching)
        first: EthaRayError | None = None
        for _ in running:
            error = finished.get().error
            if error is not None and first is None:
                first = error
                for session, fetching in running:
                    session.cancel(fetching, error)
        if first is not None:
            failed = (part for part, (_, fetching) in zip(self._parts, running, strict=True) if fetching.error is not None)
            self._unfinished = frozenset(index for part in failed for index in part.reads)
            raise first

    def __repr__(self) -> str:
        buckets = sum(len(part.buckets) for part in self._parts)
        return f"NetworkProgram({self._nbytes} bytes from {len(self._parts)} agents in {buckets} buckets)"


def _check(read: Read, name: str) -> None:
    source, target = read.source, read.target
    if target.device.type != "cpu":
        raise WrongDeviceError(f"{name}: a {target.device} target on the network transport, which moves cpu tensors")
    # What holds for a copy holds here, of a source without memory.
    check_copy(Copy((torch.empty(source.size, dtype=source.dtype, device="meta"),), target), name)


def _part(address: Address, reads: Sequence[Read], places: list[int], bucket_size: int, checked: bool) -> _Part:
    dtypes = [wire.wire_dtype(read.source.dtype, read.target.dtype) for read in reads]
    regions = [
        wire.WireRegion(s.export, s.index, s.start, s.size, wire.dtype_name(s.dtype), wire.dtype_name(dtype))
        for s, dtype in zip((read.source for read in reads), dtypes, strict=True)
    ]
    views = [read.target.detach() for read in reads]
    cut = cut_into_buckets([Region(tuple(view.shape), dtype.itemsize) for view, dtype in zip(views, dtypes, strict=True)], bucket_size)
    buckets = [lay_out(bucket, views, dtypes, checked=checked) for bucket in cut]
    return _Part(address, wire.Prepare(next(_numbers), bucket_size, regions, checked), buckets, places, [read.name for read in reads])
