"""Taking a copy of another process's descriptor, with pidfd_getfd(2)."""

from __future__ import annotations

import ctypes
import errno
import os

from etha_ray.errors import HandleExpiredError, MemoryHandleError
from etha_ray.processes import process_start_time

_PIDFD_GETFD = 438  # on all architectures
_libc = ctypes.CDLL(None, use_errno=True)


def take_descriptor(pid: int, start_time: float, fd: int, name: str) -> int:
    """A copy of descriptor ``fd`` of the process that started then, to be closed by the caller.

    Raises:
        HandleExpiredError: that process, or its descriptor, is gone.
        MemoryHandleError: the kernel does not allow it; the message says what would.
    """
    gone = f"{name}: process {pid} does not hold its memory any more: register it again from a live worker on this host, in this container"
    try:
        process = os.pidfd_open(pid)
    except (ProcessLookupError, OverflowError) as error:
        raise HandleExpiredError(gone) from error
    except OSError as error:
        raise MemoryHandleError(f"{name}: descriptors of process {pid} cannot be taken ({error}); {_REMEDY}") from error
    try:
        if process_start_time(pid) != start_time:
            raise HandleExpiredError(gone)
        copy = int(_libc.syscall(_PIDFD_GETFD, process, fd, 0))
        if copy >= 0:
            return copy
        number = ctypes.get_errno()
        if number in (errno.EBADF, errno.ESRCH):
            raise HandleExpiredError(gone)
        raise MemoryHandleError(
            f"{name}: may not take descriptor {fd} of process {pid} ({os.strerror(number)}), which its expandable segments need; {_REMEDY}"
        )
    finally:
        os.close(process)


_REMEDY = (
    "worker and agent must run as the same user, on Linux 5.6 or newer, and where kernel.yama.ptrace_scope is 1 the worker calls"
    " etha_ray.tensor_bus.bootstrap.setup_ptrace() (bootstrap_client does); in a container give --cap-add=SYS_PTRACE, or take"
    " expandable_segments out of the worker's PYTORCH_CUDA_ALLOC_CONF"
)
