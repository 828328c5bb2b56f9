"""Tensor memory that another process of this host can open: export in the worker, open in the agent.

A worker's CPU tensor usually lives in its private heap. `export_tensors` moves its storage into shared memory *in place*
(the same ``StorageImpl``, so views, parameters and optimizer references stay valid) and describes it with a
`TensorHandle`; no bytes travel. `open_tensors` maps the same pages in the agent.

Nothing is left in ``/dev/shm`` by a killed process: the shared files are unlinked as soon as they are made and live on as
long as a descriptor or a mapping does. A handle therefore names the owner's descriptor (``/proc/<pid>/fd/<fd>``). Where
the descriptor limit cannot hold one descriptor a storage, the storages over it get a name in ``/dev/shm`` that torch's own
shared-memory manager unlinks, also after a crash.

Threads: the functions may be called from any thread; exports of one process run one after another. Nobody may write to
a tensor while it is being exported (its bytes are being copied to their new place).

Fork: a child made by ``fork`` shares the exported memory with its parent, so writing a weight there writes it in both; and
handles name the process that exported them, so they expire with the parent.
"""

from __future__ import annotations

import ctypes
import math
import os
import stat
import sys
import threading
from collections.abc import Sequence
from typing import cast

import msgspec
import torch

from etha_ray.decoding import Decoder
from etha_ray.errors import HandleExpiredError, MemoryHandleError, NotShareableError, WrongDeviceError
from etha_ray.processes import process_start_time
from etha_ray.shared_files import (
    OPENABLE_PATH,
    SharedFile,
    SharedMappings,
    check_mapping_room,
    check_room,
    remove_unfinished,
    reserve_descriptors,
    share_by_descriptor,
    share_by_name,
    translated,
)

_DTYPES = {str(v).removeprefix("torch."): v for v in vars(torch).values() if isinstance(v, torch.dtype) and "q" not in str(v)}
_INT64_MAX = 2**63 - 1
_MADV_POPULATE_READ = 22
_libc = ctypes.CDLL(None)
_libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_export_lock = threading.Lock()


class TensorHandle(msgspec.Struct, frozen=True, array_like=True, tag_field="kind", tag="shm"):
    """Where a tensor's memory is and how the tensor lies in it: all that another process needs to open it.

    ``path`` is empty when the storage has no bytes. Several handles may name the same file.
    """

    pid: int
    """The process that owns the memory."""
    start_time: float
    """When that process started, in seconds since boot: tells it from a later one with the same pid."""
    path: str
    """What to open: ``/proc/<pid>/fd/<fd>``, or a name in ``/dev/shm``."""
    device: int
    """``st_dev`` of the file; with ``inode`` it tells when a descriptor number has been reused."""
    inode: int
    data_offset: int
    """Bytes from the start of the file to the storage's first byte."""
    nbytes: int
    """Bytes of the whole storage."""
    dtype: str
    """As in ``torch.<dtype>``: ``"bfloat16"``."""
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    """In elements, never negative."""
    storage_offset: int
    """In elements, from the storage's first byte."""

    @property
    def kind(self) -> str:
        """What sort of memory this is: ``"shm"``, shared memory of the host."""
        return "shm"


_encoder = msgspec.msgpack.Encoder()
_decoder = Decoder(TensorHandle)


def encode_handle(handle: TensorHandle) -> bytes:
    """The handle as msgpack; `TensorHandle` may as well be a field of a larger msgspec struct."""
    return _encoder.encode(handle)


def decode_handle(data: bytes) -> TensorHandle:
    """The handle that `encode_handle` made.

    Raises:
        MemoryHandleError: ``data`` is not a handle.
    """
    try:
        return _decoder.decode(data)
    except msgspec.DecodeError as error:
        raise MemoryHandleError(f"not a tensor handle ({error}); both sides must run the same etha_ray version") from error


