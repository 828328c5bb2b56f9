"""The worker processes that an agent serves, and which of them have died."""

from __future__ import annotations

import logging
import threading
from dataclasses import dataclass, field

from etha_ray.errors import AgentDiedError, BatchClosedError, ConfigError
from etha_ray.processes import is_alive, pid_namespace
from etha_ray.tensor_bus.batch import Batch
from etha_ray.tensor_bus.commands import BaseCommand, Hello
from etha_ray.tensor_bus.pair import Pair
from etha_ray.tensor_bus.records import NoticeRecord

logger = logging.getLogger(__name__)

_KEPT = 1024
"""Clients that left of which it is still known that they did."""


@dataclass
class Worker:
    """One client of the agent, with its pairs and batches by name; ``closing`` are set once a batch is withdrawn; ``failed`` says why a
    batch could not be registered, until its client has read that; ``notices`` are what it announced, by key."""

    client_id: str
    pid: int
    start_time: float
    pairs: dict[str, Pair] = field(default_factory=dict)
    batches: dict[str, Batch] = field(default_factory=dict)
    closing: dict[str, threading.Event] = field(default_factory=dict)
    failed: dict[str, BaseException] = field(default_factory=dict)
    notices: dict[str, NoticeRecord] = field(default_factory=dict)

    @property
    def alive(self) -> bool:
        """Whether its process lives."""
        return is_alive(self.pid, self.start_time)


class Workers:
    """The clients that have said hello. On the loop only."""

    def __init__(self, agent_rank: int) -> None:
        self._agent_rank = agent_rank
        self._workers: dict[str, Worker] = {}
        self._left: dict[str, None] = {}  # the last that were removed, in their order

    def add(self, hello: Hello) -> Worker:
        """A client introduces itself; one that is known already stays who it is, with all that it has.

        Raises `ConfigError` for one in another pid namespace: its memory could not be opened, and its death not be seen.
        """
        if hello.pid_namespace != pid_namespace():
            raise ConfigError(
                f"agent {self._agent_rank} and this worker (pid {hello.pid} where it runs) are in different pid namespaces, so neither its"
                " memory nor its death could be seen: run both in one container, or let theirs share processes (docker:"
                " --pid=container:... or --pid=host; Kubernetes: shareProcessNamespace: true)"
            )
        worker = self._workers.setdefault(hello.client_id, Worker(hello.client_id, hello.pid, hello.start_time))
        if (worker.pid, worker.start_time) != (hello.pid, hello.start_time):
            raise ConfigError(f"client id {hello.client_id!r} is that of pid {worker.pid}, and not of pid {hello.pid}: take another")
        return worker

    def of(self, command: BaseCommand) -> Worker:
        """Who sent ``command``. Raises `AgentDiedError` for a client of an agent that ran here before."""
        worker = self._workers.get(command.client_id)
        if worker is None:
            if command.client_id in self._left:  # another thread of it has closed it meanwhile
                raise BatchClosedError(f"the client of agent {self._agent_rank} is closed: make a new one")
            raise AgentDiedError(
                f"agent {self._agent_rank} was restarted and does not know this client: make a new client and register again"
            )
        return worker

    def find(self, client_id: str) -> Worker | None:
        """The client with this id, if it is known."""
        return self._workers.get(client_id)

    def all(self) -> list[Worker]:
        """Everyone."""
        return list(self._workers.values())

    def dead(self) -> list[Worker]:
        """Those whose process has died."""
        return [worker for worker in self._workers.values() if not worker.alive]

    def remove(self, worker: Worker) -> None:
        """Forget a client."""
        self._workers.pop(worker.client_id, None)
        self._left[worker.client_id] = None
        if len(self._left) > _KEPT:
            del self._left[next(iter(self._left))]
