"""The batches of an agent's workers: registering them, registering them again after a loss, closing them. On the agent's loop only.

A batch whose members died, or left the pair, is *renewed*: withdrawn and registered again under the same id, by itself, while its
worker goes on. It is READY again once all members are there, whoever they are by then and however many. The agent that takes the
place of one that died renews what that one's journal says.
"""

from __future__ import annotations

import logging
import secrets
import threading
import time
from collections.abc import Callable, Iterable
from functools import partial

import msgspec

from etha_ray.errors import BatchExistsError, EthaRayError, MemoryHandleError, UnknownPairError
from etha_ray.kvstore import KVStore
from etha_ray.tensor_bus.batch import Batch
from etha_ray.tensor_bus.bus import Bus
from etha_ray.tensor_bus.commands import RegisteredTensor, RegisterTensors
from etha_ray.tensor_bus.jobs import Cancellation, Job, Jobs
from etha_ray.tensor_bus.journal import Journal
from etha_ray.tensor_bus.links import Links
from etha_ray.tensor_bus.losses import Returns
from etha_ray.tensor_bus.records import Standing
from etha_ray.tensor_bus.registered import Registered
from etha_ray.tensor_bus.registration import Registration, Request
from etha_ray.tensor_bus.replicas import Replicas
from etha_ray.tensor_bus.state_file import StateFile, holding_key
from etha_ray.tensor_bus.versions import Holding
from etha_ray.tensor_bus.ways import Ways
from etha_ray.tensor_bus.withdrawals import Withdrawals
from etha_ray.tensor_bus.workers import Worker
from etha_ray.transport.buckets import DEFAULT_BUCKET_SIZE

logger = logging.getLogger(__name__)


