"""The queue that carries commands from many clients to one agent: an LMDB file and two POSIX semaphores.

LMDB holds the truth. One record has the positions of the head and the tail; what lies between are the entries, each under
its position. Size and room follow from these in the same transaction, and LMDB's write lock is freed when its owner dies, so a
process killed at any point neither takes room away nor blocks anybody. One that is stopped within a transaction does block the others:
they look before they wait for the lock, and give up in the end (`QueueHeldError`). All transactions are write transactions, also those that
only look: a killed reader's place in LMDB's table would keep old pages from being used again.

The semaphores only wake sleepers, and either may be posted too often or not at all:

- ``items`` is posted after an entry is committed, ``space`` after room was made that a writer has asked for (`_SPACE_WANTED`).
- A count above one would say nothing more, so a semaphore with a count is not posted again. Whoever takes the count looks at
  LMDB afterwards, under the write lock that the poster held before, and so sees what the post was for.
- A woken writer passes the wake-up on while there is room, and asks again for the others when there is none.
- Nobody sleeps longer than `_SLICE_S` without looking at LMDB: a poster killed between commit and post delays by that, no more.

Delivery is at most once: an entry that a reader took before it died is gone.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import struct
import time
from collections.abc import Callable

import lmdb
import posix_ipc

from etha_ray.config import FAILURE_TIMEOUT
from etha_ray.errors import ConfigError, QueueClosedError, QueueError, QueueFullError, QueueHeldError
from etha_ray.tensor_bus.commands import BaseCommand
from etha_ray.tensor_bus.lmdb_file import open_file
from etha_ray.tensor_bus.messages import Message
from etha_ray.tensor_bus.queue_entry import CorruptEntry, cost_of, pack_entry, unpack_entry
from etha_ray.tensor_bus.semaphores import acquire, open_semaphore, queue_semaphore_name, unlink_quietly
from etha_ray.tensor_bus.write_lock import OPENING

logger = logging.getLogger(__name__)

MAP_SIZE = 256 << 20
_ENTRY_BYTES = MAP_SIZE * 3 // 4  # the rest is LMDB's own: even removing an entry takes free pages
_DATABASE = b"command_queue"
_SLICE_S = 0.2

_MOMENT = 0.05
"""Seconds that what does not wait waits for others' transactions, which take microseconds."""

_FORMAT_KEY = b"\0\0"
_FORMAT = b"1"
_STATE_KEY = b"\0"  # like the format, sorts before every position
_STATE = struct.Struct("<IQQQQ")  # flags, head, tail, capacity, bytes that the entries take
_SPACE_WANTED = 1
_WAKE = 2

_POSITION = struct.Struct(">Q")
_State = tuple[int, int, int, int, int]  # flags, head, tail, capacity, used


