"""What the operating system gives: shared memory, semaphores, files, limits, names."""

from __future__ import annotations

import os
import resource
import shutil
import socket
import stat
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import lmdb
import posix_ipc

from etha_ray.doctor.check import Check, fail, ok, warn
from etha_ray.report import format_bytes
from etha_ray.shared_files import SHM_DIR, mapping_limit
from etha_ray.tensor_bus.inspection import agents_here, namespaces_here
from etha_ray.tensor_bus.semaphores import generate_semaphore_name, unlink_quietly

_LITTLE_SHM = 1 << 30
_FEW_DESCRIPTORS = 4096
_FEW_MAPPINGS = 65530
"""Linux's default."""
_SLOW_NAMES = 1.0


def shared_memory(path: str = SHM_DIR) -> Check:
    """Room where tensors and semaphores live."""
    name = "shared memory"
    try:
        room = os.statvfs(path)
    except OSError as error:
        return fail(name, f"{path} cannot be used ({error.strerror})", f"mount it: mount -t tmpfs tmpfs {path}")
    size, free = room.f_blocks * room.f_frsize, room.f_bavail * room.f_frsize
    found = f"{path} has {format_bytes(free)} free of {format_bytes(size)}"
    if not os.access(path, os.W_OK | os.X_OK):
        return fail(name, f"{path} is not writable by uid {os.geteuid()}", f"chmod 1777 {path}")
    remedy = f"give it what your tensors need: docker run --shm-size=64g, or mount -o remount,size=64g {path}"
    if free < 1 << 20:
        return fail(name, found, remedy + "; see who fills it: ls -lS " + path)
    return warn(name, f"{found}: CPU tensors that are registered move there", remedy) if free < _LITTLE_SHM else ok(name, found)


def ptrace(path: str = "/proc/sys/kernel/yama/ptrace_scope") -> Check:
    """Whether the kernel lets one process of a user read another's memory."""
    name = "ptrace scope"
    try:
        scope = int(Path(path).read_text())
    except OSError:
        return ok(name, "the kernel has no Yama: nothing is restricted")
    if scope <= 1:
        return ok(name, f"{scope}" + (": workers give their agent permission by themselves (bootstrap_client)" if scope else ""))
    return warn(
        name,
        f"{scope}: no process may read another's memory, not even with permission; CPU tensors do not need that",
        "sysctl -w kernel.yama.ptrace_scope=1",
    )