class ExportedTensors:
    """What `export_tensors` shared: the handles, in the order of the tensors, and the memory they name.

    The memory stays alive until `close` (or until this object is collected) and for as long as a tensor uses it.
    """

    def __init__(self, handles: Sequence[TensorHandle], storages: Sequence[torch.UntypedStorage]) -> None:
        self.handles = list(handles)
        self._storages = list(storages)

    @property
    def nbytes(self) -> int:
        """Bytes of all distinct storages."""
        return sum(storage.nbytes() for storage in self._storages)

    def close(self) -> None:
        """Let go of the memory: it is freed with the last tensor and the last opener that use it. May be called twice.

        The tensors stay usable, and stay in shared memory.
        """
        self._storages.clear()

    def __repr__(self) -> str:
        return f"ExportedTensors({len(self.handles)} tensors, {len(self._storages)} storages, {self.nbytes} bytes)"


class OpenedTensors:
    """What `open_tensors` mapped: ``tensors`` in the order of the handles, backed by the owner's memory.

    After `close` no tensor taken from here may be used.
    """

    def __init__(self, tensors: Sequence[torch.Tensor], nbytes: int) -> None:
        self.tensors = list(tensors)
        self.nbytes = nbytes
        """Bytes of all distinct storages."""

    def close(self) -> None:
        """Drop the tensors; their memory is unmapped once nobody else holds one. May be called twice."""
        self.tensors.clear()

    def __repr__(self) -> str:
        return f"OpenedTensors({len(self.tensors)} tensors, {self.nbytes} bytes)"


def export_tensors(tensors: Sequence[torch.Tensor], labels: Sequence[str] | None = None) -> ExportedTensors:
    """Move each distinct storage of ``tensors`` into shared memory, in place, and describe the tensors by handles.

    Storages that are in shared memory already are not copied. A DTensor stands for its local tensor; views may have any
    strides. Memory that another library lent to torch (``torch.from_numpy``) is moved like any other: that library keeps
    its old bytes. A storage in shared memory cannot be resized, and is not pinned.

    May raise this process's soft descriptor limit: a shared storage holds one descriptor.

    Args:
        tensors: dense CPU tensors, parameters or DTensors.
        labels: a name for each tensor, for error messages; by default its position.

    Raises:
        NotShareableError: a tensor has no memory that another process could open (sparse, meta, quantized, nested, a
            lazily conjugated view, a subclass without a storage, a private file mapping).
        WrongDeviceError: a tensor is not on the CPU.
        SharedMemoryFullError: ``/dev/shm`` has no room for all storages; nothing has been moved.
        MemoryHandleError: the system refused (too many mappings or descriptors, for one). Storages moved by then stay
            valid, in shared memory.
    """
    names = _names(labels, len(tensors))
    plain = [_plain_tensor(tensor, name) for tensor, name in zip(tensors, names, strict=True)]
    storages: dict[int, torch.UntypedStorage] = {}
    owners: dict[int, str] = {}
    for tensor, name in zip(plain, names, strict=True):
        storage = tensor.untyped_storage()
        storages.setdefault(storage._cdata, storage)
        owners.setdefault(storage._cdata, name)
    with _export_lock:
        files = _share_storages(storages, owners)
    pid = os.getpid()
    start_time = process_start_time(pid) or 0.0
    handles = []
    for tensor in plain:
        storage = tensor.untyped_storage()
        file = files[storage._cdata]
        handles.append(
            TensorHandle(
                pid=pid,
                start_time=start_time,
                path=file.path,
                device=file.device,
                inode=file.inode,
                data_offset=file.data_offset,
                nbytes=storage.nbytes(),
                dtype=str(tensor.dtype).removeprefix("torch."),
                shape=tuple(tensor.shape),
                stride=tensor.stride(),
                storage_offset=int(tensor.storage_offset()),
            )
        )
    return ExportedTensors(handles, list(storages.values()))


