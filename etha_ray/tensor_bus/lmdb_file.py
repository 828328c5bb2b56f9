"""LMDB files that may be opened safely: by path, by several users of one process, and across a fork.

LMDB must not have one file open twice in a process (closing either drops the locks of both), so the environments of a
process are shared and counted here, by the file's device and inode. A file that was removed or replaced on disk is another
file, and gets an environment of its own. A forked child closes what it inherited at once and opens its own when it first
needs it: LMDB's locks belong to the process that took them.

Opening, making and removing a file happen under ``flock`` on the data file, so that no one opens half a pair of files. A data
file that is still empty has no users, so a lock file beside it is a leftover and is replaced; one that has data and no lock file beside it
was being removed by a process that died.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import pwd
import stat
import struct
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType

import lmdb

from etha_ray.config import FAILURE_TIMEOUT
from etha_ray.errors import QueueClosedError, QueueError, QueueHeldError, UnsafePathError
from etha_ray.tensor_bus.write_lock import WriteLock

_FileKey = tuple[int, int]
_PAUSE = 0.002

_MAGIC, _MAGIC_AT = struct.pack("=I", 0xBEEFC0DE), 16
"""What an LMDB file has in its first page (mdb.c, ``MDB_MAGIC``)."""


class _Shared:
    """One environment of this process, and how many `LmdbFile` use it."""

    def __init__(self, env: lmdb.Environment, path: Path) -> None:
        self.env = env
        try:
            self.write_lock = WriteLock(_lock_path(path))
        except BaseException:
            env.close()
            raise
        self.users = 0

    def close(self) -> None:
        self.env.close()
        self.write_lock.close()


_registry: dict[_FileKey, _Shared] = {}
_files: weakref.WeakSet[LmdbFile] = weakref.WeakSet()
_registry_lock = threading.RLock()  # taken after a file's own lock, never before


class LmdbFile:
    """One user's hold on an LMDB file; made by `open_file`.

    Any thread may use it. ``lock`` keeps a thread's transaction apart from `close` and from a fork in other threads: in a
    program that does either, run transactions inside ``with file.lock:``, and read ``env`` and ``write_lock`` there.
    """

    def __init__(self, path: Path, *, map_size: int, max_dbs: int) -> None:
        self.path = path
        self.lock = threading.RLock()
        self.attached = False
        """False once closed, and in a forked child until ``env`` is next read."""
        self._map_size = map_size
        self._max_dbs = max_dbs
        self.closed = False
        self._key: _FileKey | None = None
        self._env: lmdb.Environment | None = None
        self._write_lock: WriteLock | None = None

    @property
    def write_lock(self) -> WriteLock:
        """To be awaited before a write transaction that must not hang. Raises what ``env`` does."""
        if self._write_lock is None:
            _ = self.env
        assert self._write_lock is not None
        return self._write_lock

    @property
    def env(self) -> lmdb.Environment:
        """The environment; in a forked child this opens the child's own.

        Raises `QueueClosedError` after `close`, or in a forked child if the file was removed or replaced since.
        """
        with self.lock:
            if self.closed:
                raise QueueClosedError(f"{self.path} is closed here; open it again to use it")
            if self._env is None:
                try:
                    self._attach(create=False)
                except FileNotFoundError as error:
                    raise QueueClosedError(f"{self.path} was removed after this process forked; open it again to make a new one") from error
            assert self._env is not None
            return self._env

    def owns_path(self) -> bool:
        """Whether the path still leads to the file that is open here."""
        return self._key is not None and _is_at(self.path, self._key)

    def close(self) -> None:
        """Give the environment back; its last user in this process closes it. A second call does nothing."""
        with self.lock, _registry_lock:
            self.closed = True
            self.attached = False
            if self._env is None or self._key is None:
                return
            self._env = self._write_lock = None
            shared = _registry[self._key]
            shared.users -= 1
            if shared.users == 0:
                del _registry[self._key]
                shared.close()

    def unlink(self, before: Callable[[], None] | None = None) -> bool:
        """Remove the file and its lock file, and tell whether they were still there; call it before `close`.

        Whoever has the file open keeps using it; the next to open the path gets a new one. ``before`` runs first, while nobody
        else can open or remove the file through this module. Nothing happens if the path leads to another file by now.
        """
        with self.lock:
            if self.closed:
                raise QueueClosedError(f"{self.path} is closed here; remove it before closing")
            if not self.owns_path():
                return False
            try:
                # In a forked child: while the file is open, no other file can have its number.
                _ = self.env
                with _locked(self.path, create=False) as found:
                    if _key(found) != self._key:
                        return False
                    if before is not None:
                        before()
                    # In this order: once the data is gone from its path, the next to open it makes both files anew.
                    with contextlib.suppress(FileNotFoundError):
                        os.unlink(_lock_path(self.path))
                    os.unlink(self.path)
                    return True
            except (FileNotFoundError, QueueClosedError):
                return False

    def _attach(self, *, create: bool) -> None:
        expected = self._key
        with self.lock, _registry_lock, _locked(self.path, create=create) as found:
            key = _key(found)
            if expected is not None and key != expected:
                raise QueueClosedError(f"{self.path} was replaced after this process forked; open it again to use the new file")
            shared = _registry.get(key)
            if shared is None:
                shared = _registry[key] = _Shared(_open_env(self.path, found, self._map_size, self._max_dbs), self.path)
            shared.users += 1
            self._key, self._env, self._write_lock, self.attached = key, shared.env, shared.write_lock, True
            _files.add(self)

    def _leave_to_parent(self) -> None:
        self._env = self._write_lock = None
        self.attached = False

    def __enter__(self) -> LmdbFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None) -> None:
        self.close()

    def __repr__(self) -> str:
        state = "closed" if self.closed else "open" if self.attached else "not yet opened in this process"
        return f"LmdbFile({str(self.path)!r}, {state})"


def open_file(path: str | os.PathLike[str], *, map_size: int, max_dbs: int, create: bool) -> LmdbFile:
    """Open the LMDB file at ``path``, or with ``create`` make it if it is not there (mode 0600, empty files are taken over).

    map_size: the most bytes the file may grow to; max_dbs: how many named databases it may have. If this process has the file
    open already, its environment is shared and keeps the sizes it was opened with.

    Raises `UnsafePathError` if the path is a symlink, no regular file, another user's, or writable by others;
    FileNotFoundError if it is not there and ``create`` is False, or its directory is missing; `QueueError` if it is no LMDB file;
    `QueueHeldError` if another process is stopped while it opens or removes it.
    """
    given = Path(path)
    # Only the last component may not be a symlink.
    file = LmdbFile(Path(os.path.realpath(given.parent)) / given.name, map_size=map_size, max_dbs=max_dbs)
    file._attach(create=create)
    return file


def _open_env(path: Path, found: os.stat_result, map_size: int, max_dbs: int) -> lmdb.Environment:
    _prepare_lock_file(_lock_path(path), fresh=found.st_size == 0)
    try:
        env = lmdb.open(
            str(path),
            map_size=map_size,
            max_dbs=max_dbs,
            max_readers=1024,
            subdir=False,
            mode=0o600,
            lock=True,
            # The file is shared memory with transactions, not storage: nothing has to reach the disk.
            writemap=True,
            sync=False,
            metasync=False,
            map_async=True,
            # A cached reader would share its slot in the lock file with a forked child, which frees it.
            max_spare_txns=0,
        )
    except lmdb.Error as error:
        raise QueueError(f"{path} cannot be opened as an LMDB file ({error}); remove it or choose another path") from error
    if not _is_at(path, _key(found)):
        env.close()
        raise UnsafePathError(f"{path} was replaced while it was being opened; choose a path in a directory that others cannot write to")
    # Readers that were killed would keep old pages from being used again.
    env.reader_check()
    return env


def _prepare_lock_file(path: Path, *, fresh: bool) -> None:
    # An existing lock file is never opened here: closing it again would drop the locks this process may hold on it.
    if fresh:
        with contextlib.suppress(FileNotFoundError):
            _check(path, os.lstat(path))
            os.unlink(path)
    try:
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600))
    except FileExistsError:
        _check(path, os.lstat(path))


@contextlib.contextmanager
def _locked(path: Path, *, create: bool) -> Iterator[os.stat_result]:
    """Hold the file at ``path`` against others who open or remove it; gives its checked status."""
    while True:
        fd = _open_checked(path, create)
        try:
            _flock(fd, path)
            found = os.fstat(fd)
            _check(path, found)
            if _is_at(path, _key(found)):
                if os.path.lexists(_lock_path(path)) or os.pread(fd, len(_MAGIC), _MAGIC_AT) != _MAGIC:
                    yield found
                    return
                os.unlink(path)  # who was removing it died in between
            # Removed or replaced while we waited for the lock: look again.
        finally:
            os.close(fd)


def _flock(fd: int, path: Path) -> None:
    deadline = time.monotonic() + FAILURE_TIMEOUT
    while True:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise QueueHeldError(
                    f"{path}: a process is in the midst of opening or removing it, and was not done within {FAILURE_TIMEOUT:g} s:"
                    f" continue it if it is stopped, or kill it (`fuser {path}` lists who has it open)"
                ) from None
            time.sleep(_PAUSE)


def _open_checked(path: Path, create: bool) -> int:
    flags = os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    while True:
        try:
            _check(path, os.lstat(path))
            return os.open(path, flags)
        except FileNotFoundError:
            if not create:
                raise
        except OSError as error:
            if isinstance(error, UnsafePathError) or error.errno not in (errno.ELOOP, errno.EACCES, errno.EPERM):
                raise
            raise UnsafePathError(f"{path} cannot be opened safely ({error.strerror}); remove it or choose another path") from error
        # FileExistsError: another process was quicker.
        with contextlib.suppress(FileExistsError):
            return os.open(path, flags | os.O_CREAT | os.O_EXCL, 0o600)


def check_folder(path: Path) -> None:
    """Raise `UnsafePathError` unless this is a folder, and nobody but this user can write in it."""
    _check(path, os.lstat(path), folder=True)


def _check(path: Path, found: os.stat_result, *, folder: bool = False) -> None:
    if stat.S_ISLNK(found.st_mode):
        problem = "is a symlink"
    elif not (stat.S_ISDIR if folder else stat.S_ISREG)(found.st_mode):
        problem = "is not a folder" if folder else "is not a regular file"
    elif found.st_uid != os.geteuid():
        problem = f"does not belong to the user running this ({_user(os.geteuid())})"
    elif found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        problem = f"may be written by others (mode {stat.S_IMODE(found.st_mode):04o})"
    else:
        return
    raise UnsafePathError(f"{path} {problem}; it is owned by {_user(found.st_uid)}; remove it or choose another path")


def _user(uid: int) -> str:
    try:
        return f"{pwd.getpwuid(uid).pw_name}, uid {uid}"
    except KeyError:
        return f"uid {uid}"


def _key(found: os.stat_result) -> _FileKey:
    return found.st_dev, found.st_ino


def _is_at(path: Path, key: _FileKey) -> bool:
    try:
        return _key(os.lstat(path)) == key
    except FileNotFoundError:
        return False


def _lock_path(path: Path) -> Path:
    return path.with_name(path.name + "-lock")


# --- fork: every file's lock is held across it, so the child inherits environments that no transaction is using ---

_held_for_fork: list[LmdbFile] = []


def _before_fork() -> None:
    while True:
        with _registry_lock:
            files = sorted(_files, key=id)
        for file in files:
            file.lock.acquire()
        _registry_lock.acquire()
        if files == sorted(_files, key=id):
            _held_for_fork.extend(files)
            return
        # One was opened meanwhile.
        _registry_lock.release()
        for file in files:
            file.lock.release()


def _after_fork() -> None:
    files = _held_for_fork.copy()
    _held_for_fork.clear()
    _registry_lock.release()
    for file in files:
        file.lock.release()


def _after_fork_in_child() -> None:
    for file in _held_for_fork:
        file._leave_to_parent()
    for shared in _registry.values():
        shared.close()
    _registry.clear()
    _after_fork()


os.register_at_fork(before=_before_fork, after_in_parent=_after_fork, after_in_child=_after_fork_in_child)
