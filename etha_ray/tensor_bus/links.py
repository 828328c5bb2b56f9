"""How agents of one host talk: each puts its messages into the other's command queue."""

from __future__ import annotations

import logging
import os
from collections import deque
from collections.abc import Callable

from etha_ray.errors import AgentDiedError, EthaRayError, QueueFullError
from etha_ray.tensor_bus.command_queue import CommandQueue
from etha_ray.tensor_bus.commands import Message
from etha_ray.tensor_bus.records import AgentRecord
from etha_ray.tensor_bus.state_file import StateFile
from etha_ray.tensor_bus.watch import AgentWatch

logger = logging.getLogger(__name__)


class _Link:
    def __init__(self, agent: AgentRecord) -> None:
        self.state = StateFile(agent.state_path)
        try:
            self.watch = AgentWatch(self.state, agent)
            self.watch.check()
            if not os.path.exists(agent.command_queue_path):  # opening it would make a queue that nobody reads
                raise AgentDiedError(f"agent {agent.rank} (pid {agent.pid}) is gone: its queue was removed")
            self.queue = CommandQueue(agent.command_queue_path)
        except BaseException:
            self.state.close()
            raise
        self.outbox: deque[Message] = deque()

    def flush(self) -> None:
        while self.outbox:
            try:
                self.queue.enqueue(self.outbox[0], block=False)
            except QueueFullError:
                return  # its agent is behind; the next tick tries again
            self.outbox.popleft()

    def close(self) -> None:
        self.queue.close(destroy=False)
        self.state.close()


class Links:
    """An agent's connections to the agents it exchanges data with. On the loop only; never waits.

    Args:
        own: this agent.
        loop_back: takes this agent's messages to itself (both sides of a pair on one agent), to be handled soon.
        lost: called with an agent's incarnation and the reason when it is found dead.
    """

    def __init__(self, own: AgentRecord, loop_back: Callable[[Message], None], lost: Callable[[str, str], None]) -> None:
        self._own = own
        self._loop_back = loop_back
        self._lost = lost
        self._links: dict[str, _Link] = {}

    def follow(self, agent: AgentRecord) -> None:
        """Notice when this agent dies; if it is dead already, ``lost`` is called at once."""
        if agent.incarnation != self._own.incarnation:
            self._reach(agent)

    def tell(self, agent: AgentRecord, message: Message) -> None:
        """Send a message; an agent that is dead is reported through ``lost`` instead."""
        if agent.incarnation == self._own.incarnation:
            self._loop_back(message)
            return
        link = self._reach(agent)
        if link is None:
            return
        try:
            link.outbox.append(message)
            link.flush()
        except (EthaRayError, OSError) as error:
            self._drop(agent.incarnation, str(error))

    def check(self) -> None:
        """Send what waits, and find out who died."""
        for incarnation, link in list(self._links.items()):
            try:
                link.watch.check()
                link.flush()
            except (EthaRayError, OSError) as error:
                self._drop(incarnation, str(error))

    def close(self) -> None:
        """Leave all agents."""
        for link in self._links.values():
            link.close()
        self._links.clear()

    def _reach(self, agent: AgentRecord) -> _Link | None:
        try:
            if agent.incarnation not in self._links:
                self._links[agent.incarnation] = _Link(agent)
        except (EthaRayError, OSError) as error:
            self._drop(agent.incarnation, str(error))
        return self._links.get(agent.incarnation)

    def _drop(self, incarnation: str, reason: str) -> None:
        link = self._links.pop(incarnation, None)
        if link is not None:
            link.close()
        logger.warning("lost an agent: %s", reason)
        self._lost(incarnation, reason)