def open_tensors(handles: Sequence[TensorHandle], labels: Sequence[str] | None = None) -> OpenedTensors:
    """Map the memory that ``handles`` name and lay the tensors out in it; each distinct storage is mapped once.

    No byte is copied and no descriptor stays open. Works in the exporting process too. A handle is another process's
    word: everything it says is checked, so a wrong one raises and never reads outside the memory it names. The mapping
    outlives the owner: once open, the tensors stay readable when it dies.

    Args:
        handles: what the owner's `export_tensors` returned.
        labels: a name for each tensor, for error messages; by default its position.

    Raises:
        HandleExpiredError: the owner is gone, has freed the memory, or is in another container.
        MemoryHandleError: a handle does not fit its memory, or the system refused (permissions, too many mappings).
    """
    names = _names(labels, len(handles))
    storages: dict[tuple[int, int, int, int], torch.UntypedStorage] = {}
    check_mapping_room(len({(handle.device, handle.inode) for handle in handles}))
    alive: dict[int, float | None] = {}
    tensors = []
    for handle, name in zip(handles, names, strict=True):
        dtype = _checked_dtype(handle, name)
        if handle.nbytes == 0:
            tensors.append(_view(torch.empty(0).untyped_storage(), dtype, handle, name))
            continue
        key = (handle.device, handle.inode, handle.data_offset, handle.nbytes)
        if key not in storages:
            if handle.pid not in alive:
                alive[handle.pid] = process_start_time(handle.pid)
            if alive[handle.pid] != handle.start_time:
                raise HandleExpiredError(_expired(handle, name, "that process is gone"))
            storages[key] = _map_storage(handle, name)
        tensors.append(_view(storages[key], dtype, handle, name))
    return OpenedTensors(tensors, sum(storage.nbytes() for storage in storages.values()))


def _names(labels: Sequence[str] | None, count: int) -> Sequence[str]:
    if labels is None:
        return [f"tensor {index}" for index in range(count)]
    if len(labels) != count:
        raise ValueError(f"{len(labels)} labels for {count} tensors; give one each, or none")
    return labels


def _plain_tensor(tensor: torch.Tensor, name: str) -> torch.Tensor:
    """The dense CPU tensor behind ``tensor``, detached; raises the typed error where there is none."""
    # A DTensor can only exist once its module is imported; importing it here would cost every process a second.
    dtensor_module = sys.modules.get("torch.distributed.tensor")
    if dtensor_module is not None and isinstance(tensor, dtensor_module.DTensor):
        with torch.no_grad():
            tensor = tensor.to_local()
    if tensor.device.type == "meta":
        raise NotShareableError(f"{name} is on the meta device and has no memory; materialize it first (to_empty)")
    if tensor.device.type != "cpu":
        raise WrongDeviceError(f"{name} is a {tensor.device} tensor on a CPU agent; move it with .cpu(), or use the agent of that device")
    if tensor.is_nested or tensor.layout != torch.strided:
        layout = "nested" if tensor.is_nested else str(tensor.layout).removeprefix("torch.")
        raise NotShareableError(f"{name} has layout {layout}; share .to_dense() (or its values and indices) instead")
    if tensor.is_quantized:
        raise NotShareableError(f"{name} is quantized ({tensor.dtype}); share .int_repr() and its scales instead")
    if tensor.is_conj() or tensor.is_neg():
        raise NotShareableError(f"{name} is a lazily conjugated or negated view; share .resolve_conj().resolve_neg() instead")
    try:
        storage = tensor.untyped_storage()
        without_memory = storage.nbytes() > 0 and storage.data_ptr() == 0
    except (NotImplementedError, RuntimeError) as error:
        raise NotShareableError(f"{name} ({type(tensor).__name__}) has no storage: {error}; share its parts instead") from error
    if without_memory or (tensor.numel() > 0 and storage.nbytes() == 0):
        raise NotShareableError(f"{name} ({type(tensor).__name__}) has a storage without memory; share its inner tensors instead")
    return tensor.detach()


def _share_storages(storages: dict[int, torch.UntypedStorage], owners: dict[int, str]) -> dict[int, SharedFile]:
    files: dict[int, SharedFile] = {}
    private: list[int] = []
    mappings = SharedMappings()
    for key, storage in storages.items():
        if storage.nbytes() == 0:
            files[key] = SharedFile("", 0, 0, 0)
        elif (file := mappings.find(storage, owners[key])) is not None:
            files[key] = file
        else:
            private.append(key)
    if not private:
        return files
    check_room([storages[key].nbytes() for key in private])
    check_mapping_room(len(private))
    with_descriptor = reserve_descriptors(len(private))
    for index, key in enumerate(private):
        try:
            if index < with_descriptor:
                files[key] = share_by_descriptor(storages[key])
            else:
                files[key] = share_by_name(storages[key])
        except RuntimeError as error:
            remove_unfinished(error)
            raise translated(error, owners[key], storages[key].nbytes()) from error
    return files


def _expired(handle: TensorHandle, name: str, cause: str) -> str:
    return (
        f"{name}: process {handle.pid} does not hold its memory any more ({cause}); register it again from a live worker "
        "on this host, in this container"
    )


