"""An agent's record in the store, there for as long as the agent lives: what makes it known to agents of other hosts, and its death."""

from __future__ import annotations

import logging
import time
from typing import Any

from etha_ray.config import FAILURE_TIMEOUT
from etha_ray.kvstore import KVStore
from etha_ray.kvstore.lease import Lease
from etha_ray.tensor_bus.jobs import Job, Jobs
from etha_ray.tensor_bus.records import AGENTS, MANIFESTS, VERDICTS, AgentRecord, agent_key, encode

logger = logging.getLogger(__name__)

_LATE = 1.5
"""Seconds after which an answer of the store is missed. It is asked three times in `FAILURE_TIMEOUT`."""


class Presence:
    """Puts ``record`` into ``store`` under a lease, and again where that is lost. On the agent's loop only, which never waits for it.

    Made, it has published; raises `StoreError` where the store cannot be reached.
    """

    def __init__(self, record: AgentRecord, store: KVStore, jobs: Jobs) -> None:
        self._record = record
        self._store = store
        self._jobs = jobs
        self._publishing = False
        self._left = False
        self.silent_since = 0.0
        """Since when the store does not answer, in seconds since the epoch; 0 while it does."""
        self.lease = self._publish()

    def check_store(self) -> None:
        """Notice that the store does not answer, or does again."""
        silence = self.lease.silence
        silent = silence > _LATE
        if silent and not self.silent_since:
            logger.warning("agent %d: the store has not answered for %.1f s", self._record.rank, silence)
            self.silent_since = time.time() - silence
        elif not silent and self.silent_since:
            logger.warning("agent %d: the store answers again, after %.1f s", self._record.rank, time.time() - self.silent_since)
            self.silent_since = 0.0

    def renew(self) -> None:
        """Take a new lease where one was lost, with a store that was away for long or when this process was stopped."""
        if self._publishing or self.lease.alive:
            return

        def over(job: Job[Lease]) -> None:
            self._publishing = False
            if job.value is None:
                _log_error(job)
                return
            self.lease = lease = job.value
            if self._left:  # the one before was closed already
                self._jobs.start("leave the store", lambda _: self._leave(lease), _log_error)

        self._publishing = True
        self._jobs.start("publish the agent", lambda _: self._publish(), over)

    def leave(self) -> None:
        """Take the record back, beside the loop."""
        self._left = True
        lease = self.lease
        self._jobs.start("leave the store", lambda _: self._leave(lease), _log_error)

    def close(self) -> None:
        """Take the record back at once, where there is no loop to go on beside it."""
        self.lease.close()

    def _leave(self, lease: Lease) -> None:
        lease.close()
        # A description is there once for all who share it, so it is nobody's own to remove, and a verdict's addressee may be dead.
        # Who is the last to leave removes them, unless the store is away: nobody waits for that.
        if not self.silent_since and not self._store.list(AGENTS):
            self._store.delete_prefix(MANIFESTS)
            self._store.delete_prefix(VERDICTS)

    def _publish(self) -> Lease:
        lease = self._store.lease(FAILURE_TIMEOUT)
        try:
            lease.set_bytes(agent_key(self._record.rank), encode(self._record))
        except BaseException:
            lease.close()
            raise
        return lease


def _log_error(job: Job[Any]) -> None:
    if job.error is not None:
        logger.warning("the agent's record in the store: %s", job.error)
