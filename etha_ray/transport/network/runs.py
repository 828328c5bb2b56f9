"""A bucket as it lies in this process's memory: a list of (address, length), moved by `sendmsg` and `recvmsg` of libc.

A tensor's row-major elements are runs of consecutive bytes. Runs of `_MIN_RUN` bytes and more are handed to the kernel where
they lie, a thousand in one call, so they are copied once on each side and not by us. Shorter ones, and what is cast, go
through staging memory: packed before sending, unpacked after receiving. So does all that is in a device's memory.

Python's own `socket.sendmsg` would need an object for each run, for as long as the program lives; here it is 16 bytes.

A checksum is of a bucket's bytes in the order in which they travel. XXH3 was chosen by measurement: from memory it takes 0.3 ms for
8 MiB, a third of what XXH64 takes and a seventh of CRC-32. Python pays 1 us for each piece of memory, so short runs are
gathered first.
"""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias, cast

import numpy as np
import torch
import xxhash

from etha_ray.net import Connection
from etha_ray.transport.base import Copy, OneSidedTransport
from etha_ray.transport.buckets import Bucket, Member, boxes
from etha_ray.transport.cutting import as_bits
from etha_ray.transport.network.device import Device

Runs: TypeAlias = "np.ndarray[Any, np.dtype[np.uintp]]"
"""(n, 2): address and bytes, as C's ``struct iovec``."""

Memory: TypeAlias = "np.ndarray[Any, Any]"

_MIN_RUN = 512
_GATHERED_BYTES = 256 << 10  # stays in the cache until it is summed
_MAX_IOV = 1024
_MSG_WAITALL = 0x100
_MSG_NOSIGNAL = 0x4000


class _Message(ctypes.Structure):
    """C's ``struct msghdr``."""

    _fields_ = (
        ("name", ctypes.c_void_p),
        ("name_length", ctypes.c_uint32),
        ("iov", ctypes.c_void_p),
        ("iov_length", ctypes.c_size_t),
        ("control", ctypes.c_void_p),
        ("control_length", ctypes.c_size_t),
        ("flags", ctypes.c_int),
    )


_libc = ctypes.CDLL(None, use_errno=True)  # lets go of the GIL during a call
for _call in (_libc.sendmsg, _libc.recvmsg):
    _call.argtypes = (ctypes.c_int, ctypes.POINTER(_Message), ctypes.c_int)
    _call.restype = ctypes.c_ssize_t


@dataclass(frozen=True, slots=True)
class Staged:
    """A member that goes through staging memory."""

    offset: int
    """Bytes into the staging memory, a multiple of the wire's itemsize."""
    view: torch.Tensor
    dtype: torch.dtype
    """What it is on the wire."""

    @property
    def nbytes(self) -> int:
        """Bytes in the staging memory and on the wire."""
        return self.view.numel() * self.dtype.itemsize

    def within(self, staging: torch.Tensor) -> torch.Tensor:
        """Its place in the staging memory."""
        return staging[self.offset : self.offset + self.nbytes].view(self.dtype).view(self.view.shape)


@dataclass(frozen=True, slots=True)
class BucketMemory:
    """One bucket on one side. Who has it must keep the tensors: it holds addresses."""

    nbytes: int
    runs: Runs
    staged: tuple[Staged, ...]
    slots: tuple[tuple[int, int], ...]
    """Which runs are staging memory, and where in it they begin."""
    summed: tuple[Memory | slice, ...] | None
    """What its checksum is made of, in this order: memory of tensors, and parts of the staging memory. None where it is not checked."""

    @property
    def staging_nbytes(self) -> int:
        """Bytes of staging memory: never more than the bucket's own."""
        return sum(staged.nbytes for staged in self.staged)

    def placed(self, staging: torch.Tensor | None) -> Runs:
        """The runs, to be used up: those that are staged lie in ``staging``."""
        runs = self.runs.copy()
        if staging is not None:
            start = staging.data_ptr()
            for slot, offset in self.slots:
                runs[slot, 0] = start + offset
        return runs

    def checksum(self, staging: torch.Tensor | None) -> int | None:
        """XXH3 of its bytes, of which those that are staged lie in ``staging``; None where it is not checked."""
        if self.summed is None:
            return None
        total = xxhash.xxh3_64()
        for part in self.summed:
            if isinstance(part, slice):
                assert staging is not None
                total.update(cast(Any, staging[part].numpy()))
            else:
                total.update(cast(Any, np.ascontiguousarray(part)))
        return total.intdigest()

    def pack(self, copier: OneSidedTransport, staging: torch.Tensor) -> None:
        """Fill the staging memory from the tensors."""
        copier.prepare([Copy((staged.view,), staged.within(staging)) for staged in self.staged]).run()

    def unpack(self, copier: OneSidedTransport, staging: torch.Tensor) -> None:
        """Fill the tensors from the staging memory."""
        copier.prepare([Copy((staged.within(staging),), staged.view) for staged in self.staged]).run()