def _map_storage(handle: TensorHandle, name: str) -> torch.UntypedStorage:
    """The storage of ``handle``, mapped; no descriptor stays open and no file is ever made or resized."""
    if not OPENABLE_PATH.fullmatch(handle.path):
        raise MemoryHandleError(f"{name}: {handle.path!r} is not a path of shared memory; the handle is corrupt")
    size = handle.data_offset + handle.nbytes
    try:
        # An export that looked for a descriptor of this file now would find one that is about to be closed.
        with _export_lock:
            storage = _opened(handle, name, size)
        # All pages now, in one call: a fault for each would make the first transfer several times as long as the next.
        # Linux before 5.14 refuses, and then takes the faults.
        _libc.madvise(storage.data_ptr(), size, _MADV_POPULATE_READ)
    except RuntimeError as error:
        if isinstance(error, MemoryHandleError):
            raise
        raise translated(error, name, handle.nbytes) from error
    return cast(torch.UntypedStorage, storage[handle.data_offset :]) if handle.data_offset else storage


def _opened(handle: TensorHandle, name: str, size: int) -> torch.UntypedStorage:
    """The file of ``handle``, mapped from its start."""
    try:
        # O_PATH holds the file without opening it, so what is checked here is what is mapped below, and a path that
        # names something else (a device, a pipe) is never opened.
        fd = os.open(handle.path, os.O_PATH | os.O_CLOEXEC)
    except (FileNotFoundError, ProcessLookupError) as error:
        raise HandleExpiredError(_expired(handle, name, "closed")) from error
    except PermissionError as error:
        raise MemoryHandleError(
            f"{name}: may not open {handle.path}; worker and agent must run as the same user, and be allowed to see each other's /proc"
        ) from error
    try:
        info = os.fstat(fd)
        if (info.st_dev, info.st_ino) != (handle.device, handle.inode):
            raise HandleExpiredError(_expired(handle, name, "its descriptor now names another file"))
        if not stat.S_ISREG(info.st_mode) or handle.data_offset < 0 or handle.nbytes < 0 or size > info.st_size:
            raise MemoryHandleError(f"{name}: {size} bytes are said to be in a file of {info.st_size}; the handle is corrupt")
        # from_file makes a missing file and lengthens a short one: neither can happen through a checked descriptor.
        return cast(torch.UntypedStorage, torch.UntypedStorage.from_file(f"/proc/self/fd/{fd}", shared=True, nbytes=size))
    finally:
        os.close(fd)


def _checked_dtype(handle: TensorHandle, name: str) -> torch.dtype:
    """The handle's dtype, once its shape, strides and offset are known to stay inside ``nbytes``."""
    dtype = _DTYPES.get(handle.dtype)
    if dtype is None:
        raise MemoryHandleError(f"{name}: this torch has no dtype {handle.dtype!r}; both sides must run the same torch version")
    numbers = (*handle.shape, *handle.stride, handle.storage_offset, handle.data_offset, handle.nbytes)
    fits = len(handle.shape) == len(handle.stride) and all(0 <= number <= _INT64_MAX for number in numbers)
    if fits and math.prod(handle.shape) > 0:
        last = handle.storage_offset + sum((size - 1) * step for size, step in zip(handle.shape, handle.stride, strict=True))
        fits = math.prod(handle.shape) <= _INT64_MAX and (last + 1) * dtype.itemsize <= handle.nbytes
    if not fits:
        raise MemoryHandleError(
            f"{name}: shape {handle.shape}, stride {handle.stride}, offset {handle.storage_offset} of {handle.dtype} do not lie "
            f"in {handle.nbytes} bytes; the handle is corrupt"
        )
    return dtype


def _view(storage: torch.UntypedStorage, dtype: torch.dtype, handle: TensorHandle, name: str) -> torch.Tensor:
    try:
        if math.prod(handle.shape) == 0:
            return torch.empty(handle.shape, dtype=dtype)
        return torch.empty(0, dtype=dtype).set_(storage, handle.storage_offset, handle.shape, handle.stride)
    except RuntimeError as error:
        raise MemoryHandleError(f"{name}: torch cannot lay out shape {handle.shape} ({error}); the handle is corrupt") from error
