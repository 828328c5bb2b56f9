"""Changes in etcd that are made once, however many attempts it takes.

Where no answer comes, nobody knows whether etcd has done, or will yet do, what was asked. So each transaction also writes a *slot*, a small
key of this client, and is carried out only if the slot is as the change before left it. After a lost answer the next request reads the
slot, and so learns that the change was made; or, if it was not, writes the slot itself, and what may still be under way will fail.

A slot serves one change after the other. There are as many as there were threads that changed something at once, of about 100 bytes each;
they are removed when the store is closed, and those of a killed process when the namespace is cleaned up.
"""

from __future__ import annotations

import itertools
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from etha_ray.kvstore.etcd_client import DELETE_RANGE, TXN, EtcdClient, end_of, etcdrpc


@dataclass(frozen=True)
class Commit:
    """What became of a change: whether it was ``done``, and if so by which ``revision``, and what etcd answered to its parts.

    ``answers`` is None if they were lost; that it was done is known from its slot then.
    """

    done: bool
    revision: int = 0
    answers: Sequence[Any] | None = None


@dataclass
class _Slot:
    key: bytes
    version: int = 0
    unsettled: bool = False
    """Whether a transaction that writes it was sent, and not answered."""


class Transactions:
    """The changes of one client, by any number of threads."""

    def __init__(self, client: EtcdClient, home: str) -> None:
        """``home`` is what the keys of the slots begin with."""
        self._client = client
        self._home = f"{home}%op/{uuid.uuid4().hex}/".encode()
        self._slots: list[_Slot] = []
        self._count = itertools.count()

    def commit(self, compare: Sequence[Any], success: Sequence[Any], tolerated: str = "") -> Commit | None:
        """Makes the change ``success`` if ``compare`` holds, once; None if etcd refuses it with the status ``tolerated``.

        Raises what `EtcdClient.call` raises; after a `StoreUnavailableError` it was made or not, and may still be.
        """
        try:
            slot = self._slots.pop()
        except IndexError:
            slot = _Slot(self._home + b"%d" % next(self._count))
        commit = self._client.until_answered(lambda: self._commit_once(slot, compare, success, tolerated))
        self._slots.append(slot)  # after an error nobody knows its version, and it is left alone
        return commit

    def forget(self) -> None:
        """Removes the slots."""
        self._client.call(DELETE_RANGE, etcdrpc.DeleteRangeRequest(key=self._home, range_end=end_of(self._home)))

    def _commit_once(self, slot: _Slot, compare: Sequence[Any], success: Sequence[Any], tolerated: str) -> Commit | None:
        revision = self._settle(slot) if slot.unsettled else None
        if revision is not None:
            return Commit(True, revision)
        while True:
            answer = self._write_slot(slot, b"done", compare, success, tolerated)
            if answer is None:
                return None
            if answer.succeeded:
                slot.version += 1
                return Commit(True, answer.header.revision, answer.responses[1:])
            stored = _entry(answer)
            version = stored.version if stored else 0
            if version == slot.version:
                return Commit(False)
            slot.version = version  # somebody has cleaned up the namespace, and the slot with it

    def _settle(self, slot: _Slot) -> int | None:
        """The revision of the change whose answer was lost; None if it was not done, and then it never will be."""
        answer = self._write_slot(slot, b"void")
        stored = None if answer.succeeded else _entry(answer)
        before = slot.version
        slot.version = before + 1 if answer.succeeded else stored.version if stored else 0
        if stored is not None and stored.version == before + 1 and stored.value == b"done":
            return int(stored.mod_revision)
        return None

    def _write_slot(self, slot: _Slot, value: bytes, compare: Sequence[Any] = (), success: Sequence[Any] = (), tolerated: str = "") -> Any:
        """One attempt at a transaction that also writes the slot, or reads it if it fails."""
        untouched = etcdrpc.Compare(key=slot.key, target=etcdrpc.Compare.VERSION, result=etcdrpc.Compare.EQUAL, version=slot.version)
        read = etcdrpc.RequestOp(request_range=etcdrpc.RangeRequest(key=slot.key))
        txn = etcdrpc.TxnRequest(compare=[untouched, *compare], success=[put_op(slot.key, value), *success], failure=[read])
        slot.unsettled = True
        answer = self._client.attempt(TXN, txn, tolerated)
        slot.unsettled = False
        return answer


def _entry(answer: Any) -> Any:
    """The slot as a transaction that failed has read it; None if it is missing."""
    return next(iter(answer.responses[0].response_range.kvs), None)


def put_op(key: bytes, value: bytes, lease: int = 0) -> Any:
    """A part of a transaction: puts the key, under the lease if there is one."""
    return etcdrpc.RequestOp(request_put=etcdrpc.PutRequest(key=key, value=value, lease=lease))


def delete_op(start: bytes, end: bytes = b"") -> Any:
    """A part of a transaction: deletes the keys from ``start`` up to ``end``, or only ``start``."""
    return etcdrpc.RequestOp(request_delete_range=etcdrpc.DeleteRangeRequest(key=start, range_end=end))


def exists(key: bytes) -> Any:
    """A condition of a transaction: the key is there."""
    return etcdrpc.Compare(key=key, target=etcdrpc.Compare.CREATE, result=etcdrpc.Compare.GREATER, create_revision=0)


def unchanged(key: bytes, revision: int) -> Any:
    """A condition of a transaction: the key was last written by ``revision``; 0 for a key that is missing."""
    return etcdrpc.Compare(key=key, target=etcdrpc.Compare.MOD, result=etcdrpc.Compare.EQUAL, mod_revision=revision)