class Batches:
    """All batches of one agent.

    Args:
        bus: what batches need of the agent.
        store, state, ways, jobs, journal, replicas: the agent's.
        links: its connections to other agents.
    """

    def __init__(
        self,
        bus: Bus,
        store: KVStore,
        state: StateFile,
        ways: Ways,
        jobs: Jobs,
        links: Links,
        journal: Journal,
        replicas: Replicas,
        withdrawals: Withdrawals,
    ) -> None:
        self._bus = bus
        self._store = store
        self._state = state
        self._ways = ways
        self._jobs = jobs
        self._links = links
        self._journal = journal
        self._replicas = replicas
        self._withdrawals = withdrawals
        self._by_registration: dict[str, Batch] = {}

    def all(self) -> list[Batch]:
        """Every batch that may still be heard of."""
        return list(self._by_registration.values())

    def find(self, registration: str) -> Batch | None:
        """The batch that others know by this registration."""
        return self._by_registration.get(registration)

    def register(self, worker: Worker, command: RegisterTensors) -> None:
        """A worker registers a batch; it is answered once all members are ready.

        Raises:
            BatchExistsError, UnknownPairError, MemoryHandleError: the command does not fit.
        """
        if command.batch_id in worker.batches:
            raise BatchExistsError(f"batch {command.batch_id!r} is registered already: close it first, or use another id")
        worker.failed.pop(command.batch_id, None)
        try:
            request = self._request(worker, command, command.timeout)
        except EthaRayError as error:
            worker.failed[command.batch_id] = error
            raise
        batch = Batch(
            bus=self._bus,
            batch_id=command.batch_id,
            registration=request.registration,
            client_id=command.client_id,
            work=self._registration(request),
            command=command,
        )
        self._add(worker, batch)
        if command.timeout is None:  # it goes on whatever its worker hears of it
            self._journal.registered(command)
        self._start(worker, batch, "register")

    def restore(self, worker: Worker, command: RegisterTensors) -> None:
        """A worker has had this batch, served by an agent that died: register it again.

        Raises:
            UnknownPairError, MemoryHandleError: the command does not fit.
        """
        data = self._state.get(holding_key(worker.client_id, command.batch_id))
        holding = Holding() if data is None else Holding.decode(data, command.batch_id)
        request = self._request(worker, command, None, Standing(last=holding.last))
        batch = Batch(
            bus=self._bus,
            batch_id=command.batch_id,
            registration=request.registration,
            client_id=command.client_id,
            work=self._registration(request),
            command=command,
            holding=holding,
        )
        batch.restored()
        self._add(worker, batch)
        self._start(worker, batch, "renew")

    def renew_lost(self, workers: Iterable[Worker], now: float) -> None:
        """Register again those batches that have lost members, by the monotonic clock."""
        for worker in workers:
            for batch in worker.batches.values():
                if batch.may_renew(now):
                    self._renew(worker, batch)

    def close(
        self, worker: Worker, batch: Batch, error: EthaRayError, *, lost: bool, returns: Returns = "no", then: Callable[[], None]
    ) -> None:
        """Close a batch; ``then`` runs once no byte moves any more and nobody can find it in the store, or that is found to be away."""
        worker.batches.pop(batch.batch_id, None)
        withdraw = self._withdrawal(worker, batch)

        def released() -> None:
            self._by_registration.pop(batch.registration, None)
            self._state.delete([holding_key(batch.client_id, batch.batch_id)])
            self._journal.closed(batch.client_id, batch.batch_id)
            withdraw(lambda: self._replicas.drop(batch, then))

        batch.close(error, lost=lost, returns=returns, then=released)

    def _withdrawal(self, worker: Worker, batch: Batch) -> Callable[[Callable[[], None]], None]:
        """What takes from the store what a batch has there, and then calls back. From now on who registers its id again waits for that."""
        work, before = batch.work, worker.closing.get(batch.batch_id)
        withdrawn = worker.closing[batch.batch_id] = threading.Event()

        def gone() -> None:
            withdrawn.set()
            if worker.closing.get(batch.batch_id) is withdrawn:
                del worker.closing[batch.batch_id]

        def done() -> None:
            # A batch that was closed before it began had nothing there, and is gone when the one before it is.
            if before is None or before.is_set():
                gone()
            else:
                self._jobs.start(f"wait for batch {batch.batch_id}", lambda _: before.wait(), lambda _: gone())

        return lambda tried: self._withdrawals.start(f"withdraw batch {batch.batch_id!r}", work.close, tried, done)

    def _add(self, worker: Worker, batch: Batch) -> None:
        worker.batches[batch.batch_id] = self._by_registration[batch.registration] = batch

    def _request(self, worker: Worker, command: RegisterTensors, timeout: float | None, standing: Standing | None = None) -> Request:
        missing = sorted({name for name, _ in command.tensors if name not in worker.pairs})
        if missing:
            raise UnknownPairError(f"batch {command.batch_id!r}: pairs {missing} are not known; call init_pair first")
        try:
            tensors = [(name, RegisteredTensor.decode(data)) for name, data in command.tensors]
        except msgspec.DecodeError as error:
            raise MemoryHandleError(f"batch {command.batch_id!r}: a tensor's description cannot be read ({error})") from error
        return Request(
            batch_id=command.batch_id,
            registration=secrets.token_hex(16),
            pairs={name: worker.pairs[name] for name, _ in tensors},
            tensors=tensors,
            bucket_size=command.bucket_size or DEFAULT_BUCKET_SIZE,
            timeout=timeout,
            after=worker.closing.get(command.batch_id),
            standing=standing,
        )

    def _registration(self, request: Request) -> Registration:
        return Registration(self._store, self._state, self._ways, request, self._settle)

    def _renew(self, worker: Worker, batch: Batch) -> None:
        command = batch.command
        assert isinstance(command, RegisterTensors)
        withdraw = self._withdrawal(worker, batch)
        request = self._request(worker, command, None, batch.standing())
        logger.info("batch %r is registered again: %s", batch.batch_id, batch.loss)
        withdraw(lambda: None)
        self._by_registration.pop(batch.registration, None)
        batch.renew(request.registration, self._registration(request))
        self._by_registration[batch.registration] = batch
        self._start(worker, batch, "renew")

    def _start(self, worker: Worker, batch: Batch, what: str) -> None:
        batch.job = self._jobs.start(f"{what} {batch.batch_id}", batch.work.run, partial(self._registration_over, worker, batch))

    def _registration_over(self, worker: Worker, batch: Batch, job: Job[Registered]) -> None:
        renewal = batch.is_renewal
        error = batch.registration_over(job, time.monotonic())
        if error is None:
            for peer in batch.registered.others.values():
                self._links.follow(peer.member.agent)
            if not renewal:
                assert isinstance(batch.command, RegisterTensors)
                self._journal.registered(batch.command)
                self._bus.answer(batch.command, None)
            batch.catch_up()
        elif renewal:
            if batch.closed is None:
                logger.warning("batch %r cannot be registered again yet: %s", batch.batch_id, error)
        else:
            self._bus.refuse(batch.command, error)
            if worker.batches.get(batch.batch_id) is batch:
                del worker.batches[batch.batch_id]
                # Before its client reads that, it may ask for a transfer. Without what the registration had opened.
                worker.failed[batch.batch_id] = error.with_traceback(None)
                del self._by_registration[batch.registration]
                self._journal.closed(batch.client_id, batch.batch_id)
                if not batch.work.withdrawn:
                    self._withdrawal(worker, batch)(lambda: None)

    def _settle(self, cancellation: Cancellation) -> None:
        """Wait until the loop has handled what is in the queue now. On a job's thread."""
        handled = threading.Event()
        self._jobs.post(handled.set)
        while not handled.wait(0.05):
            cancellation.check()
