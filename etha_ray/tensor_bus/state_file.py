"""The agent's state LMDB: what its clients and the agents of the same host may read of it.

One writer, the agent; any number of readers. It holds

- ``agent:heartbeat``            wall clock seconds of the last beat, as text
- ``agent:record``               `AgentRecord`
- ``agent:claimed``              wall clock seconds at which the agent took this place; its heart beats once it serves
- ``agent:first``                position in the command queue from which on this agent takes commands
- ``agent:stopped``              there once the agent was shut down; clients that still have the file open look for it
- ``outcome:{semaphore}``        the encoded outcome of the command that named this semaphore
- ``journal:{client}:...``       what the agent serves, for the one that takes its place if it dies (see `journal`)
- ``handles:{registration}``     memory handles of a batch, for the agents that will read this memory
- ``held:{client}/{digest}``     `versions.Holding` of the batch whose id has this digest
- ``pair:{pair}/state:match``    "matched" once a pair is complete
- ``agent:status``               `snapshot.AgentStatus`, at most one heartbeat old
- ``history:{place}``            `history.PastTransfer`, the last ones in a ring
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager

import lmdb
import msgspec

from etha_ray.decoding import Decoder
from etha_ray.tensor_bus.lmdb_file import open_file
from etha_ray.tensor_bus.records import AgentRecord, fingerprint
from etha_ray.tensor_bus.write_lock import OPENING

DATABASE = b"pair_state"
_HEARTBEAT = b"agent:heartbeat"
_RECORD = b"agent:record"
_STOPPED = b"agent:stopped"
_CLAIMED = b"agent:claimed"
_FIRST = b"agent:first"
_HELD = b"held:"
OUTCOME = b"outcome:"
"""What the keys of outcomes begin with."""
JOURNAL = b"journal:"
"""What the keys of an agent's journal begin with."""
STATUS = b"agent:status"
HISTORY = b"history:"
_MAP_SIZE = 1 << 30