def lay_out(
    bucket: Bucket, views: Sequence[torch.Tensor], wire: Sequence[torch.dtype], device: Device | None, *, checked: bool
) -> BucketMemory:
    """``bucket`` in the memory of ``views``, which are the regions it was cut from, where ``wire`` are the dtypes that travel.

    What ``device`` holds is always staged: the kernel cannot reach it.
    """
    summed: list[Memory | slice] = []
    parts: list[Runs] = []
    staged: list[Staged] = []
    slots: list[tuple[int, int]] = []
    count = filled = 0
    after_staged = False
    for member in bucket.members:
        view = narrowed(views[member.region], member)
        far = device is not None and device.holds(view)
        runs = _runs(view) if view.dtype == wire[member.region] and not far else None
        if runs is not None:
            after_staged = False
            parts.append(runs)
            count += len(runs)
            if checked:
                summed += _pieces(view)
            continue
        # Members come widest first, so one after the other each is aligned to its itemsize. Neighbours are one run.
        staged.append(Staged(filled, view, wire[member.region]))
        if after_staged:
            parts[-1][0, 1] += np.uintp(member.nbytes)
        else:
            slots.append((count, filled))
            parts.append(np.array([(0, member.nbytes)], dtype=np.uintp))
            count += 1
        summed.append(slice(filled, filled + member.nbytes))
        filled += member.nbytes
        after_staged = True
    return BucketMemory(bucket.nbytes, np.concatenate(parts), tuple(staged), tuple(slots), tuple(summed) if checked else None)


def send_runs(connection: Connection, runs: Runs) -> None:
    """Send all bytes of ``runs``, which is used up. Raises `PeerLostError`."""
    _move(_libc.sendmsg, _MSG_NOSIGNAL, connection, runs)


def receive_runs(connection: Connection, runs: Runs) -> None:
    """Fill ``runs``, which is used up, with the next bytes. Raises `PeerLostError`."""
    _move(_libc.recvmsg, _MSG_WAITALL, connection, runs)


def _move(call: Callable[..., int], flags: int, connection: Connection, runs: Runs) -> None:
    descriptor, start, done = connection.socket.fileno(), runs.ctypes.data, 0
    message = _Message()
    while done < len(runs):
        message.iov, message.iov_length = start + done * runs.itemsize * 2, min(_MAX_IOV, len(runs) - done)
        count = call(descriptor, ctypes.byref(message), flags)
        if count < 0:
            if (code := ctypes.get_errno()) == errno.EINTR:
                continue
            raise connection.lost(os.strerror(code))
        if not count:
            raise connection.lost("it closed the connection")
        ends = np.cumsum(runs[done : done + _MAX_IOV, 1])
        moved = int(np.searchsorted(ends, count, side="right"))
        if moved < len(ends):  # a part of this one
            part = count - (int(ends[moved - 1]) if moved else 0)
            runs[done + moved] += np.array((part, 0), dtype=np.uintp)
            runs[done + moved, 1] -= np.uintp(part)
        done += moved


def narrowed(view: torch.Tensor, member: Member) -> torch.Tensor:
    """The member, of the view of its region."""
    return view if tuple(view.shape) == member.size else _box(view, member.start, member.size)


def _box(view: torch.Tensor, start: Sequence[int], size: Sequence[int]) -> torch.Tensor:
    return view[tuple(slice(first, first + count) for first, count in zip(start, size, strict=True))]


def _pieces(view: torch.Tensor) -> list[Memory]:
    """The view in pieces of consecutive elements, in row-major order."""
    if view.is_contiguous():
        return [as_bits(view).reshape(-1).numpy()]
    cut = boxes(tuple(view.shape), _GATHERED_BYTES // view.itemsize)
    return [as_bits(_box(view, start, size)).numpy() for start, size in cut]


def _runs(view: torch.Tensor) -> Runs | None:
    """The runs of a view's elements in row-major order; None if they are short."""
    run = view.itemsize
    dims = [(size, step * view.itemsize) for size, step in zip(view.shape, view.stride(), strict=True) if size > 1]
    while dims and dims[-1][1] == run:
        run *= dims.pop()[0]
    if not dims:
        return np.array([(view.data_ptr(), run)], dtype=np.uintp)
    if run < _MIN_RUN:
        return None
    addresses = np.array([view.data_ptr()], dtype=np.uintp)
    for size, step in dims:
        addresses = (addresses[:, None] + np.arange(size, dtype=np.uintp) * np.uintp(step)).reshape(-1)
    return np.stack((addresses, np.full_like(addresses, run)), axis=1)
