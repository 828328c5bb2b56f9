"""How a client waits for the outcome of a command.

The agent writes the outcome into its state file under the command's semaphore name, then posts the semaphore. Making a named
semaphore costs more than a whole round trip, so a client keeps a few and uses each again once its outcome was read. One whose
outcome is not waited for any more is removed instead: a late answer to it must not wake another command.

When the agent dies, what it had taken out of the queue is lost, and raises `AgentDiedError`; what still stands there is carried out
by the agent that takes its place, and is waited for on. Positions tell the two apart (`ReplyPool.outlive`).
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from types import TracebackType
from typing import Any

import msgspec
import posix_ipc

from etha_ray.config import SUCCESSION_TIMEOUT, check_timeout
from etha_ray.decoding import Decoder
from etha_ray.errors import AgentDiedError, AgentFailedError, BatchClosedError, QueueClosedError, error_class
from etha_ray.processes import permit_successor
from etha_ray.report import TransferReport
from etha_ray.tensor_bus.command_queue import CommandQueue
from etha_ray.tensor_bus.commands import Failed, Ok, decode_outcome
from etha_ray.tensor_bus.records import AgentRecord
from etha_ray.tensor_bus.semaphores import acquire, generate_semaphore_name, open_semaphore, unlink_quietly
from etha_ray.tensor_bus.snapshot import ASK_STORE, AgentStatus, waited_for
from etha_ray.tensor_bus.state_file import STATUS, StateFile, outcome_key
from etha_ray.tensor_bus.watch import AgentWatch
from etha_ray.waiting import LongWait

_SLICE = 0.1
"""Seconds after which a wait looks whether the agent still lives."""


_statuses = Decoder(AgentStatus)


class Reply:
    """The outcome of one command, once it is there. Safe to wait for from several threads."""

    def __init__(self, pool: ReplyPool, semaphore: posix_ipc.Semaphore, command_id: int, command_type: str, context_id: str) -> None:
        self._pool = pool
        self._command_type, self._context_id = command_type, context_id
        self._semaphore: posix_ipc.Semaphore | None = semaphore
        self.name: str = semaphore.name
        self.command_id = command_id
        self.what = f"{command_type} for {context_id!r}"
        self.position = 0
        """Of the command in the queue, once it is there."""
        self.patient = True
        """Whether to wait for the next agent, where there is to be one."""
        self._watch = pool.watch
        self._agent_died: float | None = None
        self._outcome: Ok | Failed | None = None
        self._lock = threading.RLock()  # a finalizer, or Ctrl-C, may come while this very thread has it

    @property
    def done(self) -> bool:
        """Whether the outcome has been read."""
        return self._outcome is not None

    def wait(self, timeout: float | None) -> bool:
        """Wait until the outcome is there; False when ``timeout`` seconds are over.

        Raises `AgentDiedError` within seconds of the death of an agent that had taken the command, or if no other takes the place of
        one that had not, `BatchClosedError` once the client is closed, and `QueueHeldError` while another process that is stopped keeps
        the agent from its queue.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        long: LongWait | None = None
        try:
            while True:
                if self._look(_SLICE if deadline is None else max(0.0, min(_SLICE, deadline - time.monotonic()))):
                    return True
                try:
                    self._check_agent()
                except AgentDiedError:
                    if self._look(0.0, unposted=True):  # it answered before it went
                        return True
                    raise
                except QueueClosedError as error:
                    raise self._closed() from error
                if deadline is not None and time.monotonic() >= deadline:
                    return False
                if long is None:
                    long = LongWait(self.what, timeout, self._reason)
                long.tick()
        finally:
            if long is not None:
                long.end()

    def value(self, kind: Any = Any) -> Any:
        """The value of a command that succeeded, a ``kind``; raises the error of one that failed."""
        outcome = self._outcome
        if isinstance(outcome, Ok):
            try:
                return outcome.value if kind is Any else msgspec.convert(outcome.value, kind)
            except msgspec.ValidationError as wrong:
                raise AgentFailedError(self._nonsense(wrong)) from wrong
        if outcome is None:
            raise RuntimeError("the outcome has not been waited for")
        kind = error_class(outcome.kind)
        error = kind(outcome.message)
        if outcome.traceback and kind is AgentFailedError:
            error = kind(f"{outcome.message}\n\nin the agent:\n{outcome.traceback}")
        raise error

    def _nonsense(self, error: Exception) -> str:
        return f"{self.what}: its agent's answer cannot be read ({error}): run one version of etha_ray on both, and restart the agent"

    def abandon(self) -> None:
        """Give up waiting; the agent's answer, if it still comes, goes nowhere. May be called more than once."""
        with self._lock:
            semaphore, self._semaphore = self._semaphore, None
        if semaphore is not None:
            self._pool.discard(semaphore)

    def _check_agent(self) -> None:
        try:
            self._pool.watch.check()
        except AgentDiedError as error:
            died = self._agent_died = self._agent_died or time.monotonic()
            self._pool.outlive(self, error, time.monotonic() - died)
        else:
            self._agent_died = None
            self._pool.queue.check_free()  # after the agent: it may be the one that stands still
        if self._watch is not self._pool.watch:
            self._pool.check_taken_up(self, self._watch.record)
            self._watch = self._pool.watch

    def _look(self, seconds: float, *, unposted: bool = False) -> bool:
        """Wait for a post, ``seconds`` at most, and read the outcome it is for; or one that may have been written and not posted."""
        if not self._lock.acquire(timeout=seconds):
            return self._outcome is not None  # another thread waits for the same outcome
        try:
            if self._outcome is not None:
                return True
            if self._semaphore is None:
                raise self._closed()
            try:
                acquire(self._semaphore, seconds)
            except (posix_ipc.BusyError, posix_ipc.SignalError):
                return unposted and self._read(self._semaphore)
            return self._read(self._semaphore)
        finally:
            self._lock.release()

    def _read(self, semaphore: posix_ipc.Semaphore) -> bool:
        try:
            data = self._pool.state.get(outcome_key(self.name))
        except QueueClosedError as error:
            raise self._closed() from error
        try:
            outcome = decode_outcome(data) if data is not None else None
        except msgspec.DecodeError as error:
            outcome = Failed(AgentFailedError.__name__, self._nonsense(error), command_id=self.command_id)
        if outcome is None or outcome.command_id != self.command_id:
            return False  # posted by somebody else, such as a user's release(): the agent's own post is still to come
        self._outcome, self._semaphore = outcome, None
        self._pool.watch.heard()
        self._pool.put_back(semaphore)
        return True

    def store_silent_since(self) -> float:
        """Since when the store does not answer, in seconds since the epoch; 0 where it does, or this command does not need it."""
        status = self._status()
        return status.store_silent_since if status is not None and self._command_type in ASK_STORE else 0.0

    def _reason(self) -> str:
        """Who is missing, as the agent's state file says."""
        status = self._status()
        return "" if status is None else waited_for(status, self._pool.client_id, self._command_type, self._context_id)

    def _status(self) -> AgentStatus | None:
        with contextlib.suppress(QueueClosedError, msgspec.DecodeError):  # the wait itself finds out that it is over
            data = self._pool.state.get(STATUS)
            return None if data is None else _statuses.decode(data)
        return None

    def _closed(self) -> BatchClosedError:
        return BatchClosedError(f"the client was closed before {self.what} was answered: make a new one")


