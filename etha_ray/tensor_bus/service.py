"""What each command does. Owned by the agent's loop, and touched by no other thread.

Nothing here waits: whatever takes time is a job (see `jobs`), and pairs, batches and transfers are small state machines
(see `pair`, `batch`) that move on when a command, a message of another agent or the end of a job comes in.
"""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import msgspec

from etha_ray.config import HEARTBEAT_INTERVAL
from etha_ray.errors import (
    BatchClosedError,
    BatchExistsError,
    EthaRayError,
    MemoryHandleError,
    PairMismatchError,
    PairTimeoutError,
    TransferCancelledError,
    TransferInProgressError,
    UnknownBatchError,
    UnknownPairError,
)
from etha_ray.kvstore import KVStore
from etha_ray.tensor_bus.batch import Batch, BatchState
from etha_ray.tensor_bus.command_queue import CommandQueue, CorruptEntry
from etha_ray.tensor_bus.commands import (
    BaseCommand,
    CancelTransfer,
    CleanupBatch,
    DataReady,
    DataRevoked,
    DataTaken,
    Failed,
    Goodbye,
    Hello,
    InitPair,
    Message,
    Ping,
    QueryStatus,
    RegisteredTensor,
    RegisterTensors,
    RegistrationClosed,
    Transfer,
)
from etha_ray.tensor_bus.jobs import Job, Jobs
from etha_ray.tensor_bus.links import Links
from etha_ray.tensor_bus.members import slot_of
from etha_ray.tensor_bus.outcomes import Outcomes
from etha_ray.tensor_bus.pair import Match, Pair, PairState, layout_of, match
from etha_ray.tensor_bus.records import AgentRecord, MemberRecord
from etha_ray.tensor_bus.registration import Registered, Registration, Request
from etha_ray.tensor_bus.semaphores import unlink_quietly
from etha_ray.tensor_bus.state_file import StateFile, pair_state_key
from etha_ray.tensor_bus.workers import Worker, Workers
from etha_ray.transport.base import CopyProgram, OneSidedTransport

logger = logging.getLogger(__name__)

_MOVERS = 8
"""Transfers that may copy at the same time; each uses the transport's threads."""


