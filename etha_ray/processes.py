"""Is a process still the one we met? Answered from /proc, so that a recycled pid is not taken for a living owner.

And who may take what this one has open: `permit_tracing`.
"""

from __future__ import annotations

import ctypes
import functools
import os
import threading
from pathlib import Path

_STATE_FIELD = 3
_START_TIME_FIELD = 22
_PR_SET_PTRACER = 0x59616D61
_ANY = 2**64 - 1
_DEAD_STATES = frozenset({b"Z", b"X", b"x"})


def process_start_time(pid: int) -> float | None:
    """When ``pid`` started, in seconds since boot; None if there is no such process or it is a zombie.

    Together with the pid this names one process for as long as the machine is up.
    """
    try:
        stat = Path(f"/proc/{pid}/stat").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return None
    # The second field is the program's name in parentheses and may hold anything, so fields are counted after its end.
    fields = stat[stat.rindex(b")") + 2 :].split()
    if fields[_STATE_FIELD - 3] in _DEAD_STATES:
        return None
    return int(fields[_START_TIME_FIELD - 3]) / os.sysconf("SC_CLK_TCK")


def is_alive(pid: int, start_time: float | None = None) -> bool:
    """Whether ``pid`` runs and, if ``start_time`` is given, is still the process that started then."""
    found = process_start_time(pid)
    return found is not None and (start_time is None or found == start_time)


def pid_namespace() -> int:
    """32 bits that name this process's pid namespace: a pid means something only together with it."""
    return _pid_namespace_of(os.getpid())


@functools.lru_cache(maxsize=1)
def _pid_namespace_of(pid: int) -> int:
    # Keyed by pid: a forked child may be the first process of another namespace.
    return os.stat("/proc/self/ns/pid").st_ino & 0xFFFFFFFF


_lock = threading.Lock()
_tracers: list[int | None] = []


def permit_tracing(pid: int | None = None) -> str:
    """Let a process, and those that it starts, take copies of this one's descriptors, where Yama restricts that (ptrace_scope 1).

    The kernel keeps one permission for each process. So where another one that lives has been permitted before, and without a pid, every
    process of this user is.

    Returns:
        Who may now: "process 12", "every process of this user", or "nobody else" where the kernel has no Yama and restricts nothing.
    """
    with _lock:
        others = any(one != pid and (one is None or is_alive(one)) for one in _tracers)
        allowed = None if others else pid
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.prctl(_PR_SET_PTRACER, ctypes.c_ulong(_ANY if allowed is None else allowed), 0, 0, 0) != 0:
            return "nobody else"
        _tracers[:] = [allowed]
        return "every process of this user" if allowed is None else f"process {allowed}"


def permit_successor(pid: int) -> None:
    """`permit_tracing`, if this process has permitted anybody: ``pid`` has taken that one's place."""
    if _tracers:
        permit_tracing(pid)