def shared_files() -> Check:
    """Whether a process can open memory that another one made, as agents do with their workers'."""
    name = "memory of other processes"
    code = "import os; fd = os.memfd_create('x'); os.write(fd, b'etha'); print(fd, flush=True); input()"
    with subprocess.Popen([sys.executable, "-S", "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        path = f"/proc/{other.pid}/fd/{other.stdout.readline().strip()}"
        try:
            right = Path(path).read_bytes() == b"etha"
        except OSError as error:
            return fail(
                name,
                f"{path} cannot be opened ({error.strerror})",
                "mount /proc without hidepid, and run workers and agents as one user in one pid namespace (docker: --pid=container:...)",
            )
        finally:
            other.communicate("\n")
    return ok(name, "can be opened") if right else fail(name, f"{path} holds something else", "check how /proc is mounted")


def lmdb_works(folder: str = "/tmp") -> Check:
    """Whether the files that queues and states are kept in can be made."""
    name = "lmdb"
    made = None
    try:
        made = tempfile.mkdtemp(prefix="etha_ray_doctor_", dir=folder)
        with lmdb.open(f"{made}/x.lmdb", subdir=False, map_size=1 << 20, writemap=True, sync=False) as env:
            with env.begin(write=True) as txn:
                txn.put(b"key", b"value")
            with env.begin() as txn:
                right = txn.get(b"key") == b"value"
    except (lmdb.Error, OSError) as error:
        return fail(
            name, f"no file can be used in {folder} ({error})", f"give {folder} a file system with room that supports mmap and locks"
        )
    finally:
        if made is not None:
            shutil.rmtree(made, ignore_errors=True)
    found = f"{lmdb.__version__}, LMDB {'.'.join(map(str, lmdb.version()))}"
    return ok(name, found) if right else fail(name, f"{found} reads something else than was written", f"check the disk below {folder}")


def semaphores() -> Check:
    """Whether POSIX semaphores can be made, posted and removed."""
    name = "semaphores"
    semaphore = None
    try:
        semaphore = posix_ipc.Semaphore(generate_semaphore_name("doctor", "check"), posix_ipc.O_CREX, mode=0o600)
        semaphore.release()
        semaphore.acquire(1.0 if posix_ipc.SEMAPHORE_TIMEOUT_SUPPORTED else None)
    except (posix_ipc.Error, OSError) as error:
        return fail(name, f"POSIX semaphores do not work ({error})", "mount /dev/shm writable: they live there")
    finally:
        if semaphore is not None:
            unlink_quietly(semaphore.name)
            semaphore.close()
    if not posix_ipc.SEMAPHORE_TIMEOUT_SUPPORTED:
        return fail(name, "waits cannot be limited in time here", "use Linux: etha_ray runs nowhere else")
    return ok(name, "made, posted, taken and removed one")


def temporary_folder(path: str = "/tmp") -> Check:
    """Whether agents can keep their files where clients look for them, and nobody else can put others there."""
    name = "temporary files"
    try:
        info = os.stat(path)
    except OSError as error:
        return fail(name, f"{path} cannot be used ({error.strerror})", f"mkdir -m 1777 {path}")
    mode = stat.S_IMODE(info.st_mode)
    if not os.access(path, os.W_OK | os.X_OK):
        return fail(name, f"{path} is not writable by uid {os.geteuid()} (mode {mode:o})", f"chmod 1777 {path}")
    if mode & stat.S_IWOTH and not mode & stat.S_ISVTX:
        return fail(name, f"in {path} everybody may replace everybody's files (mode {mode:o})", f"chmod 1777 {path}")
    return ok(name, f"{path} has mode {mode:o}")


def descriptors(limits: tuple[int, int] | None = None) -> Check:
    """How many files a process may have open: a registered storage keeps one."""
    name = "descriptors"
    soft, hard = limits or resource.getrlimit(resource.RLIMIT_NOFILE)
    highest = float("inf") if hard == resource.RLIM_INFINITY else hard
    found = f"{soft} a process, and up to {'any number' if highest == float('inf') else hard} when it asks (workers do)"
    if highest < _FEW_DESCRIPTORS:
        remedy = "raise the hard limit: ulimit -Hn 65536, docker run --ulimit nofile=65536, or LimitNOFILE= of the service"
        return warn(name, found + "; each registered storage keeps one while there are enough", remedy)
    return ok(name, found)


def mappings(limit: int | None = None) -> Check:
    """How many memory mappings a process may have: a registered storage is one."""
    name = "memory mappings"
    limit = mapping_limit() if limit is None else limit
    if limit < _FEW_MAPPINGS:
        return warn(name, f"{limit} a process; each registered storage is one", "sysctl -w vm.max_map_count=1048576")
    return ok(name, f"{limit} a process")


def leftovers() -> Check:
    """Files of agents that were killed."""
    name = "files of dead agents"
    dead = [
        f"{agent.rank} of pool {namespace!r}" for namespace in namespaces_here() for agent in agents_here(namespace) if agent.life == "dead"
    ]
    if not dead:
        return ok(name, "none")
    listed = ", ".join(dead[:8]) + (f" and {len(dead) - 8} more" if len(dead) > 8 else "")
    return warn(
        name,
        f"agent {listed} was killed and left files",
        "the next `etha-ray up`, or agent in its place, removes them; nothing else is needed",
    )


def names() -> Check:
    """How long this host's own name takes to look up: torch and Ray do it for every connection."""
    name = "host name"
    host, began = socket.gethostname(), time.monotonic()
    try:
        address = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)[0][4][0]
    except OSError as error:
        return warn(name, f"{host!r} cannot be looked up ({error})", f"add it to /etc/hosts: 127.0.1.1 {host}")
    took = time.monotonic() - began
    if took > _SLOW_NAMES:
        return warn(name, f"{host!r} took {took:.1f} s to look up", f"add it to /etc/hosts: {address} {host}")
    return ok(name, f"{host} is {address}")
