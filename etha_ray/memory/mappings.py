"""Other processes' GPU memory in this one: each segment is mapped once, for as long as a tensor of it is in use.

A mapping is counted by Python: every storage made of it holds on to it, and it is undone when the last one goes. CUDA maps nothing of this
process into this process: there the exported storage itself is taken (`cuda.place_here`).
"""

from __future__ import annotations

import logging
import os
import threading
import time
import weakref
from collections.abc import Callable, Hashable

import msgspec

from etha_ray.cuda.driver import HANDLE_BYTES, Driver, DriverError, driver
from etha_ray.errors import HandleExpiredError, MemoryHandleError
from etha_ray.memory.cuda import serials
from etha_ray.memory.descriptors import take_descriptor
from etha_ray.memory.handles import INT64_MAX, Chunk, CudaHandle, expired
from etha_ray.processes import is_alive, process_start_time
from etha_ray.shared_files import reserve_descriptors

logger = logging.getLogger(__name__)

_CLOSE_TIMEOUT, _LOOK_EVERY = 2.0, 0.01
_UNREACHABLE = {"CUDA_ERROR_PEER_ACCESS_UNSUPPORTED", "CUDA_ERROR_TOO_MANY_PEERS", "CUDA_ERROR_INVALID_DEVICE"}


class Mapping:
    """A segment of another process, at ``address`` here. ``chunks``: what others may take from here, if it is of such."""

    def __init__(self, address: int, undo: Callable[[], None], chunks: tuple[Chunk, ...] = ()) -> None:
        self.address, self._chunks = address, chunks
        # Not at the interpreter's end: the driver may have gone by then, and takes all down with it.
        weakref.finalize(self, _quietly, undo).atexit = False

    def opened(self, handle: CudaHandle) -> CudaHandle:
        """The handle by which others open from here what ``handle`` is in this segment.

        A worker permits its own agent alone to take its descriptors; other agents of the host take them from that one.
        """
        if not self._chunks:
            return handle
        pid = os.getpid()
        return msgspec.structs.replace(handle, pid=pid, start_time=process_start_time(pid) or 0.0, chunks=self._chunks)


_lock = threading.Lock()
_mappings: weakref.WeakValueDictionary[Hashable, Mapping] = weakref.WeakValueDictionary()


def mapped(handle: CudaHandle, ordinal: int, name: str) -> Mapping:
    """The segment of ``handle``, mapped for GPU ``ordinal`` of this process.

    Raises:
        HandleExpiredError: its owner is gone.
        MemoryHandleError: the handle is corrupt, or CUDA or the kernel refused.
    """
    check(handle, name)
    key = (ordinal, handle.pid, handle.start_time, handle.base, handle.size, handle.buffer, handle.ipc, handle.chunks)
    with _lock:
        found = _mappings.get(key)
        if found is None:
            try:
                cuda = driver()
                with cuda.current(ordinal):
                    found = (_allocation if handle.ipc else _chunks)(cuda, handle, ordinal, name)
            except DriverError as error:
                raise _translated(error, handle, ordinal, name) from error
            _mappings[key] = found
        return found


def check(handle: CudaHandle, name: str) -> None:
    """Raise `MemoryHandleError` unless the storage lies in the segment, and the segment is described in one way."""
    fits = 0 < handle.size <= INT64_MAX and handle.data_offset >= 0 and handle.data_offset + handle.nbytes <= handle.size
    if handle.chunks:
        whole = sum(chunk.size for chunk in handle.chunks) == handle.size and all(map(_is_chunk, handle.chunks))
        fits = fits and not handle.ipc and whole
    else:
        fits = fits and len(handle.ipc) == HANDLE_BYTES
    if not fits:
        raise MemoryHandleError(
            f"{name}: {handle.nbytes} bytes at {handle.data_offset} of a segment of {handle.size}, which {len(handle.ipc)} bytes of an IPC"
            f" handle and {len(handle.chunks)} chunks open: the handle is corrupt"
        )


def _is_chunk(chunk: Chunk) -> bool:
    described = len(chunk.fabric) == HANDLE_BYTES if chunk.fd == -1 else 0 <= chunk.fd < 2**31 and not chunk.fabric
    return 0 < chunk.size <= INT64_MAX and described


def _allocation(cuda: Driver, handle: CudaHandle, ordinal: int, name: str) -> Mapping:
    address = _ipc_opened(cuda, handle.ipc)

    def undo() -> None:
        with cuda.current(ordinal):
            cuda.ipc_close(address)

    try:
        base, size = cuda.range_of(address)
        if address + handle.size > base + size:
            raise MemoryHandleError(f"{name}: {handle.size} bytes are said to be in an allocation of {size}; the handle is corrupt")
    except BaseException:
        _quietly(undo)
        raise
    return Mapping(address, undo)


def _ipc_opened(cuda: Driver, handle: bytes) -> int:
    """The address of an allocation. Where its owner had another one that is still mapped here, by a batch that is being closed, CUDA
    says so; that is waited for."""
    deadline = time.monotonic() + _CLOSE_TIMEOUT
    while True:
        try:
            return cuda.ipc_open(handle)
        except DriverError as error:
            if error.name != "CUDA_ERROR_ALREADY_MAPPED" or time.monotonic() > deadline:
                raise
        time.sleep(_LOOK_EVERY)


def _chunks(cuda: Driver, handle: CudaHandle, ordinal: int, name: str) -> Mapping:
    if (room := reserve_descriptors(len(handle.chunks))) < len(handle.chunks):
        raise MemoryHandleError(
            f"{name}: {len(handle.chunks)} chunks need a descriptor each, and there is room for {room}: raise `ulimit -n`"
        )
    base = cuda.reserve(handle.size)
    done: list[tuple[int, int]] = []
    fds: list[int] = []
    copies: list[Chunk] = []

    def undo() -> None:
        for fd in fds:
            os.close(fd)
        with cuda.current(ordinal):
            for at, size in done:
                cuda.unmap(at, size)
            cuda.unreserve(base, handle.size)

    try:
        at = base
        for part in handle.chunks:
            if part.fd == -1:
                chunk = cuda.import_fabric(part.fabric)
            else:
                fds.append(take_descriptor(handle.pid, handle.start_time, part.fd, name))
                chunk = cuda.import_fd(fds[-1])
            copies.append(Chunk(part.size, next(serials), -1 if part.fd == -1 else fds[-1], part.fabric))
            try:
                cuda.map(at, part.size, chunk)
            finally:
                cuda.release(chunk)
            done.append((at, part.size))
            at += part.size
        cuda.allow(base, handle.size, ordinal)
    except BaseException:
        _quietly(undo)
        raise
    return Mapping(base, undo, tuple(copies))


def _quietly(undo: Callable[[], None]) -> None:
    """Nobody waits for this, and what CUDA does not give back now it gives back with the process."""
    try:
        undo()
    except DriverError as error:
        logger.warning("memory of another process could not be unmapped: %s", error)


def _translated(error: DriverError, handle: CudaHandle, ordinal: int, name: str) -> MemoryHandleError:
    if not is_alive(handle.pid, handle.start_time):
        return HandleExpiredError(expired(handle, name, f"that process is gone; {error}"))
    what = f"{name}: {handle.size} bytes of process {handle.pid} on {handle.gpu} cannot be mapped for cuda:{ordinal} ({error})"
    if error.name in _UNREACHABLE:
        return MemoryHandleError(f"{what}: the two GPUs have no peer access to one another (`nvidia-smi topo -p2p r` shows it)")
    return MemoryHandleError(f"{what}: that process has freed them, or the handle is corrupt: register the batch again")