class ReplyPool:
    """A client's semaphores. Thread-safe. In a forked child it touches none of them: they are the parent's."""

    def __init__(self, state: StateFile, queue: CommandQueue, watch: AgentWatch, client_id: str) -> None:
        self.state = state
        self.watch = watch
        self.client_id = client_id
        self.queue = queue
        self._free: list[posix_ipc.Semaphore] = []
        self._names: set[str] = set()
        self._lock = threading.Lock()
        self._closed = False
        self._pid = os.getpid()

    @property
    def in_owner(self) -> bool:
        """Whether this is the process that made it, and not a forked child."""
        return os.getpid() == self._pid

    def take(self, command_type: str, context_id: str, command_id: int) -> Reply:
        """A reply for a new command; its ``name`` goes into the command."""
        with self._lock:
            semaphore = self._free.pop() if self._free else None
        if semaphore is None:
            semaphore = open_semaphore(generate_semaphore_name(command_type, context_id), create=True)
            self._names.add(semaphore.name)
        return Reply(self, semaphore, command_id, command_type, context_id)

    def outlive(self, reply: Reply, error: AgentDiedError, dead_for: float) -> None:
        """The agent is dead: turn to the one in its place, if there is one; raises if nobody will answer ``reply``."""
        successor = self.watch.successor()
        if successor is not None:
            self.watch = successor
            permit_successor(successor.record.pid)  # it takes up this worker's batches
            return
        if self.state.stopped() or not self.watch.gone:
            raise error
        head = self.queue.head()  # before looking who claims the place: one that does takes commands, too
        if reply.position < (self.state.first() if self.watch.replaced else head):
            raise _taken(reply, str(error))
        if not self.watch.record.restarts or not reply.patient:
            raise AgentDiedError(f"{error}: start it again there, and this client goes on with it")
        if dead_for > SUCCESSION_TIMEOUT:
            raise AgentDiedError(f"{error}, and was not started again within {dead_for:.0f} s: see what keeps its pool from it")

    def check_taken_up(self, reply: Reply, before: AgentRecord) -> None:
        """Raise if the agent that served ``before`` had taken the command of ``reply`` when another took its place."""
        if reply.position < self.state.first():
            raise _taken(reply, f"agent {before.rank} (pid {before.pid}) died, and another has taken its place")

    def put_back(self, semaphore: posix_ipc.Semaphore) -> None:
        """Keep a semaphore whose outcome was read."""
        with self._lock:
            if not self._closed:
                self._free.append(semaphore)
                return
        self.discard(semaphore)

    def discard(self, semaphore: posix_ipc.Semaphore) -> None:
        """Remove a semaphore whose outcome will never be read."""
        if self.in_owner:
            self._names.discard(semaphore.name)
            unlink_quietly(semaphore.name)
            semaphore.close()

    def close(self) -> None:
        """Remove all semaphores, also those of replies that are still waited for. May be called more than once."""
        if not self.in_owner:
            return
        with self._lock:
            self._closed = True
            free, self._free = self._free, []
        for semaphore in free:
            self.discard(semaphore)
        while self._names:
            unlink_quietly(self._names.pop())


