"""What workers let one another know before they are a pair: the agent's part. Owned by the loop.

A notice is a few bytes under a topic and a slot in the key-value store. It is there for as long as the worker that announced it:
removed when that leaves, and passed over by all readers (who remove it) once the worker or its agent is dead. What is larger, and
the same for many, is stored once, under its digest.
"""

from __future__ import annotations

import logging
import secrets
from collections.abc import Callable
from typing import Any

from etha_ray.errors import CoordinateTakenError, StoreError
from etha_ray.kvstore import KVStore
from etha_ray.tensor_bus.commands import Announce, BaseCommand, ReadBody, ReadNotices, Withdraw
from etha_ray.tensor_bus.jobs import Cancellation, Job, Jobs
from etha_ray.tensor_bus.journal import Journal
from etha_ray.tensor_bus.members import gone_among, release, take
from etha_ray.tensor_bus.outcomes import Outcomes
from etha_ray.tensor_bus.records import AgentRecord, NoticeRecord, decode, encode, fingerprint, manifest_key, notice_prefix, part
from etha_ray.tensor_bus.withdrawals import Withdrawals
from etha_ray.tensor_bus.workers import Worker

logger = logging.getLogger(__name__)


class Notices:
    """Announces and reads.

    Args:
        record: who the agent is.
        store: where notices are.
        jobs: what runs beside the loop.
        outcomes: what answers commands.
        journal: what the next agent here would have to know.
        withdrawals: what takes notices back.
    """

    def __init__(
        self, record: AgentRecord, store: KVStore, jobs: Jobs, outcomes: Outcomes, journal: Journal, withdrawals: Withdrawals
    ) -> None:
        self._record = record
        self._store = store
        self._jobs = jobs
        self._outcomes = outcomes
        self._journal = journal
        self._withdrawals = withdrawals
        self._announced: dict[str, NoticeRecord] = {}
        """What this agent has put into the store and not taken back, by key."""

    def announce(self, worker: Worker, command: Announce) -> None:
        """Publish a worker's notice, in place of its earlier one in that slot.

        The worker is answered with `CoordinateTakenError` while another worker, that lives, has one there.
        """
        key = notice_prefix(command.topic) + part(command.slot)
        notice = NoticeRecord(
            attempt=secrets.token_hex(8),
            client_id=command.client_id,
            worker_pid=worker.pid,
            worker_start_time=worker.start_time,
            agent=self._record,
            data=command.data,
        )
        worker.notices[key] = notice
        self._announced.pop(key, None)  # whatever comes of this one, the one before is not to be put back
        self._journal.announced(command)

        def publish(_: Cancellation) -> None:
            if command.body:
                body = manifest_key(fingerprint(command.body))
                if not self._store.exists(body):
                    self._store.set_bytes(body, command.body)
            holder = take(self._store, key, notice)
            if holder is not None:
                raise CoordinateTakenError(
                    f"{command.slot!r} of {command.topic!r} is taken by pid {holder.worker_pid} on agent {holder.agent.rank}"
                    f" ({holder.agent.hostname}); this is pid {worker.pid} on agent {self._record.rank}. Give each worker a rank of"
                    " its own, another name to what is published twice, or close the other worker's first"
                )

        def over(job: Job[None]) -> None:
            current = worker.notices.get(key) is notice  # or else the worker left meanwhile
            if current and job.error is not None:
                del worker.notices[key]
                self._journal.withdrawn(command.client_id, command.topic, command.slot)
            if not current or isinstance(job.error, StoreError):  # it may be there all the same
                self._remove({key: notice}, lambda: None)
            elif job.error is None:
                self._announced[key] = notice
            self._answer(command, job)

        self._jobs.start(f"announce {command.topic}", publish, over)

    def read(self, command: ReadNotices) -> None:
        """Answer with the data of all notices under a topic whose workers live, by slot.

        Those of this agent's own workers that are there no more are put there again: where an agent takes the place of a dead one, readers
        that mean the dead one's notices may remove those that have just been put in their place.
        """
        prefix = notice_prefix(command.topic)
        own = {key: notice for key, notice in self._announced.items() if key.startswith(prefix)}
        again: dict[str, NoticeRecord] = {}

        def look(_: Cancellation) -> dict[str, bytes]:
            found = {key: decode(value, NoticeRecord, key) for key, value in self._store.list(prefix).items()}
            for key in own.keys() - found.keys():
                mine = encode(own[key])
                if self._store.compare_and_set(key, None, mine) == mine:
                    found[key] = again[key] = own[key]
            gone = gone_among(self._store, found.values())
            for key, notice in found.items():
                if gone.get(notice.attempt):
                    release(self._store, key, notice)
            return {key.removeprefix(prefix): notice.data for key, notice in found.items() if notice.attempt not in gone}

        def over(job: Job[dict[str, bytes]]) -> None:
            withdrawn = {key: notice for key, notice in again.items() if self._announced.get(key) is not notice}
            if withdrawn:
                self._remove(withdrawn, lambda: None)
            self._answer(command, job)

        self._jobs.start(f"read {command.topic}", look, over)

    def read_body(self, command: ReadBody) -> None:
        """Answer with the body that has this digest."""
        key = manifest_key(command.digest)

        def look(_: Cancellation) -> bytes:
            data = self._store.get_bytes(key)
            if data is None or fingerprint(data) != command.digest:
                raise StoreError(f"store key {key!r} does not hold what its name says: another program writes to this namespace")
            return data

        self._jobs.start("read a notice's body", look, lambda job: self._answer(command, job))

    def withdraw(self, worker: Worker, command: Withdraw) -> None:
        """Remove one of a worker's notices, if it is there."""
        key = notice_prefix(command.topic) + part(command.slot)
        notice = worker.notices.pop(key, None)
        self._journal.withdrawn(command.client_id, command.topic, command.slot)
        if notice is None:
            self._outcomes.ok(command)
        else:
            self._remove({key: notice}, lambda: self._outcomes.ok(command))

    def drop(self, worker: Worker, then: Callable[[], None]) -> None:
        """Remove all that a worker announced; ``then`` runs once that is done, or the store found to be away.

        What is just being announced goes when it is.
        """
        held, worker.notices = worker.notices, {}
        if not held:
            then()
            return
        self._remove(held, then)

    def _remove(self, held: dict[str, NoticeRecord], then: Callable[[], None]) -> None:
        for key, notice in held.items():
            if self._announced.get(key) is notice:
                del self._announced[key]

        def remove() -> None:
            for key, notice in held.items():
                release(self._store, key, notice)

        self._withdrawals.start("withdraw notices", remove, then)

    def _answer(self, command: BaseCommand, job: Job[Any]) -> None:
        if job.error is None:
            self._outcomes.ok(command, job.value)
        else:
            self._outcomes.failed(command, job.error)
