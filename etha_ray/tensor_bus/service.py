"""What each command does. Owned by the agent's loop, and touched by no other thread.

Nothing here waits: whatever takes time is a job (see `jobs`), and pairs, batches and transfers are small state machines
(see `pair`, `batch`) that move on when a command, a message of another agent or the end of a job comes in.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from functools import partial
from typing import Any

from etha_ray.errors import (
    BatchClosedError,
    EthaRayError,
    PeerLostError,
    TransferCancelledError,
    UnknownBatchError,
)
from etha_ray.kvstore import KVStore
from etha_ray.tensor_bus.agent_bus import AgentBus
from etha_ray.tensor_bus.batch import Batch
from etha_ray.tensor_bus.batches import Batches
from etha_ray.tensor_bus.commands import (
    Announce,
    BaseCommand,
    CancelTransfer,
    CleanupBatch,
    Failed,
    Goodbye,
    Hello,
    HurryTransfer,
    InitPair,
    MakeDigest,
    Ping,
    QueryStatus,
    ReadBody,
    ReadNotices,
    ReadyReplicas,
    RegisterTensors,
    Transfer,
    WaitReady,
    WaitVersion,
    Withdraw,
)
from etha_ray.tensor_bus.history import History
from etha_ray.tensor_bus.jobs import Jobs
from etha_ray.tensor_bus.journal import Journal, restoring
from etha_ray.tensor_bus.leftovers import sweep
from etha_ray.tensor_bus.links import Links
from etha_ray.tensor_bus.messages import (
    DATA_MESSAGES,
    DataMessage,
    DataRead,
    DataRefused,
    DataTaken,
    Message,
    RegistrationClosed,
    RelayRead,
    RelayWanted,
)
from etha_ray.tensor_bus.network import AgentNetwork
from etha_ray.tensor_bus.notices import Notices
from etha_ray.tensor_bus.outcomes import Outcomes
from etha_ray.tensor_bus.pairing import Pairing
from etha_ray.tensor_bus.queue_entry import CorruptEntry
from etha_ray.tensor_bus.records import AgentRecord, encode
from etha_ray.tensor_bus.replicas import Replicas
from etha_ray.tensor_bus.semaphores import unlink_quietly, waited_for
from etha_ray.tensor_bus.snapshot import counts, snapshot
from etha_ray.tensor_bus.state_file import STATUS, StateFile, history_key, holding_prefix
from etha_ray.tensor_bus.ways import Ways
from etha_ray.tensor_bus.withdrawals import Withdrawals
from etha_ray.tensor_bus.workers import Worker, Workers

logger = logging.getLogger(__name__)

_LAST_BREATH = 10.0
"""Seconds in which a process that is dead lets go of all its memory, and so do those that it has forked, if they end with it."""


class BusService:
    """The pairs, batches and workers of one agent.

    Args:
        record: who the agent is.
        store: where agents find one another.
        state: the agent's state file.
        jobs: what runs beside the loop.
        ways: what moves bytes.
        network: how agents of other hosts are reached; None if they are not.
        history: where ended transfers are noted.
    """

    def __init__(
        self,
        record: AgentRecord,
        store: KVStore,
        state: StateFile,
        jobs: Jobs,
        ways: Ways,
        network: AgentNetwork | None,
        history: History,
    ) -> None:
        self.record = record
        self._state = state
        self._jobs = jobs
        self._history = history
        self._began = time.time()
        self._told = b""
        self._store_silent_since = 0.0
        self._sweep_until = 0.0
        self._outcomes = Outcomes(state, history)
        self._workers = Workers(record.rank)
        self._links = Links(record, network, self._loop_back, jobs.post, self._on_agent_lost)
        self._journal = Journal(state)
        self._withdrawals = Withdrawals(jobs)
        self._pairing = Pairing(record, store, state, jobs, self._outcomes, self._journal, self._withdrawals)
        self._notices = Notices(record, store, jobs, self._outcomes, self._journal, self._withdrawals)
        self._replicas = Replicas(store, jobs, self._outcomes)
        self._bus = AgentBus(record, self._links, self._outcomes, jobs, state, history, self._replicas, ways.gpu)
        self._batches = Batches(self._bus, store, state, ways, jobs, self._links, self._journal, self._replicas, self._withdrawals)
        self._timed: dict[int, Batch] = {}
        self._handlers: dict[type[BaseCommand], Callable[[Any], None]] = {
            Ping: self._outcomes.ok,
            Hello: self._on_hello,
            Goodbye: self._on_goodbye,
            InitPair: self._on_init_pair,
            Announce: self._on_announce,
            Withdraw: self._on_withdraw,
            ReadNotices: self._notices.read,
            ReadBody: self._notices.read_body,
            RegisterTensors: self._on_register,
            Transfer: self._on_transfer,
            CancelTransfer: self._on_cancel,
            HurryTransfer: self._on_hurry,
            QueryStatus: self._on_query,
            WaitVersion: self._on_wait_version,
            ReadyReplicas: self._replicas.answer,
            MakeDigest: self._on_digest,
            WaitReady: self._on_wait_ready,
            CleanupBatch: self._on_cleanup,
            **dict.fromkeys(DATA_MESSAGES, self._on_data),
            RegistrationClosed: self._on_registration_closed,
        }

    # ------------------------------------------------------------------------------------------ called by the loop

    def handle(self, message: Message) -> None:
        """Do what a command or message says; its sender gets an outcome, whatever happens."""
        try:
            self._handlers[type(message)](message)
        except Exception as error:  # the loop goes on, and the sender learns of it
            self._outcomes.failed(message, error)

    def restore(self) -> None:
        """Take up what the agent that died here served, as its journal says."""
        self._outcomes.drop_unread()
        for client in self._journal.clients():
            worker = self._workers.add(client.hello)
            self._outcomes.meet(worker.client_id)
            if not worker.alive:
                self._workers.remove(worker)
                self._forget(worker.client_id)
                continue
            for command, slot in client.pairs:
                with restoring("pair", command.pair_name):
                    self._pairing.restore(worker, command, slot)
            for announced in client.notices:
                with restoring("notice", announced.slot):
                    self._notices.announce(worker, announced)
            for registered in client.batches:
                with restoring("batch", registered.batch_id):
                    self._batches.restore(worker, registered)

    def handle_left_over(self, message: Message) -> None:
        """Do what the agent that died here had not taken up, unless its sender has given up waiting."""
        given_up = isinstance(message, (Transfer, RegisterTensors)) and not waited_for(message.semaphore_name or "")
        if not given_up:
            self.handle(message)

    def handle_corrupt(self, entry: CorruptEntry) -> None:
        """Answer a command that arrived damaged, where its sender can still be told."""
        if entry.semaphore_name is not None:
            outcome = Failed(
                kind="QueueError",
                message=f"the command arrived damaged in the queue of agent {self.record.rank} ({entry.reason}): send it again",
                command_id=entry.command_id or 0,
            )
            self._outcomes.answer_unread(entry.semaphore_name, outcome)

    def expire(self, now: float) -> None:
        """End the transfers whose time is up, by the monotonic clock."""
        for key, batch in list(self._timed.items()):
            batch.expire(now)
            if not batch.waiting:
                del self._timed[key]

    def next_deadline(self) -> float | None:
        """When `expire` has something to do next."""
        return min((batch.deadline for batch in self._timed.values() if batch.deadline is not None), default=None)

    def check_others(self, store_silent_since: float) -> None:
        """Find out which workers and agents have died. The store's silence is in seconds since the epoch; 0 while it answers."""
        self._store_silent_since = store_silent_since
        self._links.check()
        dead = self._workers.dead()
        for pid in {worker.pid for worker in dead}:  # one process may have several clients
            logger.warning("agent %d: worker pid %d died", self.record.rank, pid)
        for worker in dead:
            self._drop_worker(worker, PeerLostError(f"worker pid {worker.pid} died"), lost=True, then=lambda: None)
            self._sweep_until = time.monotonic() + _LAST_BREATH
        if time.monotonic() < self._sweep_until:
            sweep()
        for worker in self._workers.all():
            for pair in worker.pairs.values():
                self._pairing.expire_waiting(pair, store_silent_since)
        self._batches.renew_lost(self._workers.all(), time.monotonic())
        self._withdrawals.again(bool(store_silent_since))
        self._outcomes.clean(time.monotonic())

    def agent_left(self, incarnation: str, reason: str) -> None:
        """An agent of another host sends no more."""
        self._links.left(incarnation, reason)

    def counts(self) -> dict[str, int]:
        """How many workers, pairs and batches there are. From any thread."""
        return counts(self._workers.all())

    def tell_status(self) -> None:
        """Write what there is, and what ended since, into the state file."""
        status = encode(snapshot(self.record, self._began, self._workers.all(), self._history.totals, self._store_silent_since))
        news = {history_key(place): encode(past) for place, past in self._history.unsaved().items()}
        if status != self._told:
            news[STATUS] = self._told = status
        if news:
            self._state.put_all(news)

    def leave_all(self, reason: str) -> None:
        """Close everything, as the agent shuts down; waits for the copies and jobs under way."""
        for worker in self._workers.all():
            self._drop_worker(worker, TransferCancelledError(reason), lost=True, then=lambda: None)
        self._bus.close()
        self._replicas.close()
        self._jobs.close()
        self._links.close()

    def close(self) -> None:
        """Let go of the semaphores."""
        self._outcomes.close()

    # -------------------------------------------------------------------------------------------------- workers

    def _on_hello(self, command: Hello) -> None:
        self._workers.add(command)
        self._outcomes.meet(command.client_id)
        self._journal.met(command)
        self._outcomes.ok(command)

    def _on_goodbye(self, command: Goodbye) -> None:
        worker = self._workers.find(command.client_id)
        if worker is None:
            self._outcomes.ok(command)
            return
        lost = bool(command.because)
        error = PeerLostError(f"it left, as it lost others: {command.because}") if lost else BatchClosedError("its client was closed")
        self._drop_worker(worker, error, lost=lost, then=lambda: self._outcomes.ok(command))

    def _drop_worker(self, worker: Worker, error: EthaRayError, *, lost: bool, then: Callable[[], None]) -> None:
        """Close all that a worker has; ``then`` runs once no byte of it moves any more, and its places are free."""
        self._workers.remove(worker)
        self._forget(worker.client_id)
        remaining = 2 + len(worker.pairs) + len(worker.batches)

        def one_less() -> None:
            nonlocal remaining
            remaining -= 1
            if remaining == 0:
                then()
                names = self._outcomes.forget(worker.client_id)
                if not worker.alive:
                    for name in names:
                        unlink_quietly(name)

        self._notices.drop(worker, one_less)
        for pair in worker.pairs.values():
            self._pairing.leave(pair, str(error), one_less)
        for batch in list(worker.batches.values()):
            self._batches.close(worker, batch, error, lost=lost, returns="perhaps", then=one_less)
        one_less()

    def _forget(self, client_id: str) -> None:
        self._journal.gone(client_id)
        self._state.delete(list(self._state.under(holding_prefix(client_id))))

    def _on_init_pair(self, command: InitPair) -> None:
        self._pairing.join(self._workers.of(command), command)

    def _on_announce(self, command: Announce) -> None:
        self._notices.announce(self._workers.of(command), command)

    def _on_withdraw(self, command: Withdraw) -> None:
        self._notices.withdraw(self._workers.of(command), command)

    # -------------------------------------------------------------------------------------------------- batches

    def _on_register(self, command: RegisterTensors) -> None:
        self._batches.register(self._workers.of(command), command)

    def _on_transfer(self, command: Transfer) -> None:
        batch = self._batch(command, command.batch_id)
        refusal = batch.refusal(command.transfer_type)
        if refusal is not None:
            batch.want()
            self._outcomes.failed(command, refusal)
            return
        batch.turns.start(command)
        self._timed[id(batch)] = batch

    def _on_cancel(self, command: CancelTransfer) -> None:
        self._batch(command, command.batch_id).give_up(command.command_id)

    def _on_hurry(self, command: HurryTransfer) -> None:
        self._batch(command, command.batch_id).hurry(command.only_if_lost)

    def _on_query(self, command: QueryStatus) -> None:
        batch = self._batch(command, command.batch_id)
        if command.state_name != "transfer_signal":
            raise UnknownBatchError(f'batch {command.batch_id!r} has no state {command.state_name!r}; ask for "transfer_signal"')
        self._outcomes.ok(command, batch.signal())

    def _on_wait_version(self, command: WaitVersion) -> None:
        batch = self._batch(command, command.batch_id)
        batch.questions.wait_version(command)
        self._timed[id(batch)] = batch

    def _on_wait_ready(self, command: WaitReady) -> None:
        batch = self._batch(command, command.batch_id)
        batch.questions.wait_ready(command)
        self._timed[id(batch)] = batch

    def _on_digest(self, command: MakeDigest) -> None:
        batch = self._batch(command, command.batch_id)
        batch.questions.make_digest(command)
        self._timed[id(batch)] = batch

    def _on_cleanup(self, command: CleanupBatch) -> None:
        worker = self._workers.of(command)
        worker.failed.pop(command.batch_id, None)
        batch = worker.batches.get(command.batch_id)
        if batch is None:
            self._outcomes.ok(command)
            return
        error = BatchClosedError(f"batch {batch.batch_id!r} was closed")
        self._batches.close(worker, batch, error, lost=False, then=lambda: self._outcomes.ok(command))

    def _batch(self, command: BaseCommand, batch_id: str) -> Batch:
        worker = self._workers.of(command)
        batch = worker.batches.get(batch_id)
        if batch is None:
            if batch_id in worker.failed:
                raise worker.failed[batch_id].with_traceback(None)
            raise UnknownBatchError(f"batch {batch_id!r} is not registered on agent {self.record.rank} by this client")
        return batch

    # ---------------------------------------------------------------------------------------------- other agents

    def _on_data(self, message: DataMessage) -> None:
        if isinstance(message, (RelayWanted, RelayRead)):
            own = message.relay
        else:
            own = message.source if isinstance(message, (DataRead, DataTaken, DataRefused)) else message.target
        batch = self._found(own, message)
        if batch is not None:
            batch.hear(message)

    def _on_registration_closed(self, message: RegistrationClosed) -> None:
        batch = self._found(message.target, message)
        if batch is not None:
            batch.lose(message)

    def _found(self, registration: str, message: Message) -> Batch | None:
        batch = self._batches.find(registration)
        if batch is None:  # closed meanwhile, and the sender has been told
            logger.debug("a %s is ignored: there is no registration %r here", type(message).__name__, registration)
        return batch

    def _loop_back(self, message: Message) -> None:
        # As a job's result, not through the queue: that may be full, and only this loop empties it.
        self._jobs.post(partial(self.handle, message))

    def _on_agent_lost(self, incarnation: str, reason: str) -> None:
        for batch in self._batches.all():
            batch.lose_agent(incarnation, reason)
