"""The batches of one client, from its own side: their memory, whether they are registered yet, and how they end."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections import defaultdict
from collections.abc import Mapping

from etha_ray.config import check_timeout
from etha_ray.cuda.marks import Mark, settle
from etha_ray.errors import (
    AgentDiedError,
    AgentFailedError,
    BatchClosedError,
    BatchExistsError,
    BatchUnmatchedError,
    EthaRayError,
    TransferTimeoutError,
    UnknownBatchError,
)
from etha_ray.memory import ExportedTensors
from etha_ray.tensor_bus.commands import CancelTransfer, CleanupBatch, HurryTransfer, MakeDigest, WaitReady, WaitVersion
from etha_ray.tensor_bus.connection import Connection
from etha_ray.tensor_bus.reply import Reply
from etha_ray.tensor_bus.state_file import holding_key
from etha_ray.tensor_bus.versions import Holding

logger = logging.getLogger(__name__)

AT_ONCE = 0.1
"""Seconds that what does not wait gives the agent."""


class OwnBatch:
    """What is kept of one: the memory it exported, its mark on the GPU, the registration's reply until it is read, and the last receive's.

    ``timed``: the agent ends the registration when its time is up; otherwise it goes on until the batch is closed.
    """

    def __init__(self, exported: ExportedTensors, mark: Mark | None, registration: Reply, *, timed: bool) -> None:
        self.exported = exported
        self.mark = mark
        self.registration: Reply | None = registration
        self.receive: Reply | None = None
        self.timed = timed


class OwnBatches:
    """By their ids. ``lock`` is held while a batch is added, and taken by whoever must not see one half added."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._batches: dict[str, OwnBatch] = {}
        self._marks: dict[int, list[Mark]] = defaultdict(list)  # of batches that are closed, by GPU
        self.lock = threading.RLock()

    @property
    def ids(self) -> list[str]:
        """Of all that are known, sorted."""
        return sorted(self._batches)

    def check_free(self, batch_id: str) -> None:
        """Raise `BatchExistsError` if there is one of this id."""
        if batch_id in self._batches:
            raise BatchExistsError(f"batch {batch_id!r} is registered already: close its handler first, or use another id")

    def add(self, batch_id: str, exported: ExportedTensors, registration: Reply, *, timed: bool) -> None:
        """One that the agent has been asked to register; ``timed``: see `OwnBatch`.

        Marks live as long as this client, and are used again: the agent may still look at that of a batch which has just been closed,
        and CUDA leaves open what it sees once the event is destroyed here.
        """
        mark = None
        if exported.gpu is not None:
            free = self._marks[exported.gpu]
            mark = free.pop() if free else Mark(exported.gpu)
        self._batches[batch_id] = OwnBatch(exported, mark, registration, timed=timed)

    def take_all(self) -> dict[str, OwnBatch]:
        """All that there are, which are not known any more."""
        batches, self._batches = self._batches, {}
        return batches

    def holding(self, batch_id: str) -> Holding:
        """What its tensors hold, as the agent's state file says."""
        self.known(batch_id)
        data = self._connection.state.get(holding_key(self._connection.client_id, batch_id))
        return Holding() if data is None else Holding.decode(data, batch_id)

    def being_written(self, batches: Mapping[str, OwnBatch]) -> list[str]:
        """Which of these their agent may be writing to, as far as is known here: one receives, or is torn."""
        state, client = self._connection.state, self._connection.client_id
        receiving = {batch_id for batch_id, batch in batches.items() if batch.receive is not None and not batch.receive.done}
        return sorted(receiving | {batch_id for batch_id in batches if _may_be_torn(state.get(holding_key(client, batch_id)), batch_id)})

    def check_written(self, batch_ids: list[str], unanswered: Exception) -> None:
        """Raise if the agent, which did not say that it is done with these batches, may go on to write to their tensors."""
        watch, state = self._connection.watch, self._connection.state
        if batch_ids and not (isinstance(unanswered, AgentDiedError) and (watch.gone or state.stopped())):
            kind = type(unanswered) if isinstance(unanswered, AgentDiedError) else TransferTimeoutError
            raise kind(
                f"{', '.join(f'batch {batch_id!r}' for batch_id in batch_ids)}: closed, but the agent has not said that it is done with a"
                f" receive, and may still write to these tensors until it goes on and sees it: let their memory be as long ({unanswered})"
            ) from unanswered

    def digest(self, batch_id: str, timeout: float | None) -> list[str]:
        """See `BatchHandler.digest`."""
        check_timeout(timeout)
        batch = self.known(batch_id)
        if batch.exported.gpu is not None:
            settle(batch.exported.gpu)  # the call blocks anyway, until all ranks have asked
        command, cancel = MakeDigest(batch_id=batch_id), CancelTransfer(batch_id=batch_id)
        return list(self._connection.call(command, "make_digest", batch_id, timeout, list[str], cancel))

    def wait_version(self, batch_id: str, version: int, timeout: float | None) -> int:
        """See `BatchHandler.wait_version`."""
        check_timeout(timeout)
        self.known(batch_id)
        command, cancel = WaitVersion(batch_id=batch_id, version=version), CancelTransfer(batch_id=batch_id)
        return int(self._connection.call(command, "wait_version", batch_id, timeout, int, cancel))

    def hurry(self, batch_id: str, only_if_lost: bool = False) -> None:
        """Have the transfer of a batch that another thread waits for end as if its time were up: `TransferTimeoutError` says who was
        missing, or `PeerLostError` who is gone. ``only_if_lost``: only if it waits for somebody who is gone, and may be back for all that
        the agents know. Does not wait, and is not heard where no transfer has reached the agent, or its queue is full."""
        self._connection.mention(HurryTransfer(batch_id=batch_id, only_if_lost=only_if_lost))

    def raise_if_failed(self, batch_id: str, timeout: float | None) -> None:
        """Raise what made its registration fail, if that is known by now."""
        registration = self.known(batch_id).registration
        if registration is not None and _answered(registration):
            self.wait_registered(batch_id, timeout)

    def wait_ready(self, batch_id: str, timeout: float | None) -> None:
        """See `BatchHandler.wait_ready`."""
        self.wait_registered(batch_id, timeout)
        self._connection.call(WaitReady(batch_id=batch_id), "wait_ready", batch_id, timeout, cancel=CancelTransfer(batch_id=batch_id))

    def wait_registered(self, batch_id: str, timeout: float | None) -> None:
        """Return once it is registered; one that could not be is not known any more."""
        check_timeout(timeout)
        batch = self.known(batch_id)
        reply = batch.registration
        if reply is None:
            return
        try:
            if batch.timed:
                self._connection.finish(reply, timeout)
            elif reply.wait(timeout):
                reply.value()
            else:
                raise BatchUnmatchedError(
                    f"batch {batch_id!r} was not registered by everyone within {timeout} s, and goes on waiting: call"
                    " register_tensors with this batch id on every rank of both sides, then wait again, or close the batch"
                )
        except BaseException as error:
            if not batch.timed and isinstance(error, AgentDiedError) and self._connection.succeeded:
                pass  # that registration has no end: the next agent goes on with it
            else:
                if reply.done or not isinstance(error, BatchUnmatchedError):
                    self._forget(batch_id, batch)
                raise
        batch.registration = None

    def _forget(self, batch_id: str, batch: OwnBatch) -> None:
        """Drop a batch that could not be registered. Its agent is told: it may still try, or keeps the reason to say it again."""
        with self.lock:  # another thread may register the id again, and must come after this
            if self._batches.get(batch_id) is batch:
                del self._batches[batch_id]
                if batch.registration is not None:
                    batch.registration.abandon()
                with contextlib.suppress(EthaRayError):  # the caller gets the error that led here
                    self._connection.start(CleanupBatch(batch_id=batch_id), "cleanup_batch", batch_id, None, AT_ONCE).abandon()
        self._let_go(batch)

    def _let_go(self, batch: OwnBatch) -> None:
        batch.exported.close()
        with self.lock:  # two threads may let go of one
            mark, batch.mark = batch.mark, None
            if mark is not None and batch.exported.gpu is not None:
                self._marks[batch.exported.gpu].append(mark)

    def close(self, batch_id: str, *, blocking: bool, timeout: float) -> None:
        """See `BatchHandler.close`."""
        check_timeout(timeout)
        with self.lock:
            batch = self._batches.pop(batch_id, None)
        if batch is None or self._connection.closed:
            return
        written = self.being_written({batch_id: batch})
        if batch.registration is not None and not batch.registration.done:
            batch.registration.abandon()
        try:
            reply = self._connection.start(CleanupBatch(batch_id=batch_id), "cleanup_batch", batch_id, None, timeout)
            if blocking:
                self._connection.finish(reply, timeout)
            else:
                reply.abandon()
        except AgentDiedError as error:
            # The agent had taken that, and may have died before it was done: the next one would take the batch up again.
            logger.debug("batch %r is closed by the next agent, if there is one: %s", batch_id, error)
            with contextlib.suppress(EthaRayError):
                self._connection.start(CleanupBatch(batch_id=batch_id), "cleanup_batch", batch_id, None, AT_ONCE).abandon()
            self.check_written(written, error)
        finally:
            self._let_go(batch)

    def known(self, batch_id: str) -> OwnBatch:
        """Raises `UnknownBatchError`, or `BatchClosedError` of a client that is closed."""
        if self._connection.closed:
            raise BatchClosedError(f"batch {batch_id!r}: the client of agent {self._connection.agent_rank} is closed: make a new one")
        batch = self._batches.get(batch_id)
        if batch is None:
            raise UnknownBatchError(
                f"batch {batch_id!r} is not registered here: it was never registered, or has been closed."
                f" Known batches: {sorted(self._batches) or 'none'}"
            )
        return batch


def _may_be_torn(data: bytes | None, batch_id: str) -> bool:
    try:
        return data is not None and bool(Holding.decode(data, batch_id).torn)
    except AgentFailedError:
        return True


def _answered(registration: Reply) -> bool:
    try:
        return registration.wait(0.0)
    except AgentDiedError:
        return True
