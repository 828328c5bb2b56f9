"""A client's line to its agent: commands go out, and their outcomes are waited for."""

from __future__ import annotations

import contextlib
import itertools
import os
import secrets
import time
from typing import Any

from etha_ray.config import FAILURE_TIMEOUT
from etha_ray.errors import (
    AgentNotFoundError,
    BatchClosedError,
    EthaRayError,
    QueueClosedError,
    QueueFullError,
    QueueHeldError,
    TransferTimeoutError,
)
from etha_ray.processes import pid_namespace, process_start_time
from etha_ray.tensor_bus.command_queue import CommandQueue
from etha_ray.tensor_bus.commands import CancelTransfer, CleanupBatch, Goodbye, Hello
from etha_ray.tensor_bus.messages import Message
from etha_ray.tensor_bus.reply import Reply, ReplyPool
from etha_ray.tensor_bus.snapshot import silent_store
from etha_ray.tensor_bus.watch import AgentWatch, find_agent

_GRACE = 0.5
"""Seconds that a client waits beyond a command's own timeout, for the agent to say who was missing."""

_SLICE = 0.5
"""Seconds after which a command that finds the queue full, or held up, looks whether the agent still lives."""


class Connection:
    """One client's commands to one agent. Several threads may use it; a forked child may not.

    Args:
        agent_rank: the agent's rank.
        queue_path, state_path: where it is.
        timeout: seconds to wait for the agent to answer.

    Raises:
        AgentNotFoundError: no agent answers at these paths in time.
        UnsafePathError: a path belongs to another user.
    """

    def __init__(self, agent_rank: int, queue_path: str, state_path: str, timeout: float | None) -> None:
        self.agent_rank = agent_rank
        self.pid = os.getpid()
        self.client_id = f"{self.pid}-{secrets.token_hex(8)}"
        self.closed = False
        self._command_ids = itertools.count(1)
        self.state, watch = find_agent(agent_rank, state_path, queue_path, timeout)
        try:
            self.queue = CommandQueue(queue_path, create=False)
        except FileNotFoundError:
            self.state.close()
            raise AgentNotFoundError(
                f"agent {agent_rank} (pid {watch.record.pid}) is just being shut down: start it again. If it runs, its semaphores are"
                " not in this process's /dev/shm: let both have the same (containers: --ipc)"
            ) from None
        except BaseException:
            self.state.close()
            raise
        self.pool = ReplyPool(self.state, self.queue, watch, self.client_id)
        self._first = watch.record.incarnation
        hello = Hello(pid=self.pid, start_time=process_start_time(self.pid) or 0.0, pid_namespace=pid_namespace())
        try:
            self.call(hello, "hello", str(agent_rank), None if timeout is None else max(timeout, FAILURE_TIMEOUT))
        except BaseException:
            self.leave()
            raise

    @property
    def succeeded(self) -> bool:
        """Whether the agent that serves now is another one than at the start."""
        return self.watch.record.incarnation != self._first

    @property
    def watch(self) -> AgentWatch:
        """On the agent that serves now."""
        return self.pool.watch

    def prepare(self, command: Message, command_type: str, context: str, timeout: float | None, *, closing: bool = False) -> Reply:
        """Make a command ready to be handed to the agent, which may take ``timeout``. ``closing``: also when `closed`."""
        if os.getpid() != self.pid:
            raise QueueClosedError(f"this client belongs to process {self.pid}: after a fork, make a new one in the child")
        if self.closed and not closing:
            raise BatchClosedError(self._gone())
        reply = self.pool.take(command_type, context, next(self._command_ids))
        # Nobody waits for the next agent in order to leave: it finds these in the queue.
        reply.patient = not isinstance(command, (CleanupBatch, Goodbye))
        command.semaphore_name = reply.name
        command.command_id = reply.command_id
        command.client_id = self.client_id
        command.timestamp = time.time()
        command.timeout = timeout
        return reply

    def send(self, reply: Reply, command: Message, patience: float | None) -> None:
        """Hand a command to the agent, whose queue may be full for as long as ``patience``."""
        try:
            reply.position = self._enqueue(command, patience)
        except BaseException:
            reply.abandon()
            raise

    def start(
        self,
        command: Message,
        command_type: str,
        context: str,
        timeout: float | None,
        patience: float | None = None,
        *,
        closing: bool = False,
    ) -> Reply:
        """`prepare` and `send`; ``patience`` is by default the ``timeout``."""
        reply = self.prepare(command, command_type, context, timeout, closing=closing)
        self.send(reply, command, timeout if patience is None else patience)
        return reply

    def exchange(self, reply: Reply, command: Message, timeout: float | None, cancel: CancelTransfer | None = None) -> None:
        """`send`, and wait as `finish` does. Whatever interrupts it (Ctrl-C), the agent is told by ``cancel``."""
        try:
            self.send(reply, command, timeout)
            self._wait(reply, timeout)
        except BaseException:
            self._give_up(reply, cancel)
            raise

    def finish(self, reply: Reply, timeout: float | None, kind: Any = Any, *, cancel: CancelTransfer | None = None) -> Any:
        """Wait for a command that carries its own timeout: the agent answers it with who was missing, and a client that
        still hears nothing gives up by itself, and sends ``cancel``."""
        try:
            self._wait(reply, timeout)
        except BaseException:
            self._give_up(reply, cancel)
            raise
        return reply.value(kind)

    def call(
        self,
        command: Message,
        command_type: str,
        context: str,
        timeout: float | None,
        kind: Any = Any,
        cancel: CancelTransfer | None = None,
    ) -> Any:
        """`prepare` and `exchange`: the value, a ``kind``."""
        reply = self.prepare(command, command_type, context, timeout)
        self.exchange(reply, command, timeout, cancel)
        return reply.value(kind)

    def leave(self) -> None:
        """Say goodbye without waiting for an answer, and let go of everything."""
        self.closed = True
        if self.pool.in_owner:
            self.say_goodbye()
        self.release()

    def say_goodbye(self, because: str = "") -> None:
        """Have the agent, or the next one there, forget this client; nobody waits for an answer. ``because``: see `Goodbye`."""
        self.mention(Goodbye(because=because))  # where it is not heard, the process's end will do

    def mention(self, command: Message) -> None:
        """Hand over a command that has no answer, unless the queue is full, or gone."""
        command.client_id = self.client_id
        with contextlib.suppress(EthaRayError):
            self.queue.enqueue(command, block=False)

    def release(self) -> None:
        """Let go of everything."""
        self.pool.close()
        self.queue.close(destroy=False)
        self.state.close()

    def _enqueue(self, command: Message, patience: float | None) -> int:
        began = time.monotonic()
        deadline = None if patience is None else began + patience
        while True:
            remaining = _SLICE if deadline is None else max(0.0, min(_SLICE, deadline - time.monotonic()))
            try:
                return self.queue.enqueue(command, timeout=remaining)
            except (QueueFullError, QueueHeldError) as error:
                self.watch.check()  # it may be the agent that stands still
                now = time.monotonic()
                held = isinstance(error, QueueHeldError) and now - began > FAILURE_TIMEOUT + _SLICE
                if held or (deadline is not None and now >= deadline):
                    raise
            except QueueClosedError:
                raise BatchClosedError(self._gone()) from None

    def _wait(self, reply: Reply, timeout: float | None) -> None:
        if not reply.wait(None if timeout is None else timeout + _GRACE):
            what = f"{reply.what}: agent {self.agent_rank} gave no answer within {timeout} s"
            since = reply.store_silent_since()
            if since:
                raise silent_store(what, since)
            raise TransferTimeoutError(f"{what}: it still copies, is overloaded, or its store was away")

    def _give_up(self, reply: Reply, cancel: CancelTransfer | None) -> None:
        reply.abandon()
        if cancel is not None and not self.closed:
            cancel.client_id = self.client_id
            cancel.command_id = reply.command_id
            with contextlib.suppress(EthaRayError):  # what is under way is an error already
                self.queue.enqueue(cancel, timeout=1.0)

    def _gone(self) -> str:
        return f"the client of agent {self.agent_rank} is closed: make a new one"