def _taken(reply: Reply, cause: str) -> AgentDiedError:
    return AgentDiedError(
        f"{cause}; it had taken {reply.what}, and how far it came is not known. Pairs and batches are taken over by the next agent"
        " there (a Ray pool starts one): call again"
    )


class OutcomeSemaphore(posix_ipc.Semaphore):  # type: ignore[misc]
    """What `transfer` returns: a ``posix_ipc.Semaphore`` that also hands over the outcome.

    ``acquire`` (and ``with``) waits as a semaphore's does and raises the typed error of a transfer that failed; `result` gives
    the report. Its name belongs to the client, which uses it again, so ``unlink`` does nothing.
    """

    _reply: Reply

    @classmethod
    def of(cls, reply: Reply) -> OutcomeSemaphore:
        """A second opening of the reply's semaphore. Raises `BatchClosedError` once the client is closed."""
        try:
            semaphore = cls(reply.name)
        except posix_ipc.ExistentialError:
            raise BatchClosedError(f"the client was closed before {reply.what} was answered: make a new one") from None
        semaphore._reply = reply
        return semaphore

    def result(self, timeout: float | None = None) -> TransferReport:
        """Wait for the outcome and return what was transferred. May be called again, from any thread.

        Raises:
            TimeoutError: the transfer is not over after ``timeout`` seconds. It goes on, and may be waited for again.
            EthaRayError: the transfer failed; the class says how.
            AgentDiedError: the agent died meanwhile.
        """
        if not self._reply.wait(check_timeout(timeout)):
            raise TimeoutError(f"{self._reply.what} is not over after {timeout} s; it goes on: wait again, or close the batch")
        report: TransferReport = self._reply.value(TransferReport)
        return report

    def acquire(self, timeout: float | None = None) -> None:
        """Wait for the outcome as ``posix_ipc.Semaphore.acquire`` does: ``BusyError`` after ``timeout`` seconds.

        Unlike a plain semaphore it stays acquired, and it raises the error of a transfer that failed.
        """
        if not self._reply.wait(check_timeout(timeout)):
            raise posix_ipc.BusyError(f"{self._reply.what} is not over after {timeout} s")
        self._reply.value()

    def done(self) -> bool:
        """Whether the outcome is there, without waiting. Raises `AgentDiedError` when it will never come."""
        return self._reply.wait(0.0)

    def close(self) -> None:
        """Close this opening; the outcome can still be asked for. May be called more than once."""
        with contextlib.suppress(posix_ipc.ExistentialError):
            super().close()

    def unlink(self) -> None:
        """Does nothing: the client removes the name."""

    def __enter__(self) -> OutcomeSemaphore:
        self.acquire()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None) -> None:
        """Nothing is released: the transfer is over."""

    def __del__(self) -> None:
        reply = getattr(self, "_reply", None)
        if reply is not None:
            if not reply.done:
                reply.abandon()
            self.close()
