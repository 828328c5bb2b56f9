"""A storage's file in shared memory: making it, finding the one it has already, and what the system allows.

The system's limits are room in /dev/shm, descriptors and memory mappings; `memory` checks them before it moves a byte.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import math
import mmap
import os
import re
import resource
import signal
import stat
import time
from bisect import bisect_right
from collections.abc import Sequence
from typing import NamedTuple

import torch

from etha_ray.errors import MemoryHandleError, NotShareableError, SharedMemoryFullError

logger = logging.getLogger(__name__)

SHM_DIR = "/dev/shm"
OPENABLE_PATH = re.compile(r"/proc/[0-9]+/fd/[0-9]+|/dev/shm/[^/\0]+")
"""The paths that a handle may name: a descriptor of a process, or a file right in /dev/shm."""

# Left to the rest of the process when there is too little for every storage.
SPARE_DESCRIPTORS = 256
SPARE_MAPPINGS = 1024

# torch gives the process that manages its named files one second to answer, which a busy machine may take; nothing has changed then.
_MANAGER_TRIES = 30
_MANAGER_TIMED_OUT = "manager connection has timed out"

_TORCH_FILE = re.compile(r"torch_[0-9]+_[0-9]+(?:_[0-9]+)?")
_HEAD = 64
_SWEEP_TRIES = 5


class SharedFile(NamedTuple):
    path: str
    device: int
    inode: int
    data_offset: int


def share_by_descriptor(storage: torch.UntypedStorage) -> SharedFile:
    # torch gives its own descriptor, not a copy of it: it lives as long as the storage and nobody else closes it.
    fd, _ = storage._share_fd_cpu_()
    info = os.fstat(fd)
    return SharedFile(f"/proc/{os.getpid()}/fd/{fd}", info.st_dev, info.st_ino, 0)


def share_by_name(storage: torch.UntypedStorage) -> SharedFile:
    name = _named(storage)
    path = SHM_DIR + os.fsdecode(name)
    info = os.stat(path)
    # torch keeps a reference count at the head of a named file; the mapping starts at a page, so the rest is the offset.
    return SharedFile(path, info.st_dev, info.st_ino, storage.data_ptr() % mmap.PAGESIZE)


def _named(storage: torch.UntypedStorage) -> bytes:
    """Have torch move it into a named file; that name."""
    for tries_left in reversed(range(_MANAGER_TRIES)):
        try:
            return bytes(storage._share_filename_cpu_()[1])
        except RuntimeError as error:
            if not tries_left or _MANAGER_TIMED_OUT not in str(error):
                raise
    raise AssertionError("unreachable")


class SharedMappings:
    """The shared file mappings of this process, as they are now: tells where an already shared storage can be opened."""

    def __init__(self) -> None:
        self._mappings: list[tuple[int, int, int, tuple[int, int], str]] = []
        with open("/proc/self/maps", encoding="utf-8", errors="surrogateescape") as file:
            for line in file:
                fields = line.rstrip("\n").split(maxsplit=5)
                if fields[1][3] != "s" or len(fields) < 6:
                    continue
                start, end = (int(part, 16) for part in fields[0].split("-"))
                major, minor = (int(part, 16) for part in fields[3].split(":"))
                identity = (os.makedev(major, minor), int(fields[4]))
                self._mappings.append((start, end, int(fields[2], 16), identity, fields[5]))
        self._starts = [mapping[0] for mapping in self._mappings]
        self._descriptors: dict[tuple[int, int], int] | None = None

    def find(self, storage: torch.UntypedStorage, name: str) -> SharedFile | None:
        """Where ``storage`` can be opened; None when it is private memory that can be moved."""
        address = storage.data_ptr()
        index = bisect_right(self._starts, address) - 1
        if index < 0 or address >= self._mappings[index][1]:
            if storage.is_shared():
                raise NotShareableError(f"{name} is privately mapped from a file and cannot be shared; share .clone() instead")
            return None
        start, end, file_offset, identity, path = self._mappings[index]
        if address + storage.nbytes() <= end:
            found = self._open_path(identity, path)
            if found is not None:
                return SharedFile(found, *identity, file_offset + address - start)
        raise NotShareableError(f"{name} is mapped from {path}, which no other process can open; share .clone() instead")

    def _open_path(self, identity: tuple[int, int], path: str) -> str | None:
        if self._descriptors is None:
            self._descriptors = _regular_descriptors()
        fd = self._descriptors.get(identity)
        if fd is not None:
            return f"/proc/{os.getpid()}/fd/{fd}"
        if OPENABLE_PATH.fullmatch(path) and os.path.exists(path):
            info = os.stat(path)
            return path if (info.st_dev, info.st_ino) == identity else None
        return None


def _regular_descriptors() -> dict[tuple[int, int], int]:
    """The lowest open descriptor of each regular file of this process, by device and inode."""
    found: dict[tuple[int, int], int] = {}
    for fd in sorted(int(entry) for entry in os.listdir("/proc/self/fd")):
        try:
            info = os.fstat(fd)
        except OSError:  # the listing's own descriptor, or one that another thread closed meanwhile
            continue
        if stat.S_ISREG(info.st_mode):
            found.setdefault((info.st_dev, info.st_ino), fd)
    return found


def check_room(sizes: Sequence[int]) -> None:
    """Raise `SharedMemoryFullError` unless /dev/shm has room for new files of these sizes, in bytes."""
    needed = sum(math.ceil(size / mmap.PAGESIZE) * mmap.PAGESIZE for size in sizes)
    room = os.statvfs(SHM_DIR)
    free = room.f_bavail * room.f_frsize
    if needed > free:
        raise SharedMemoryFullError(
            f"{SHM_DIR} has {free} bytes free and the tensors need {needed} ({len(sizes)} storages); give it more: "
            f"`docker run --shm-size=...`, or `mount -o remount,size=... {SHM_DIR}`"
        )


def mapping_limit() -> int:
    """How many memory mappings a process may have."""
    with open("/proc/sys/vm/max_map_count", encoding="ascii") as file:
        return int(file.read())


def check_mapping_room(count: int) -> None:
    """Raise `MemoryHandleError` unless this process may make ``count`` more memory mappings and some to spare."""
    with open("/proc/self/maps", "rb") as file:
        used = sum(1 for _ in file)
    limit = mapping_limit()
    if used + count + SPARE_MAPPINGS > limit:
        raise MemoryHandleError(
            f"{count} storages need a memory mapping each, and this process has {used} of at most {limit}; raise it: "
            f"`sysctl -w vm.max_map_count={2 * (used + count + SPARE_MAPPINGS)}`, or share fewer, larger storages"
        )


def reserve_descriptors(count: int) -> int:
    """How many of ``count`` storages may keep a descriptor open; raises the process's soft limit where that helps."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    used = len(os.listdir("/proc/self/fd"))
    wanted = used + count + SPARE_DESCRIPTORS
    if soft != resource.RLIM_INFINITY and soft < wanted:
        raised = wanted if hard == resource.RLIM_INFINITY else min(hard, wanted)
        if raised > soft:
            resource.setrlimit(resource.RLIMIT_NOFILE, (raised, hard))
            logger.info("raised the soft descriptor limit from %d to %d for %d shared storages", soft, raised, count)
            soft = raised
    if soft == resource.RLIM_INFINITY:
        return count
    return max(0, min(count, soft - used - SPARE_DESCRIPTORS))