class BusService:
    """The pairs, batches and workers of one agent.

    Args:
        record: who the agent is.
        store: where agents find one another.
        state: the agent's state file.
        queue: the agent's command queue, into which it also puts messages to itself.
        jobs: what runs beside the loop.
        transport: what moves bytes.
    """

    def __init__(
        self, record: AgentRecord, store: KVStore, state: StateFile, queue: CommandQueue, jobs: Jobs, transport: OneSidedTransport
    ) -> None:
        self.record = record
        self._store = store
        self._state = state
        self._jobs = jobs
        self._transport = transport
        self._outcomes = Outcomes(state)
        self._workers = Workers(record.rank)
        self._links = Links(record, queue, self._on_agent_lost)
        self._movers = ThreadPoolExecutor(_MOVERS, thread_name_prefix="etha-ray move")
        self._by_registration: dict[str, Batch] = {}
        self._members = 0
        self._handlers: dict[type[BaseCommand], Callable[[Any], None]] = {
            Ping: self._outcomes.ok,
            Hello: self._on_hello,
            Goodbye: self._on_goodbye,
            InitPair: self._on_init_pair,
            RegisterTensors: self._on_register,
            Transfer: self._on_transfer,
            CancelTransfer: self._on_cancel,
            QueryStatus: self._on_query,
            CleanupBatch: self._on_cleanup,
            DataReady: self._on_data,
            DataTaken: self._on_data,
            DataRevoked: self._on_data,
            RegistrationClosed: self._on_registration_closed,
        }

    # ------------------------------------------------------------------------------------------ called by the loop

    def handle(self, message: Message) -> None:
        """Do what a command or message says; its sender gets an outcome, whatever happens."""
        try:
            self._handlers[type(message)](message)
        except Exception as error:  # the loop goes on, and the sender learns of it
            self._outcomes.failed(message, error)

    def handle_left_over(self, message: Message) -> None:
        """Answer a command that was meant for an agent which died before this one took its place."""
        try:
            self._workers.of(message)
        except EthaRayError as error:
            self._outcomes.failed(message, error)

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
        for batch in list(self._by_registration.values()):
            batch.expire(now)

    def next_deadline(self) -> float | None:
        """When `expire` has something to do next."""
        deadlines = [
            batch.transfer.deadline
            for batch in self._by_registration.values()
            if batch.transfer is not None and batch.transfer.deadline is not None
        ]
        return min(deadlines, default=None)

    def check_others(self) -> None:
        """Find out which workers and agents have died."""
        self._links.check()
        for worker in self._workers.dead():
            logger.warning("agent %d: worker pid %d died", self.record.rank, worker.pid)
            self._drop_worker(worker, f"worker pid {worker.pid} died", lost=True)
        for worker in self._workers.all():
            for pair in worker.pairs.values():
                self._expire_waiting(pair)

    def counts(self) -> dict[str, int]:
        """How many workers, pairs and batches there are. From any thread."""
        workers = self._workers.all()
        return {
            "workers": len(workers),
            "pairs": sum(len(worker.pairs) for worker in workers),
            "batches": sum(len(worker.batches) for worker in workers),
        }

    def leave_all(self, reason: str) -> None:
        """Close everything, as the agent shuts down; waits for the copies and jobs under way."""
        for worker in self._workers.all():
            self._drop_worker(worker, reason, lost=True)
        self._movers.shutdown(wait=True)
        self._jobs.close()
        self._links.close()

    def close(self) -> None:
        """Let go of the semaphores."""
        self._outcomes.close()

    # `Bus`, for the batches

    def tell(self, agent: AgentRecord, message: Message) -> None:
        """Send a message to an agent."""
        self._links.tell(agent, message)

    def answer(self, command: BaseCommand, value: object) -> None:
        """A command succeeded."""
        self._outcomes.ok(command, value)

    def refuse(self, command: BaseCommand, error: BaseException) -> None:
        """A command failed."""
        self._outcomes.failed(command, error)

    def move(self, program: CopyProgram, done: Callable[[Job[int]], None]) -> None:
        """Run a program beside the loop."""

        def run() -> None:
            job: Job[int] = Job()
            try:
                job.value = program.run()
            except Exception as error:  # becomes the transfer's outcome
                job.error = error
            self._jobs.post(partial(done, job))

        self._movers.submit(run)

    # -------------------------------------------------------------------------------------------------- workers

    def _on_hello(self, command: Hello) -> None:
        self._workers.add(command)
        self._outcomes.ok(command)

    def _on_goodbye(self, command: Goodbye) -> None:
        worker = self._workers.find(command.client_id)
        if worker is None:
            self._outcomes.ok(command)
            return
        self._drop_worker(worker, "its client was closed", lost=False, then=lambda: self._outcomes.ok(command))

    def _drop_worker(self, worker: Worker, reason: str, *, lost: bool, then: Callable[[], None] | None = None) -> None:
        """Close all that a worker has; ``then`` runs once no byte of it moves any more."""
        self._workers.remove(worker)
        for pair in worker.pairs.values():
            self._leave_pair(pair, reason)
        remaining = len(worker.batches)

        def closed_one() -> None:
            nonlocal remaining
            remaining -= 1
            if remaining <= 0:
                if then is not None:
                    then()
                names = self._outcomes.forget(worker.client_id)
                if lost:
                    for name in names:
                        unlink_quietly(name)

        for batch in list(worker.batches.values()):
            self._close_batch(worker, batch, reason, lost=lost, then=closed_one)
        if remaining == 0:
            closed_one()

    # ---------------------------------------------------------------------------------------------------- pairs

    def _on_init_pair(self, command: InitPair) -> None:
        worker = self._workers.of(command)
        layout, index = layout_of(command)
        member = MemberRecord(
            attempt=secrets.token_hex(16),
            peer=command.local_name,
            remote=command.remote_name,
            world_size=command.expected_world_size,
            layout=None if layout is None else layout.encode(),
            index=index,
            client_id=command.client_id,
            worker_pid=worker.pid,
            worker_start_time=worker.start_time,
            agent=self.record,
        )
        pair = worker.pairs.get(command.pair_name)
        if pair is not None and pair.state is not PairState.FAILED:
            _check_same(pair, member)
            if pair.state is PairState.MATCHED:
                self._outcomes.ok(command)
            else:
                pair.waiting.append(command)
            return
        self._members += 1
        pair = Pair(
            name=command.pair_name,
            local_name=command.local_name,
            remote_name=command.remote_name,
            member=member,
            slot=slot_of(member, self._members),
            waiting=[command],
        )
        worker.pairs[pair.name] = pair
        work = partial(match, self._store, pair.name, member, pair.slot, command.timeout)
        pair.job = self._jobs.start(f"pair {pair.name}", work, partial(self._pair_over, pair))

    def _pair_over(self, pair: Pair, job: Job[Match]) -> None:
        pair.match, pair.error, pair.job = job.value, job.error, None
        pair.state = PairState.MATCHED if pair.match is not None else PairState.FAILED
        if pair.match is not None:
            self._state.put(pair_state_key(pair.name), msgspec.msgpack.encode("matched"))
        waiting, pair.waiting = pair.waiting, []
        for command in waiting:
            if pair.error is None:
                self._outcomes.ok(command)
            else:
                self._outcomes.failed(command, pair.error)

    def _expire_waiting(self, pair: Pair) -> None:
        """Answer those who joined an init_pair that has no time limit, or a longer one, when their own time is up."""
        for command in list(pair.waiting):
            sent, timeout = command.timestamp, command.timeout
            if sent is not None and timeout is not None and time.time() - sent > timeout + HEARTBEAT_INTERVAL:
                pair.waiting.remove(command)
                self._outcomes.failed(
                    command,
                    PairTimeoutError(f"pair {pair.name!r} was not complete within {timeout:g} s; an earlier init_pair still waits"),
                )

    def _leave_pair(self, pair: Pair, reason: str) -> None:
        if pair.job is not None:
            pair.job.cancellation.cancel(reason)
        elif pair.match is not None:
            key = pair.match.key
            self._jobs.start(f"leave pair {pair.name}", lambda _: self._store.delete(key), _logged)

    # -------------------------------------------------------------------------------------------------- batches

    def _on_register(self, command: RegisterTensors) -> None:
        worker = self._workers.of(command)
        if command.batch_id in worker.batches:
            raise BatchExistsError(f"batch {command.batch_id!r} is registered already: close it first, or use another id")
        missing = sorted({name for name, _ in command.tensors if name not in worker.pairs})
        if missing:
            raise UnknownPairError(f"batch {command.batch_id!r}: pairs {missing} are not known; call init_pair first")
        try:
            tensors = [(name, RegisteredTensor.decode(data)) for name, data in command.tensors]
        except msgspec.DecodeError as error:
            raise MemoryHandleError(f"batch {command.batch_id!r}: a tensor's description cannot be read ({error})") from error
        request = Request(
            batch_id=command.batch_id,
            registration=secrets.token_hex(16),
            pairs={name: worker.pairs[name] for name, _ in tensors},
            tensors=tensors,
            timeout=command.timeout,
        )
        work = Registration(self._store, self._state, self._transport, request)
        batch = Batch(
            bus=self,
            batch_id=command.batch_id,
            registration=request.registration,
            client_id=command.client_id,
            work=work,
            command=command,
        )
        worker.batches[batch.batch_id] = self._by_registration[batch.registration] = batch
        batch.job = self._jobs.start(f"register {batch.batch_id}", work.run, partial(self._registration_over, worker, batch))

    def _registration_over(self, worker: Worker, batch: Batch, job: Job[Registered]) -> None:
        batch.job = None
        if batch.state is BatchState.CLOSED:
            if job.value is not None:
                job.value.close()
                self._jobs.start(f"withdraw {batch.batch_id}", lambda _: batch.work.close(), _logged)
            self._outcomes.failed(batch.command, BatchClosedError(f"batch {batch.batch_id!r} was closed while it was registered"))
            return
        if job.value is not None:
            batch.registered, batch.state = job.value, BatchState.READY
            self._outcomes.ok(batch.command)
            batch.advance()
            return
        error = job.error or TransferCancelledError(f"batch {batch.batch_id!r}: the registration ended without a result")
        self._outcomes.failed(batch.command, error)
        batch.cancel(error if isinstance(error, EthaRayError) else TransferCancelledError(str(error)))
        worker.batches.pop(batch.batch_id, None)
        self._by_registration.pop(batch.registration, None)

    def _on_transfer(self, command: Transfer) -> None:
        batch = self._batch(command, command.batch_id)
        if batch.error is not None:
            raise batch.error
        if batch.transfer is not None:
            under_way = batch.transfer.command.transfer_type
            raise TransferInProgressError(
                f"batch {batch.batch_id!r}: a {under_way} is under way; wait for it before the next {command.transfer_type}"
            )
        batch.start(command)

    def _on_cancel(self, command: CancelTransfer) -> None:
        batch = self._batch(command, command.batch_id)
        if batch.transfer is not None and batch.transfer.command.command_id == command.command_id:
            batch.cancel(TransferCancelledError(f"batch {batch.batch_id!r}: its worker gave up waiting"))

    def _on_query(self, command: QueryStatus) -> None:
        batch = self._batch(command, command.batch_id)
        if command.state_name != "transfer_signal":
            raise UnknownBatchError(f'batch {command.batch_id!r} has no state {command.state_name!r}; ask for "transfer_signal"')
        self._outcomes.ok(command, batch.signal())

    def _on_cleanup(self, command: CleanupBatch) -> None:
        worker = self._workers.of(command)
        batch = worker.batches.get(command.batch_id)
        if batch is None:
            self._outcomes.ok(command)
            return
        reason = f"batch {batch.batch_id!r} was closed"
        self._close_batch(worker, batch, reason, lost=False, then=lambda: self._outcomes.ok(command))

    def _close_batch(self, worker: Worker, batch: Batch, reason: str, *, lost: bool, then: Callable[[], None]) -> None:
        worker.batches.pop(batch.batch_id, None)
        registered = batch.state in (BatchState.READY, BatchState.LOST)

        def released() -> None:
            self._by_registration.pop(batch.registration, None)
            then()

        batch.close(reason, lost=lost, then=released)
        if registered:
            self._jobs.start(f"withdraw {batch.batch_id}", lambda _: batch.work.close(), _logged)

    def _batch(self, command: BaseCommand, batch_id: str) -> Batch:
        batch = self._workers.of(command).batches.get(batch_id)
        if batch is None:
            raise UnknownBatchError(f"batch {batch_id!r} is not registered on agent {self.record.rank} by this client")
        return batch

    # ---------------------------------------------------------------------------------------------- other agents

    def _on_data(self, message: DataReady | DataTaken | DataRevoked) -> None:
        own = message.source if isinstance(message, DataTaken) else message.target
        batch = self._by_registration.get(own)
        if batch is None:
            return  # closed meanwhile, and the sender has been told
        if isinstance(message, DataReady):
            batch.on_ready(message)
        elif isinstance(message, DataTaken):
            batch.on_taken(message)
        else:
            batch.on_revoked(message)

    def _on_registration_closed(self, message: RegistrationClosed) -> None:
        batch = self._by_registration.get(message.target)
        if batch is not None:
            batch.lose(message.closed, message.reason, lost=message.lost)

    def _on_agent_lost(self, incarnation: str, reason: str) -> None:
        for batch in list(self._by_registration.values()):
            for registration, peer in batch.registered.others.items():
                if peer.member.agent.incarnation == incarnation:
                    batch.lose(registration, reason, lost=True)


def _check_same(pair: Pair, member: MemberRecord) -> None:
    known = pair.member
    for what in ("peer", "remote", "world_size", "layout", "index"):
        before, now = getattr(known, what), getattr(member, what)
        if before != now:
            raise PairMismatchError(
                f"pair {pair.name!r} was initialised by this client with {what} {before!r}, now with {now!r}:"
                " use another pair name, or a second client for the other side"
            )


def _logged(job: Job[Any]) -> None:
    if job.error is not None:
        logger.warning("could not withdraw from the store: %s", job.error)