class CommandQueue:
    """Commands in the order in which they were put in; many writers (processes and threads), one reader.

    lmdb_path: the file, made if it is not there (mode 0600).
    capacity: the most entries it holds. The first to make the queue decides: it is stored, and ``capacity`` tells it.
    create: with False, a queue that is not there, or is just being removed, is a FileNotFoundError, and is not made.

    The entries together may also take no more than 192 MiB. Any thread may call any method; a thread that blocks keeps no
    other out. A forked child may go on using the queue it inherited.

    Raises `ConfigError` for a capacity below 1, `UnsafePathError` for a path that is not safely ours, `QueueError` for a file
    that holds something else. Every method but `close` raises `QueueClosedError` after `close`, and `QueueHeldError` if another process
    is stopped in the midst of its transaction: after `FAILURE_TIMEOUT`, or when less time was given; the reader after 0.2 s.
    """

    def __init__(self, lmdb_path: str | os.PathLike[str] = "/tmp/tensor_bus.lmdb", capacity: int = 50000, *, create: bool = True) -> None:
        if capacity < 1:
            raise ConfigError(f"capacity of the command queue at {os.fspath(lmdb_path)} is {capacity}; it must be at least 1")
        self.on_corrupt: Callable[[CorruptEntry], None] | None = None
        """Called by the reader, in its thread, for each entry it has to drop."""
        self._sleepers = 0
        while True:
            self._file = open_file(lmdb_path, map_size=MAP_SIZE, max_dbs=2, create=create)
            self.lmdb_path = self._file.path
            self._lock = self._file.lock
            try:
                self._attach()
                self.capacity = self._stored_capacity(capacity)
                self._items = open_semaphore(queue_semaphore_name(self.lmdb_path, "items"), create=create)
                self._space = open_semaphore(queue_semaphore_name(self.lmdb_path, "space"), create=create)
            except posix_ipc.ExistentialError:
                self._file.close()
                raise FileNotFoundError(f"{self.lmdb_path} is just being removed") from None
            except BaseException:
                self._file.close()
                raise
            if self._file.owns_path():
                return
            # Destroyed by another process meanwhile: these semaphores may be the next queue's.
            self.close(destroy=False)

    # --- writers ---

    def enqueue(self, msg: Message, *, block: bool = True, timeout: float | None = None) -> int:
        """Put a command at the end and return its position, counted from 0 over the queue's whole life.

        While the queue is full, waits for at most ``timeout`` seconds (None: as long as it takes), or with ``block=False`` not
        at all. Raises `QueueFullError` if there is no room then, or if the command could never fit, and `ConfigError` for a
        negative timeout or something that is no command.
        """
        if not isinstance(msg, BaseCommand):
            raise ConfigError(f"a {type(msg).__name__} cannot go into the command queue; it takes the commands of tensor_bus.commands")
        deadline = _deadline(timeout)
        entry = pack_entry(msg)
        if cost_of(entry) > _ENTRY_BYTES:
            raise QueueFullError(
                f"a {type(msg).__name__} of {len(entry)} bytes cannot fit into the command queue at {self.lmdb_path}, which holds "
                f"{_ENTRY_BYTES} bytes; split it, for instance into batches of fewer tensors"
            )
        patience = _MOMENT if not block else FAILURE_TIMEOUT if timeout is None else max(_MOMENT, min(FAILURE_TIMEOUT, timeout))
        position = self._append(entry, patience, block=block, waited=False)
        while position is None:
            if not block or not self._sleep(self._space, deadline):
                raise self._full(entry, timeout if block else None)
            position = self._append(entry, patience, block=block, waited=True)
        return position

    def check_free(self) -> None:
        """Raise `QueueHeldError` if one process was in its transaction whenever somebody called this, for the failure timeout. Cheap."""
        with self._lock:
            if self._file.attached:
                self._write_lock.check()

    def wake(self) -> None:
        """Let the reader's blocking call return early: the one waiting now, or else the next one."""
        with self._lock:
            # Where that cannot be written, the reader looks by itself: a slice later.
            with contextlib.suppress(QueueHeldError), self._transaction(_MOMENT) as txn:
                flags, head, tail, capacity, used = self._read_state(txn)
                _write_state(txn, flags | _WAKE, head, tail, capacity, used)
            _post(self._items)

    # --- the reader ---

    def dequeue(self, *, block: bool = False, timeout: float | None = None) -> Message | None:
        """Take the first command; None if there is none.

        With ``block`` waits for one, for at most ``timeout`` seconds (None: as long as it takes) or until `wake`. Corrupt
        entries are dropped on the way. Raises `ConfigError` for a negative timeout.
        """
        deadline = _deadline(timeout)
        while True:
            taken = self._take(1, block)
            if taken is None:
                return None
            position, entries = taken
            if entries:
                message = self._unpack(position, entries[0])
                if message is not None:
                    return message
            elif not block or not self._sleep(self._items, deadline):
                return None

    def dequeue_batch(self, max_count: int = 32, *, block: bool = False, timeout: float | None = None) -> list[Message]:
        """Take up to ``max_count`` commands in order, in one transaction; an empty list where `dequeue` gives None."""
        if max_count < 1:
            raise ConfigError(f"max_count is {max_count}; it must be at least 1")
        deadline = _deadline(timeout)
        while True:
            taken = self._take(max_count, block)
            if taken is None:
                return []
            first, entries = taken
            unpacked = (self._unpack(position, entry) for position, entry in enumerate(entries, first))
            if messages := [message for message in unpacked if message is not None]:
                return messages
            # Only corrupt ones: the next may be whole. Nothing at all: wait.
            if not entries and (not block or not self._sleep(self._items, deadline)):
                return []

    def peek(self) -> Message | None:
        """The first command, left where it is; None if there is none or it is corrupt."""
        with self._lock, self._transaction() as txn:
            _, head, tail, _, _ = self._read_state(txn)
            entry = txn.get(_POSITION.pack(head)) if tail > head else None
        message = None if entry is None else unpack_entry(head, entry)
        return None if isinstance(message, CorruptEntry) else message

    def clear(self) -> None:
        """Drop all entries; positions go on from where they were."""
        with self._lock:
            with self._transaction() as txn:
                flags, _, tail, capacity, _ = self._read_state(txn)
                txn.drop(self._db, delete=False)
                txn.put(_FORMAT_KEY, _FORMAT)
                _write_state(txn, flags & ~_SPACE_WANTED, tail, tail, capacity, 0)
            if flags & _SPACE_WANTED:
                _post(self._space)

    # --- both ---

    def size(self) -> int:
        """How many entries are in the queue."""
        with self._lock, self._transaction() as txn:
            _, head, tail, _, _ = self._read_state(txn)
            return tail - head

    def head(self) -> int:
        """The position of the first entry that has not been taken, or of the next one to come: all before it were taken."""
        with self._lock, self._transaction() as txn:
            return self._read_state(txn)[1]

    def is_empty(self) -> bool:
        """Whether there are no entries."""
        return self.size() == 0

    @property
    def env(self) -> lmdb.Environment | None:
        """The LMDB environment; None after `close`."""
        with self._lock, contextlib.suppress(QueueClosedError):
            return self._file.env
        return None

    def close(self, destroy: bool = True) -> None:
        """End this object's use of the queue; threads that wait in it get `QueueClosedError`. A second call does nothing.

        destroy: also remove the file and the semaphores. Those who still have the queue open keep the removed one; the next to
        open the path starts an empty queue. Processes that share a queue pass False, all but its owner.
        """
        with self._lock:
            if self._file.closed:
                return
            if destroy:
                self._file.unlink(before=self._unlink_semaphores)
            if not self._sleepers:
                self._close_semaphores()
            else:
                # Their memory must not go away under a sleeper: the last one to wake closes them.
                for _ in range(self._sleepers):
                    self._items.release()
                    self._space.release()
            self._file.close()

    def __repr__(self) -> str:
        try:
            return f"CommandQueue(path={str(self.lmdb_path)!r}, size={self.size()}, capacity={self.capacity})"
        except QueueClosedError:
            return f"CommandQueue(path={str(self.lmdb_path)!r}, closed)"

    # --- transactions ---

    def _transaction(self, patience: float = FAILURE_TIMEOUT) -> lmdb.Transaction[bytes]:
        """Begin one, in a forked child too. Called with the lock held."""
        if not self._file.attached:
            self._attach()
        self._write_lock.await_free(patience)
        return self._env.begin(self._db, write=True)

    def _attach(self) -> None:
        """Open the database here: at first, and again in a forked child. Called with the lock held."""
        self._env, self._write_lock = self._file.env, self._file.write_lock
        self._write_lock.await_free(OPENING)
        # In a transaction: without one open_db waits for LMDB's write lock with the GIL held, which a thread of this process
        # that has the lock may be waiting for.
        with self._env.begin(write=True) as txn:
            self._write_lock.confirm()
            self._db = self._env.open_db(_DATABASE, txn=txn)
        self._sleepers = 0

    def _stored_capacity(self, capacity: int) -> int:
        with self._transaction(OPENING) as txn:
            stored = txn.get(_FORMAT_KEY)
            if stored is None:
                txn.put(_FORMAT_KEY, _FORMAT)
                _write_state(txn, 0, 0, 0, capacity, 0)
            elif stored != _FORMAT:
                raise QueueError(
                    f"the command queue at {self.lmdb_path} has format {stored!r}, this etha_ray has {_FORMAT!r}; "
                    f"run the same version on both sides, or remove the file"
                )
            return self._read_state(txn)[3]

    def _read_state(self, txn: lmdb.Transaction) -> _State:
        try:
            state: _State = _STATE.unpack(txn.get(_STATE_KEY, b""))
        except struct.error as error:
            raise QueueError(f"{self.lmdb_path} is not a command queue, or is damaged; remove it or choose another path") from error
        return state

    def _append(self, entry: bytes, patience: float, *, block: bool, waited: bool, tries: int = 4) -> int | None:
        """Commit the entry and return its position; None if it has no room, and then room is asked for if ``block``."""
        cost = cost_of(entry)
        with self._lock:
            try:
                with self._transaction(patience) as txn:
                    flags, head, tail, capacity, used = self._read_state(txn)
                    if tail - head >= capacity or used + cost > _ENTRY_BYTES:
                        if block and not flags & _SPACE_WANTED:
                            _write_state(txn, flags | _SPACE_WANTED, head, tail, capacity, used)
                        return None
                    full_now = tail + 1 - head >= capacity
                    if waited and full_now:
                        flags |= _SPACE_WANTED
                    txn.put(_POSITION.pack(tail), entry)
                    _write_state(txn, flags, head, tail + 1, capacity, used + cost)
            except lmdb.MapFullError:
                # There are free pages, but not enough in a row. What this writes lets LMDB use again what was freed just now.
                self._ask_for_room()
                if head != tail:
                    return None
                if tries == 0:
                    raise QueueFullError(
                        f"a command of {len(entry)} bytes has no room in the LMDB map ({MAP_SIZE} bytes) of the command queue at "
                        f"{self.lmdb_path}, which is empty; split it, for instance into batches of fewer tensors"
                    ) from None
                return self._append(entry, patience, block=block, waited=waited, tries=tries - 1)
            _post(self._items)
            if waited and not full_now:
                _post(self._space)
            return tail

    def _ask_for_room(self) -> None:
        with self._transaction() as txn:
            flags, head, tail, capacity, used = self._read_state(txn)
            _write_state(txn, flags | _SPACE_WANTED, head, tail, capacity, used)

    def _take(self, max_count: int, block: bool) -> tuple[int, list[bytes | None]] | None:
        """The first position taken and what is stored from there on; None if there is nothing, but a wake-up was asked for."""
        with self._lock:
            with self._transaction(_SLICE_S) as txn:
                flags, head, tail, capacity, used = self._read_state(txn)
                woken = block and flags & _WAKE
                if head == tail:
                    if not woken:
                        return head, []
                    _write_state(txn, flags & ~_WAKE, head, tail, capacity, used)
                    return None
                entries = []
                for position in range(head, min(head + max_count, tail)):
                    entry = txn.pop(_POSITION.pack(position))
                    entries.append(entry)
                    used -= 0 if entry is None else cost_of(entry)
                after = head + len(entries)
                # Entries that were damaged may have another length now: an empty queue sets the account right.
                used = 0 if after == tail else max(used, 0)
                _write_state(txn, 0 if woken else flags & _WAKE, after, tail, capacity, used)
            if flags & _SPACE_WANTED:
                _post(self._space)
            return head, entries

    # --- waiting and closing ---

    def _sleep(self, semaphore: posix_ipc.Semaphore, deadline: float) -> bool:
        """Wait for a post, one slice at most; False if the time is over. LMDB is to be looked at after each True."""
        remaining = deadline - time.monotonic()
        if remaining <= 0:
            return False
        with self._lock:
            if not self._file.attached:
                self._attach()
            self._sleepers += 1
        try:
            acquire(semaphore, min(remaining, _SLICE_S))
        except (posix_ipc.BusyError, posix_ipc.SignalError):
            return True  # the slice is over, or a signal came and its handler has run
        finally:
            with self._lock:
                self._sleepers -= 1
                if self._file.closed and not self._sleepers:
                    self._close_semaphores()
        return True

    def _close_semaphores(self) -> None:
        self._items.close()
        self._space.close()

    def _unlink_semaphores(self) -> None:
        unlink_quietly(self._items.name)
        unlink_quietly(self._space.name)

    def _full(self, entry: bytes, timeout: float | None) -> QueueFullError:
        waited = "" if timeout is None else f" and stayed so for {timeout} s"
        return QueueFullError(
            f"the command queue at {self.lmdb_path} is full (capacity {self.capacity} entries, {_ENTRY_BYTES} bytes){waited}: "
            f"no room for {len(entry)} bytes; check that its agent is running, wait longer, or make the queue with a larger capacity"
        )

    def _unpack(self, position: int, entry: bytes | None) -> Message | None:
        message = unpack_entry(position, entry)
        if not isinstance(message, CorruptEntry):
            return message
        start = "nothing" if entry is None else entry[:32].hex(" ")
        logger.error("dropped the corrupt entry %d of %s: %s; starts with %s", position, self.lmdb_path, message.reason, start)
        if self.on_corrupt is not None:
            try:
                self.on_corrupt(message)
            except Exception:
                # The entries behind it are already out of LMDB and must still be delivered.
                logger.exception("on_corrupt failed for entry %d of %s", position, self.lmdb_path)
        return None


def _deadline(timeout: float | None) -> float:
    if timeout is None:
        return math.inf
    if not timeout >= 0:  # NaN too
        raise ConfigError(f"timeout is {timeout}; it must be None or a number of seconds from 0 on")
    return time.monotonic() + timeout


def _post(semaphore: posix_ipc.Semaphore) -> None:
    if not semaphore.value:
        semaphore.release()


def _write_state(txn: lmdb.Transaction, flags: int, head: int, tail: int, capacity: int, used: int) -> None:
    txn.put(_STATE_KEY, _STATE.pack(flags, head, tail, capacity, used))
