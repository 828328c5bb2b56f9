"""Opening: tensors laid out in the memory that handles name."""

from __future__ import annotations

import os
from collections.abc import Hashable, Sequence

import torch

from etha_ray.cuda import arrays
from etha_ray.errors import HandleExpiredError, WrongDeviceError
from etha_ray.memory.cuda import place_here
from etha_ray.memory.handles import CudaHandle, SharedHandle, TensorHandle, checked_dtype, expired, laid_out, names_of
from etha_ray.memory.mappings import Mapping, check, mapped
from etha_ray.memory.shared import map_storage
from etha_ray.processes import process_start_time
from etha_ray.shared_files import check_mapping_room


class OpenedTensors:
    """What `open_tensors` mapped: ``tensors`` in the order of the handles, backed by the owner's memory.

    ``handles`` are those by which others open the same, for as long as this is open: the owner's, or this process's where it has copies
    of descriptors that the owner gives to nobody else. After `close` no tensor taken from here may be used.
    """

    def __init__(self, tensors: Sequence[torch.Tensor], nbytes: int, handles: Sequence[TensorHandle]) -> None:
        self.tensors = list(tensors)
        self.handles = list(handles)
        self.nbytes = nbytes
        """Bytes of all distinct storages."""

    def close(self) -> None:
        """Drop the tensors; their memory is unmapped once nobody else holds one. May be called twice."""
        self.tensors.clear()

    def __repr__(self) -> str:
        return f"OpenedTensors({len(self.tensors)} tensors, {self.nbytes} bytes)"


def open_tensors(handles: Sequence[TensorHandle], labels: Sequence[str] | None = None, gpu: int | None = None) -> OpenedTensors:
    """Map the memory that ``handles`` name and lay the tensors out in it; each distinct storage is mapped once.

    No byte is copied, and no descriptor stays open but those of expandable segments. Works in the exporting process too. A handle is
    another process's word: everything it says is checked, so a wrong one raises and never reads outside the memory it names. The
    mapping outlives the owner: once open, the tensors stay readable when it dies.

    Args:
        handles: what the owner's `export_tensors` returned.
        labels: a name for each tensor, for error messages; by default its position.
        gpu: which GPU of this process is to use memory of GPUs, its own or, by peer access, others'; their tensors are on it then. None
            if it has none.

    Raises:
        HandleExpiredError: the owner is gone, has freed the memory, or is in another container.
        WrongDeviceError: memory of a GPU, and this process has none.
        MemoryHandleError: a handle does not fit its memory, or the system refused (permissions, too many mappings, no peer access).
    """
    names = names_of(labels, len(handles))
    storages: dict[Hashable, torch.UntypedStorage] = {}
    check_mapping_room(len({(handle.device, handle.inode) for handle in handles if isinstance(handle, SharedHandle)}))
    alive: dict[int, float | None] = {}
    mappings: dict[Hashable, Mapping | None] = {}
    tensors, theirs = [], []
    for handle, name in zip(handles, names, strict=True):
        dtype = checked_dtype(handle, name)
        key = _key(handle)
        if key not in storages:
            if handle.nbytes and handle.pid not in alive:
                alive[handle.pid] = process_start_time(handle.pid)
            if handle.nbytes and alive[handle.pid] != handle.start_time:
                raise HandleExpiredError(expired(handle, name, "that process is gone"))
            if isinstance(handle, CudaHandle):
                storages[key], mappings[key] = _cuda_storage(handle, gpu, name)
            else:
                storages[key] = _cpu_storage(handle, name)
        tensors.append(laid_out(storages[key], dtype, handle, name))
        mapping = mappings.get(key)
        theirs.append(mapping.opened(handle) if mapping is not None and isinstance(handle, CudaHandle) else handle)
    return OpenedTensors(tensors, sum(storage.nbytes() for storage in storages.values()), theirs)


def _key(handle: TensorHandle) -> Hashable:
    """What handles of one storage have in common."""
    if handle.nbytes == 0:
        return handle.kind
    if isinstance(handle, CudaHandle):
        return handle.pid, handle.base, handle.size, handle.buffer, handle.ipc, handle.chunks, handle.data_offset, handle.nbytes
    return handle.device, handle.inode, handle.data_offset, handle.nbytes


def _cpu_storage(handle: SharedHandle, name: str) -> torch.UntypedStorage:
    return map_storage(handle, name) if handle.nbytes else torch.empty(0).untyped_storage()


def _cuda_storage(handle: CudaHandle, gpu: int | None, name: str) -> tuple[torch.UntypedStorage, Mapping | None]:
    """The storage, and the mapping that it is in; none of what this process exported itself."""
    if gpu is None:
        raise WrongDeviceError(
            f"{name} is in memory of a GPU ({handle.gpu}), which an agent without one cannot open: start an agent on a GPU of that host"
            " for it, or register CPU tensors on both sides"
        )
    if not handle.nbytes:
        return arrays.storage_at(0, 0, gpu, None), None
    check(handle, name)
    if handle.pid == os.getpid():
        place = place_here(handle.base + handle.data_offset, handle.nbytes)
        if place is not None:
            return arrays.storage_at(handle.base + handle.data_offset, handle.nbytes, place.ordinal, place), None
        if not handle.chunks:  # of another process's chunks this one may have the descriptors
            raise HandleExpiredError(expired(handle, name, "closed"))
    mapping = mapped(handle, gpu, name)
    return arrays.storage_at(mapping.address + handle.data_offset, handle.nbytes, gpu, mapping), mapping
