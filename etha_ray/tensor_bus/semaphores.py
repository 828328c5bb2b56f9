"""POSIX semaphores of the bus: their names, opening them, and removing those whose process is dead.

glibc keeps the semaphore ``/name`` as the file ``/dev/shm/sem.name``, which is where ownership and leftovers are looked up.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import time
from pathlib import Path

import posix_ipc

from etha_ray.errors import UnsafePathError
from etha_ray.processes import is_alive, pid_namespace

SHM_DIRECTORY = Path("/dev/shm")

# A file name may have 255 bytes, and "sem." takes four of them.
_MAX_NAME_BYTES = 251
_MAX_TYPE_BYTES = 64
_SPIN_SECONDS = 50e-6
_NAME = re.compile(r"/[^/\0]+")
_UNSAFE = re.compile(r"[^!-.0-9;-~]")  # all but printable ASCII without space, '/' and ':'
_COMMAND_SEMAPHORE = re.compile(r"sem\.command_.*_(?P<pid>\d+)_(?P<namespace>[0-9a-f]{8})[0-9a-f]{24}")
_PROCESS_FILE = re.compile(r"etha_ray\.(?P<namespace>[0-9a-f]{8})\.(?P<pid>\d+)\..*")


def generate_semaphore_name(command_type: str, context_id: str) -> str:
    """A name that no other command has: ``/command_{type}_{context}_{pid}_{32 hex digits}``, at most 251 bytes.

    Characters of ``context_id`` that a semaphore name cannot hold become ``_``, and it is cut where the name would be too
    long; uniqueness comes from the digits. The first 8 of them name the pid namespace, so that `sweep_dead` can tell whose
    pid it is; the other 24 are random.
    """
    head = f"/command_{_UNSAFE.sub('_', command_type)[:_MAX_TYPE_BYTES]}_"
    tail = f"_{os.getpid()}_{pid_namespace():08x}{os.urandom(12).hex()}"
    return head + _UNSAFE.sub("_", context_id)[: _MAX_NAME_BYTES - len(head) - len(tail)] + tail


def queue_semaphore_name(path: str | os.PathLike[str], role: str) -> str:
    """The semaphore that all users of the queue at ``path`` share for ``role``: the same for every spelling of the path."""
    identity = f"{os.path.realpath(path)}\0{os.geteuid()}"
    return f"/cq_{role}_{hashlib.blake2b(identity.encode(), digest_size=16).hexdigest()}"


def is_semaphore_name(name: str) -> bool:
    """Whether a semaphore can have this name."""
    return _NAME.fullmatch(name) is not None and len(name.encode()) <= _MAX_NAME_BYTES and name not in ("/.", "/..")


def open_semaphore(name: str, create: bool) -> posix_ipc.Semaphore:
    """Open the semaphore, or with ``create`` make it (count 0, for this user only) unless it is there already.

    Raises posix_ipc.ExistentialError if it is not there and ``create`` is False, `UnsafePathError` if it belongs to another user, and
    ValueError if `is_semaphore_name` says no.
    """
    if not is_semaphore_name(name):  # posix_ipc 1.3 crashes where there is a zero byte in it
        raise ValueError(f"{name!r} is no name of a semaphore")
    try:
        semaphore = posix_ipc.Semaphore(name, posix_ipc.O_CREAT if create else 0, mode=0o600, initial_value=0)
    except posix_ipc.PermissionsError:
        raise UnsafePathError(_foreign(name)) from None
    # A name that is gone already is no one else's.
    with contextlib.suppress(FileNotFoundError):
        if _file_of(name).lstat().st_uid != os.geteuid():
            semaphore.close()
            raise UnsafePathError(_foreign(name))
    return semaphore


def acquire(semaphore: posix_ipc.Semaphore, timeout: float) -> None:
    """Wait ``timeout`` seconds at most, as ``semaphore.acquire`` does, and look for a post for a moment before sleeping.

    Waking a processor that went idle costs more than a whole round trip of commands. Other threads run meanwhile:
    sched_yield gives up the processor, and the GIL.
    """
    end = time.perf_counter() + min(timeout, _SPIN_SECONDS)
    while not semaphore.value and time.perf_counter() < end:
        os.sched_yield()
    semaphore.acquire(timeout)


def waited_for(name: str) -> bool:
    """Whether a command's client still has its semaphore: it removes that of an outcome which it does not wait for any more."""
    return is_semaphore_name(name) and _file_of(name).exists()


def unlink_quietly(name: str) -> None:
    """Remove the semaphore's name; nothing happens if it is gone, or not ours to remove."""
    with contextlib.suppress(posix_ipc.ExistentialError, posix_ipc.PermissionsError):
        posix_ipc.unlink_semaphore(name)


def sweep_dead() -> list[str]:
    """Remove what dead processes left in /dev/shm, and return the file names removed.

    Looks at command semaphores and at ``etha_ray.{namespace}.{pid}.*`` files. Only those of this user and this pid namespace
    whose pid is dead are touched. A pid that another process has by now counts as alive: its leftovers wait for the next sweep.
    """
    namespace = f"{pid_namespace():08x}"
    if not is_alive(os.getpid()):  # /proc is not mounted here, or another namespace's: nobody can be told dead
        return []
    removed = []
    with os.scandir(SHM_DIRECTORY) as entries:
        for entry in entries:
            match = _COMMAND_SEMAPHORE.fullmatch(entry.name) or _PROCESS_FILE.fullmatch(entry.name)
            if match is None or match["namespace"] != namespace or is_alive(int(match["pid"])):
                continue
            # Others may sweep at the same moment.
            with contextlib.suppress(FileNotFoundError, PermissionError, IsADirectoryError):
                if entry.stat(follow_symlinks=False).st_uid == os.geteuid():
                    os.unlink(entry.path)
                    removed.append(entry.name)
    return removed


def _file_of(name: str) -> Path:
    return SHM_DIRECTORY / f"sem.{name.removeprefix('/')}"


def _foreign(name: str) -> str:
    return (
        f"semaphore {name} ({_file_of(name)}) belongs to another user, so it is not opened; "
        f"ask its owner to remove that file, or choose another queue path"
    )
