"""Where a GPU's memory is: the allocation, or the chunks, that a storage lies in.

What cudaMalloc gave is opened by a CUDA IPC handle of the whole allocation. Where torch's ``expandable_segments`` are on, memory is
mapped in chunks, side by side, of which each is opened by a descriptor (or a fabric handle, on systems that have such). Descriptors are
numbers of this process, kept open for as long as what lies there is exported; others take copies (`descriptors`).
"""

from __future__ import annotations

import itertools
import os
import threading
import weakref
from typing import Any

import torch

from etha_ray.cuda.driver import Driver, DriverError, driver
from etha_ray.errors import MemoryHandleError, NotShareableError
from etha_ray.memory.handles import Chunk
from etha_ray.shared_files import reserve_descriptors

_NO_IPC = (
    "was allocated in a way that no other process can open (cudaMallocAsync, or a pool of its own): take backend:cudaMallocAsync out of"
    " PYTORCH_CUDA_ALLOC_CONF, or register a .clone() that torch allocates by itself"
)
_NOT_EXPORTED = (
    "is in an expandable segment that was made without handles for other processes: unset TORCH_CUDA_EXPANDABLE_SEGMENTS_IPC, or have"
    " TORCH_CUDA_EXPANDABLE_SEGMENTS_IPC=1 before this process first uses CUDA, or take expandable_segments out of PYTORCH_CUDA_ALLOC_CONF"
    " (an allocator with a sleep mode has a pool of its own: register a tensor from outside of it)"
)


class CudaPlace:
    """Where one storage is. Keeps it, and the descriptors of its chunks, for as long as this lives."""

    def __init__(self, storage: torch.UntypedStorage, ordinal: int, segment: Segment) -> None:
        self.storage, self.ordinal, self._segment = storage, ordinal, segment

    def fields(self) -> dict[str, Any]:
        """Those of a `CudaHandle` that say where it is."""
        segment = self._segment
        return {
            "gpu": segment.gpu,
            "base": segment.base,
            "size": segment.size,
            "buffer": segment.buffer,
            "ipc": segment.ipc,
            "chunks": tuple(exported.chunk for exported in segment.exported),
            "data_offset": self.storage.data_ptr() - segment.base if self.storage.nbytes() else 0,
        }


class Segment:
    """What others map whole: one allocation, with its IPC handle, or chunks side by side."""

    def __init__(self, gpu: str, base: int, size: int, buffer: int = 0, ipc: bytes = b"", exported: tuple[ExportedChunk, ...] = ()) -> None:
        self.gpu, self.base, self.size, self.buffer, self.ipc, self.exported = gpu, base, size, buffer, ipc, exported


class ExportedChunk:
    """A chunk that others can open; its descriptor is closed with this."""

    def __init__(self, chunk: Chunk) -> None:
        self.chunk = chunk
        if chunk.fd >= 0:
            weakref.finalize(self, os.close, chunk.fd)


_lock = threading.RLock()
serials = itertools.count(1)
"""Of all chunks that this process ever exported, its own and those of others."""
# A chunk stays where it is while something in it is exported, so its address names it for that long.
_chunks: weakref.WeakValueDictionary[tuple[int, int], ExportedChunk] = weakref.WeakValueDictionary()
_places: weakref.WeakValueDictionary[tuple[int, int], CudaPlace] = weakref.WeakValueDictionary()


def place_storages(storages: dict[int, torch.UntypedStorage], ordinal: int, owners: dict[int, str]) -> dict[int, CudaPlace]:
    """Find out where storages on a GPU of this process are. Keyed by the caller, who also says what messages call each.

    Raises:
        NotShareableError: their memory cannot be opened by others.
        MemoryHandleError: the driver refused, or descriptors are too few.
    """
    found: dict[int, CudaPlace] = {}
    name = next(iter(owners.values()), "")
    try:
        cuda = driver()
        gpu = cuda.uuid(ordinal)
        with _lock, cuda.current(ordinal):
            ranges = {}
            for key, storage in storages.items():
                name = owners[key]
                ranges[key] = _ranges(cuda, storage)
            every = {each for lying in ranges.values() for each in lying}
            _reserve_descriptors(sum(each not in _chunks and not cuda.is_ipc_capable(each[0]) for each in every))
            allocations: dict[int, Segment] = {}
            for key, storage in storages.items():
                name = owners[key]
                where = storage.data_ptr(), storage.nbytes()
                place = _places.get(where)
                if place is None:
                    place = CudaPlace(storage, ordinal, _segment(cuda, gpu, ranges[key], allocations, name))
                    if storage.nbytes():
                        _places[where] = place
                found[key] = place
    except DriverError as error:
        raise MemoryHandleError(f"{name}: CUDA's driver does not say where it is ({error})") from error
    return found


def place_here(address: int, nbytes: int) -> CudaPlace | None:
    """Where a storage of this process is that it exports now; None if it does not."""
    with _lock:
        return _places.get((address, nbytes))


def _ranges(cuda: Driver, storage: torch.UntypedStorage) -> list[tuple[int, int]]:
    """Address and bytes of all allocations, or chunks, that a storage lies in."""
    at, end = storage.data_ptr(), storage.data_ptr() + storage.nbytes()
    found = []
    while at < end:
        base, size = cuda.range_of(at)
        found.append((base, size))
        at = base + size
    return found


def _segment(cuda: Driver, gpu: str, ranges: list[tuple[int, int]], allocations: dict[int, Segment], name: str) -> Segment:
    if not ranges:
        return Segment(gpu, 0, 0)
    base, size = ranges[0]
    if not cuda.is_ipc_capable(base):
        exported = tuple(_exported(cuda, *each, name) for each in ranges)
        return Segment(gpu, base, sum(chunk.chunk.size for chunk in exported), exported=exported)
    if len(ranges) > 1:
        raise MemoryHandleError(f"{name} lies across {len(ranges)} allocations of CUDA; register a .clone() instead")
    if base not in allocations:
        allocations[base] = Segment(gpu, base, size, cuda.buffer_id(base), cuda.ipc_handle(base))
    return allocations[base]


def _exported(cuda: Driver, base: int, size: int, name: str) -> ExportedChunk:
    found = _chunks.get((base, size))
    if found is not None:
        return found
    try:
        chunk = cuda.chunk_at(base)
    except DriverError as error:
        raise NotShareableError(f"{name} {_NO_IPC} ({error})") from error
    try:
        try:
            fd, fabric = cuda.export_fd(chunk), b""
            os.set_inheritable(fd, False)
        except DriverError:
            fd, fabric = -1, cuda.export_fabric(chunk)
    except DriverError as error:
        raise NotShareableError(f"{name} {_NOT_EXPORTED} ({error})") from error
    finally:
        cuda.release(chunk)
    _chunks[base, size] = found = ExportedChunk(Chunk(size, next(serials), fd, fabric))
    return found


def _reserve_descriptors(chunks: int) -> None:
    if chunks and (room := reserve_descriptors(chunks)) < chunks:
        raise MemoryHandleError(
            f"{chunks} chunks of expandable segments need a descriptor each, and there is room for {room}: raise `ulimit -n`, or take"
            " expandable_segments out of PYTORCH_CUDA_ALLOC_CONF"
        )