class StateFile:
    """A state LMDB, opened to write (``create=True``, the agent) or to read.

    Safe to use from several threads, one of which may close it meanwhile. Every method but `close` raises `QueueClosedError`
    after `close`.

    Raises FileNotFoundError when it is opened to read and no agent has written there yet, and `QueueHeldError` when its agent is stopped
    in the midst of a write; who has it open can read on.
    """

    def __init__(self, path: str, *, create: bool = False) -> None:
        self.path = path
        self._create = create
        self._file = open_file(path, map_size=_MAP_SIZE, max_dbs=2, create=create)
        try:
            self._attach()
        except lmdb.NotFoundError:
            self._file.close()
            raise FileNotFoundError(f"{path} holds no agent's state yet") from None
        except BaseException:
            self._file.close()
            raise

    def put(self, key: bytes, value: bytes) -> None:
        """Store ``value``."""
        # Every command's outcome passes here and through `get`: no context manager of ours around the transaction.
        with self._file.lock:
            if not self._file.attached:
                self._attach()
            with self.env.begin(self.db, write=True) as txn:
                txn.put(key, value)

    def put_all(self, values: dict[bytes, bytes]) -> None:
        """Store several values at once."""
        with self._transaction(write=True) as txn:
            for key, value in values.items():
                txn.put(key, value)

    def values(self, prefix: bytes) -> list[bytes]:
        """All values whose keys begin with ``prefix``, in the order of their keys."""
        found = []
        with self._transaction() as txn, txn.cursor() as cursor:
            there = cursor.set_range(prefix)
            while there and bytes(cursor.key()).startswith(prefix):
                found.append(bytes(cursor.value()))
                there = cursor.next()
        return found

    def get(self, key: bytes) -> bytes | None:
        """Read a value, None if there is none."""
        with self._transaction() as txn:
            value = txn.get(key)
        return None if value is None else bytes(value)

    def delete(self, keys: list[bytes]) -> None:
        """Remove keys; missing ones are passed over."""
        with self._transaction(write=True) as txn:
            for key in keys:
                txn.delete(key)

    def beat(self) -> None:
        """Record that the agent is alive now."""
        self.put(_HEARTBEAT, repr(time.time()).encode())

    def heartbeat(self) -> float | None:
        """Wall clock seconds of the agent's last beat, None if it never had one."""
        return self._seconds(_HEARTBEAT)

    def claimed(self) -> float | None:
        """Wall clock seconds at which the agent took this place, None if none has."""
        return self._seconds(_CLAIMED)

    def _seconds(self, key: bytes) -> float | None:
        value = self.get(key)
        try:
            seconds = float(value) if value is not None else math.nan
        except ValueError:
            return None
        return seconds if math.isfinite(seconds) else None

    def record(self) -> AgentRecord | None:
        """Who the agent is, None when it has not said or the bytes are not a record."""
        value = self.get(_RECORD)
        return None if value is None else _decoded(value)

    def take_over(self, seen: AgentRecord | None, record: AgentRecord) -> bool:
        """Say who the agent is from now on; False if that is no longer ``seen``.

        Of what the one before wrote, its journal, what batches hold, and the outcomes that clients may still read are kept.
        """
        with self._transaction(write=True) as txn:
            found = txn.get(_RECORD)
            if found is not None and _decoded(bytes(found)) != seen:
                return False
            for key in [bytes(key) for key in txn.cursor().iternext(values=False)]:
                if not key.startswith((JOURNAL, OUTCOME, _HELD)):
                    txn.delete(key)
            txn.put(_RECORD, msgspec.msgpack.encode(record))
            txn.put(_CLAIMED, repr(time.time()).encode())
        return True

    def put_stopped(self) -> None:
        """Say that the agent was shut down."""
        self.put(_STOPPED, b"1")

    def stopped(self) -> bool:
        """Whether the agent was shut down."""
        return self.get(_STOPPED) is not None

    def put_first(self, position: int) -> None:
        """Say which position in the queue is the first that this agent takes: it has seen no command before that."""
        self.put(_FIRST, str(position).encode())

    def first(self) -> int:
        """What `put_first` said; 0 while the agent is starting up, or where that is no number."""
        try:
            return int(self.get(_FIRST) or b"0")
        except ValueError:
            return 0

    def under(self, prefix: bytes) -> dict[bytes, bytes]:
        """All keys that begin with ``prefix``, and their values."""
        found = {}
        with self._transaction() as txn:
            cursor = txn.cursor()
            if cursor.set_range(prefix):
                for key, value in cursor:
                    if not bytes(key).startswith(prefix):
                        break
                    found[bytes(key)] = bytes(value)
        return found

    def owns_path(self) -> bool:
        """Whether the path still leads to this file."""
        return self._file.owns_path()

    def check_readers(self) -> None:
        """Free the reader slots of processes that were killed while reading."""
        with self._file.lock:
            self._file.env.reader_check()

    def close(self, *, destroy: bool = False) -> None:
        """Close this opening; with ``destroy`` remove the file. May be called more than once."""
        with self._file.lock:
            if self._file.closed:
                return
            if destroy:
                self._file.unlink()
            self._file.close()

    def _attach(self) -> None:
        self.env = self._file.env
        self._file.write_lock.await_free(OPENING)
        # In a transaction: without one open_db waits for LMDB's write lock with the GIL held, which a thread of this process
        # that has the lock may be waiting for.
        with self.env.begin(write=True) as txn:
            self._file.write_lock.confirm()
            self.db = self.env.open_db(DATABASE, txn=txn, create=self._create)

    @contextmanager
    def _transaction(self, *, write: bool = False) -> Iterator[lmdb.Transaction]:
        with self._file.lock:
            if not self._file.attached:  # closed, or in a forked child
                self._attach()
            with self.env.begin(write=write, db=self.db) as txn:
                yield txn


_records = Decoder(AgentRecord)


def _decoded(data: bytes) -> AgentRecord | None:
    try:
        return _records.decode(data)
    except msgspec.DecodeError:
        return None


def outcome_key(semaphore_name: str) -> bytes:
    """Where the outcome of the command that named this semaphore is."""
    return OUTCOME + semaphore_name.encode()


def history_key(place: int) -> bytes:
    """Where the transfer at this place of the ring is."""
    return HISTORY + f"{place:04d}".encode()


def handles_key(registration: str) -> bytes:
    """Where the memory handles of a registration are."""
    return b"handles:" + registration.encode()


def holding_key(client_id: str, batch_id: str) -> bytes:
    """Where it stands what a client's batch holds."""
    return holding_prefix(client_id) + fingerprint(batch_id).encode()


def holding_prefix(client_id: str) -> bytes:
    """What the keys begin with that say what a client's batches hold."""
    return _HELD + f"{client_id}/".encode()


def pair_state_key(pair_name: str) -> bytes:
    """Where a pair's match state is. LMDB keys end at 511 bytes, so long names are cut."""
    return f"pair:{pair_name}/state:match".encode()[:511]