def translated(error: RuntimeError, name: str, nbytes: int) -> MemoryHandleError:
    """torch's refusal to make or map shared memory as our error; torch puts the errno at the end of its message."""
    text = str(error)
    if f"({errno.ENOSPC})" in text:
        return SharedMemoryFullError(f"{name}: {SHM_DIR} ran out of room for {nbytes} bytes; give it more (--shm-size): {text}")
    if f"({errno.ENOMEM})" in text:
        return MemoryHandleError(
            f"{name}: no memory mapping for {nbytes} bytes; free memory, or raise `sysctl vm.max_map_count` (now {mapping_limit()}): {text}"
        )
    if f"({errno.EMFILE})" in text:
        return MemoryHandleError(f"{name}: no descriptor left for {nbytes} bytes; raise `ulimit -n`: {text}")
    if _MANAGER_TIMED_OUT in text:
        return MemoryHandleError(
            f"{name}: torch's shared-memory manager (torch_shm_manager, a child of this process) did not answer within {_MANAGER_TRIES} s;"
            " have it go on if it was stopped, or give the machine less to do, and register again"
        )
    return MemoryHandleError(f"{name}: cannot share {nbytes} bytes: {text}")


def remove_unfinished(error: RuntimeError) -> None:
    """Unlink the file that torch was making when ``error`` hit it: it leaves the name behind, and names it in the message."""
    found = re.search(rf"</(torch_{os.getpid()}_[0-9]+_[0-9]+)>", str(error))
    if found:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(f"{SHM_DIR}/{found[1]}")


def sweep_unfinished() -> list[str]:
    """Remove the files in /dev/shm that torch named in a process which was killed before torch took the name back; their names.

    torch names each file that it moves a storage into, makes room in it, maps it, and only then removes the name and copies the
    contents: who is killed in between leaves a file of zeros that nobody has open. One that torch means to keep by name starts with
    its reference count, which is not zero. So whose process it was need not be known, nor be visible from here: other containers
    may share /dev/shm. Only this user's files are touched.
    """
    removed = []
    for name in os.listdir(SHM_DIR):
        if _TORCH_FILE.fullmatch(name) and _remove_if_unfinished(f"{SHM_DIR}/{name}"):
            removed.append(name)
    return removed


def _remove_if_unfinished(path: str) -> bool:
    try:
        # Does not wait for who has a lease on it: that is another sweep.
        fd = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        info = os.fstat(fd)
        if not stat.S_ISREG(info.st_mode) or info.st_uid != os.geteuid() or any(os.pread(fd, _HEAD, 0)):
            return False
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)  # one sweep of several goes on
        for _ in range(_SWEEP_TRIES):
            if _nobody_else_has(fd):
                if any(os.pread(fd, _HEAD, 0)):  # it was only being made until now
                    return False
                os.unlink(path)
                return True
            time.sleep(0.001)  # another sweep may just have looked at it
    except OSError:
        pass
    finally:
        os.close(fd)
    return False


def _nobody_else_has(fd: int) -> bool:
    """Whether no process of this machine has the file open or mapped besides ``fd``: only then is a write lease given (fcntl(2))."""
    # Who opens it while the lease is held has a signal sent here: one that is ignored unless it is asked for.
    fcntl.fcntl(fd, fcntl.F_SETSIG, signal.SIGURG)
    try:
        fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_WRLCK)
    except BlockingIOError:
        return False
    return True
