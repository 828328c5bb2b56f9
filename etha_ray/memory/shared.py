"""A CPU tensor's memory: moved into shared memory, and mapped from there.

A worker's tensor usually lives in its private heap. Its storage is moved *in place* (the same ``StorageImpl``, so views, parameters and
optimizer references stay valid).

Nothing is left in ``/dev/shm`` by a killed process: the shared files are unlinked as soon as they are made and live on as
long as a descriptor or a mapping does. A handle therefore names the owner's descriptor (``/proc/<pid>/fd/<fd>``). Where
the descriptor limit cannot hold one descriptor a storage, the storages over it get a name in ``/dev/shm`` that torch's own
shared-memory manager unlinks, also after a crash.
"""

from __future__ import annotations

import ctypes
import os
import stat
import threading
from typing import cast

import torch

from etha_ray.errors import HandleExpiredError, MemoryHandleError
from etha_ray.memory.handles import SharedHandle, expired
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

_MADV_POPULATE_READ = 22
_libc = ctypes.CDLL(None)
_libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_export_lock = threading.Lock()


def share_storages(storages: dict[int, torch.UntypedStorage], owners: dict[int, str]) -> dict[int, SharedFile]:
    """Move what is not in shared memory yet; the file of each storage. Keyed by the caller, who also says what messages call each.

    Raises:
        NotShareableError, SharedMemoryFullError, MemoryHandleError: as `export_tensors`.
    """
    with _export_lock:
        return _share(storages, owners)


def _share(storages: dict[int, torch.UntypedStorage], owners: dict[int, str]) -> dict[int, SharedFile]:
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


def map_storage(handle: SharedHandle, name: str) -> torch.UntypedStorage:
    """The storage of ``handle``, mapped; no descriptor stays open and no file is ever made or resized.

    Raises:
        HandleExpiredError, MemoryHandleError: as `open_tensors`.
    """
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


def _opened(handle: SharedHandle, name: str, size: int) -> torch.UntypedStorage:
    """The file of ``handle``, mapped from its start."""
    try:
        # O_PATH holds the file without opening it, so what is checked here is what is mapped below, and a path that
        # names something else (a device, a pipe) is never opened.
        fd = os.open(handle.path, os.O_PATH | os.O_CLOEXEC)
    except (FileNotFoundError, ProcessLookupError) as error:
        raise HandleExpiredError(expired(handle, name, "closed")) from error
    except PermissionError as error:
        raise MemoryHandleError(
            f"{name}: may not open {handle.path}; worker and agent must run as the same user, and be allowed to see each other's /proc"
        ) from error
    try:
        info = os.fstat(fd)
        if (info.st_dev, info.st_ino) != (handle.device, handle.inode):
            raise HandleExpiredError(expired(handle, name, "its descriptor now names another file"))
        if not stat.S_ISREG(info.st_mode) or handle.data_offset < 0 or handle.nbytes < 0 or size > info.st_size:
            raise MemoryHandleError(f"{name}: {size} bytes are said to be in a file of {info.st_size}; the handle is corrupt")
        # from_file makes a missing file and lengthens a short one: neither can happen through a checked descriptor.
        return cast(torch.UntypedStorage, torch.UntypedStorage.from_file(f"/proc/self/fd/{fd}", shared=True, nbytes=size))
    finally:
        os.close(fd)
