"""Who has the write lock of an LMDB file, so that nobody waits for one that is not given back.

LMDB waits for its write lock for as long as it takes, in C, where neither a timeout nor Ctrl-C ends it; and a process that is stopped
(SIGSTOP, a debugger, a paused container) in the midst of a transaction keeps it until it goes on. So whoever is to write looks first
whether the lock is free, and waits outside of LMDB as long as it is not.

The lock is a robust mutex of POSIX threads in the file's lock file, whose first word is 0 or the thread that has it: that much is the
kernel's (robust_list(2)), and where the mutex lies is LMDB's (mdb.c, ``MDB_txninfo``: the second cache line). `WriteLock.confirm` looks
whether it does lie there; with an LMDB that has it elsewhere everybody waits in LMDB.

Looking and taking are two steps: who takes the lock in between, within a microsecond, and is stopped right then, still holds up the other.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import threading
import time
from pathlib import Path

from etha_ray.config import FAILURE_TIMEOUT
from etha_ray.errors import QueueHeldError

_PLACE = 16
"""Of the mutex in the lock file, in words of 4 bytes."""

_THREAD = 0x3FFFFFFF
"""What of a robust mutex's word is the thread; the rest says that others wait, or that it died with the lock."""

_SPIN = 100e-6
_PAUSE = 500e-6
"""Seconds between two looks, after those that only give up the processor: a transaction takes microseconds."""

_BRIEF = 0.1
"""Seconds for which one that is known to be stuck is waited for."""

OPENING = FAILURE_TIMEOUT / 2
"""Seconds for which who opens a file waits: an agent's loop does, and must turn more often than `FAILURE_TIMEOUT`."""


class WriteLock:
    """That of an environment which has just been opened, whose lock file is at ``path``. Any thread may use it, until `close`."""

    def __init__(self, path: Path) -> None:
        # Stays open as long as the environment: closing it gives back all locks that this process has on the file.
        self._descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        self._memory = mmap.mmap(self._descriptor, mmap.PAGESIZE, access=mmap.ACCESS_READ)
        self._words = memoryview(self._memory).cast("I")
        self._path = path
        self._stuck = 0
        self._seen, self._seen_since = 0, 0.0
        self.visible = True
        """Whether it lies where it is looked for, as far as is known."""

    @property
    def owner(self) -> int:
        """The thread that has it; 0 if nobody has."""
        return self._words[_PLACE] & _THREAD

    def confirm(self) -> None:
        """Look whether it is there at all; called by a thread that has it."""
        self.visible = self.owner == threading.get_native_id()

    def await_free(self, patience: float) -> None:
        """Return as soon as nobody has it. Cheap.

        Raises `QueueHeldError` if one thread has had it for ``patience`` seconds; one that is known to have had it for the failure timeout
        is hardly waited for.
        """
        if self._words[_PLACE] & _THREAD and self.visible:
            self._wait(patience)

    def check(self) -> None:
        """Raise `QueueHeldError` if one thread had it whenever somebody called this, for the failure timeout. Cheap."""
        owner, now = self.owner, time.monotonic()
        if not owner or owner != self._seen:
            self._seen, self._seen_since = owner, now
        elif now - self._seen_since > FAILURE_TIMEOUT:
            self.await_free(_BRIEF)

    def close(self) -> None:
        """To be called once the environment is closed."""
        self._words.release()
        self._memory.close()
        os.close(self._descriptor)

    def _wait(self, patience: float) -> None:
        holder, began = 0, time.monotonic()
        while owner := self.owner:
            now = time.monotonic()
            if owner != holder:
                holder, began = owner, now
            if now - began > (min(patience, _BRIEF) if owner == self._stuck else patience):
                if now - began > FAILURE_TIMEOUT:
                    self._stuck = owner
                raise QueueHeldError(
                    f"{self._path}: {_described(owner, self._path)} is in the midst of a write, and was not done within"
                    f" {now - began:.1f} s: continue that process, or kill it, and all goes on"
                )
            if now - began < _SPIN:
                os.sched_yield()
            else:
                time.sleep(_PAUSE)
        self._stuck = 0


def _described(thread: int, path: Path) -> str:
    """Whose thread that is, in words. In another pid namespace the number is another process's: the right one has the file mapped."""
    with contextlib.suppress(OSError):
        status = dict(line.split(":\t", 1) for line in Path(f"/proc/{thread}/status").read_text().splitlines() if ":\t" in line)
        pid = int(status["Tgid"])
        if str(path) in Path(f"/proc/{pid}/maps").read_text():
            return f"process {pid} ({status['Name']}){', which is stopped,' if status['State'][:1] in 'Tt' else ''}"
    return "a process that cannot be seen from here, in another container perhaps,"
