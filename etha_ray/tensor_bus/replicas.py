"""Who holds which version of a batch: said in the store by the agents of those that receive, read by anybody's.

It is said beside the path of transfers: what changes within a hundredth of a second is written once, by one job at a time, and no
transfer waits for it. So what is read is a moment old. A member is listed once a receive has completed, and not any more soon after its
tensors began to be written in place, were torn, or its batch was closed; one whose worker or agent is dead is passed over by readers,
who remove it. Owned by the loop, but for what its jobs do.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

from etha_ray.errors import StoreError
from etha_ray.kvstore import KVStore
from etha_ray.replica import Replica, ReplicaMember
from etha_ray.tensor_bus.bus import Member
from etha_ray.tensor_bus.commands import ReadyReplicas
from etha_ray.tensor_bus.jobs import Cancellation, Job, Jobs
from etha_ray.tensor_bus.members import gone_among
from etha_ray.tensor_bus.outcomes import Outcomes
from etha_ray.tensor_bus.records import ReplicaRecord, decode, encode, part, replica_key, replica_prefix

logger = logging.getLogger(__name__)

_GATHER = 0.01
"""Seconds in which changes are gathered before they are written."""

_AGAIN = 0.5
"""Seconds after which a store that was away is tried again."""


class Replicas:
    """Says what this agent's workers hold, and reads what all do.

    Args:
        store: where it is said.
        jobs: what runs beside the loop.
        outcomes: what answers commands.
    """

    def __init__(self, store: KVStore, jobs: Jobs, outcomes: Outcomes) -> None:
        self._store = store
        self._jobs = jobs
        self._outcomes = outcomes
        self._lock = threading.Lock()
        self._changes: dict[str, bytes | None] = {}
        self._said: set[str] = set()
        self._hurry = threading.Event()
        self._closed = False
        self._job: Job[bool] | None = None
        self._then: list[Callable[[], None]] = []

    def holds(self, member: Member, version: int) -> None:
        """The tensors of a batch were received at this version; 0: they hold none any more."""
        for place in member.registered.memberships:
            key = replica_key(place.pair, place.member.peer, member.batch_id, place.index)
            with self._lock:
                if version:
                    self._changes[key] = encode(ReplicaRecord(place.member, place.index, place.size, version))
                    self._said.add(key)
                elif key in self._said:  # what was never said need not be taken back
                    self._changes[key] = None
        self._start()

    def drop(self, member: Member, then: Callable[[], None]) -> None:
        """A batch was closed; ``then`` runs once nobody finds it here any more."""
        self.holds(member, 0)
        if self._job is None:
            then()
        else:
            self._then.append(then)
            self._hurry.set()

    def answer(self, command: ReadyReplicas) -> None:
        """Answer with the `Replica`s of a pair, of members that hold this version."""
        self._jobs.start(f"ready {command.pair_name}", lambda _: self._read(command), lambda job: self._read_over(command, job))

    def close(self) -> None:
        """Wait for no store that is away any more."""
        self._closed = True
        self._hurry.set()

    def _start(self) -> None:
        if self._job is None and self._changes:
            self._job = self._jobs.start("say versions", self._say, self._said_all)

    def _say(self, _: Cancellation) -> bool:
        """Write all changes; False if that was given up, as the store is away and somebody waits."""
        pause = _GATHER
        while True:
            self._hurry.wait(pause)
            with self._lock:
                changes, self._changes = self._changes, {}
            try:
                while changes:
                    self._write(*next(iter(changes.items())))
                    del changes[next(iter(changes))]
                pause = _GATHER
            except StoreError as error:
                logger.warning("which versions are held could not be said in the store: %s", error)
                pause = _AGAIN
                with self._lock:
                    self._changes = {**changes, **self._changes}
                if self._hurry.is_set():
                    return False
            if not self._changes:
                return True

    def _write(self, key: str, data: bytes | None) -> None:
        if data is not None:
            self._store.set_bytes(key, data)
            return
        self._store.delete(key)
        with self._lock:
            if key not in self._changes:
                self._said.discard(key)

    def _said_all(self, job: Job[bool]) -> None:
        self._job = None
        if job.error is not None:
            logger.error("saying versions failed", exc_info=job.error)
        elif self._changes and job.value:
            self._start()  # these came in as the job ended
            return
        if not self._closed:
            self._hurry.clear()
        callbacks, self._then = self._then, []
        for callback in callbacks:
            callback()
        if not self._closed:
            self._start()

    def _read(self, command: ReadyReplicas) -> list[Replica]:
        stored = self._store.list(replica_prefix(command.pair_name))
        found = {key: decode(value, ReplicaRecord, key) for key, value in stored.items()}
        if command.batch_id is not None:
            chosen = part(command.batch_id)
            found = {key: record for key, record in found.items() if key.split("/")[-2] == chosen}
        gone = gone_among(self._store, (record.member for record in found.values()))
        for key, record in found.items():
            if record.member.attempt in gone and self._store.get_bytes(key) == stored[key]:
                self._store.delete(key)
        sides: dict[tuple[str, int], dict[int, list[ReplicaRecord]]] = {}
        for record in found.values():
            if record.member.attempt not in gone:
                sides.setdefault((record.member.peer, record.size), {}).setdefault(record.index, []).append(record)
        replicas = (_replica(name, size, members, command.version) for (name, size), members in sorted(sides.items()))
        return [replica for replica in replicas if replica.members]

    def _read_over(self, command: ReadyReplicas, job: Job[list[Replica]]) -> None:
        if job.error is None:
            self._outcomes.ok(command, job.value)
        else:
            self._outcomes.failed(command, job.error)


def _replica(name: str, size: int, members: dict[int, list[ReplicaRecord]], version: int) -> Replica:
    ready = []
    for index, records in sorted(members.items()):
        lowest = min(record.version for record in records)
        if lowest >= version:
            who = records[0].member
            ready.append(ReplicaMember(index, lowest, who.agent.rank, who.agent.hostname, who.worker_pid))
    return Replica(name, size, tuple(ready))
