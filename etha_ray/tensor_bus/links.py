"""How agents talk: on one host each puts its messages into the other's command queue, across hosts they have a channel."""

from __future__ import annotations

import logging
import os
import select
import threading
import time
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Protocol

from etha_ray.config import FAILURE_TIMEOUT, HEARTBEAT_INTERVAL
from etha_ray.errors import AgentDiedError, EthaRayError, NoTransportError, PeerLostError, QueueFullError, QueueHeldError
from etha_ray.net import Channel
from etha_ray.processes import is_alive, pid_namespace
from etha_ray.tensor_bus.command_queue import CommandQueue
from etha_ray.tensor_bus.host import host_identity, no_address, shares_memory
from etha_ray.tensor_bus.messages import Message, encode_command
from etha_ray.tensor_bus.network import AgentNetwork
from etha_ray.tensor_bus.records import AgentRecord
from etha_ray.tensor_bus.state_file import StateFile
from etha_ray.tensor_bus.watch import AgentWatch

logger = logging.getLogger(__name__)


_ONE_WAY = 3 * FAILURE_TIMEOUT
"""Seconds that an agent of another host may be reached from here, and not reach this one."""


_SURE = FAILURE_TIMEOUT - 2 * HEARTBEAT_INTERVAL
"""Seconds for which an agent may be seen here to stand still while no client of it, that looks more often, can have given it up."""


class _Link(Protocol):
    """One agent's connection to another. Any method raises when the other one is dead; none waits."""

    def send(self, message: Message) -> None:
        """Send after all that was sent before."""

    def check(self) -> None:
        """Send what waits, and look whether the other agent lives."""

    def close(self) -> None:
        """Leave. This may wait."""


class _QueueLink:
    """To an agent of this host."""

    def __init__(self, agent: AgentRecord) -> None:
        self._state = StateFile(agent.state_path)
        try:
            self._watch = AgentWatch(self._state, agent)
            self._watch.check()
            self._queue = CommandQueue(agent.command_queue_path, create=False)
        except FileNotFoundError as error:
            self._state.close()
            raise AgentDiedError(f"agent {agent.rank} (pid {agent.pid}) is gone: its queue was removed") from error
        except BaseException:
            self._state.close()
            raise
        self._outbox: deque[Message] = deque()
        self._end = select.poll()
        self._process = _open_process(agent)
        if self._process is not None:
            self._end.register(self._process, select.POLLIN)

    def ended(self) -> bool:
        """Whether its process has ended; one in another pid namespace cannot be looked at."""
        return bool(self._end.poll(0))

    @property
    def silence(self) -> float:
        """Seconds for which it has not beaten."""
        return self._watch.silence

    def send(self, message: Message) -> None:
        self._outbox.append(message)
        self._flush()

    def check(self) -> None:
        self._watch.check()
        self._flush()

    def close(self) -> None:
        if self._process is not None:
            os.close(self._process)
        self._queue.close(destroy=False)
        self._state.close()

    def _flush(self) -> None:
        while self._outbox:
            try:
                self._queue.enqueue(self._outbox[0], block=False)
            except (QueueFullError, QueueHeldError):
                return  # its agent is behind, or a worker of it stands still; the next tick tries again
            self._outbox.popleft()


def _open_process(agent: AgentRecord) -> int | None:
    """A descriptor that can be read from once the agent's process has ended; None if it is in another pid namespace, or has ended."""
    if not agent.host.endswith(f":{pid_namespace():08x}"):
        return None
    try:
        descriptor = os.pidfd_open(agent.pid)
    except OSError:
        return None
    if is_alive(agent.pid, agent.start_time):
        return descriptor
    os.close(descriptor)  # of another process with that pid
    return None


class _ChannelLink:
    """To an agent of another host. The channel itself says when that agent is lost; ``heard`` whether it has one to here, too."""

    def __init__(self, agent: AgentRecord, channel: Channel, heard: Callable[[], bool]) -> None:
        self._agent = agent
        self._channel = channel
        self._heard = heard
        self._heard_at = time.monotonic()

    def send(self, message: Message) -> None:
        self._channel.send(encode_command(message))

    def check(self) -> None:
        now = time.monotonic()
        if self._heard():
            self._heard_at = now
        elif now - self._heard_at > _ONE_WAY:
            raise PeerLostError(
                f"agent {self._agent.rank} on {self._agent.hostname} is reached from here, and does not reach this agent: let its host"
                " connect to the address of this one"
            )

    def close(self) -> None:
        self._channel.close()


class Links:
    """An agent's connections to the agents it exchanges data with. On the loop only; never waits.

    Args:
        own: this agent.
        network: how it reaches agents of other hosts; None if it does not.
        loop_back: takes this agent's messages to itself (both sides of a pair on one agent), to be handled soon.
        post: has the loop run a callback, from any thread.
        lost: has an agent's incarnation and the reason, soon after it was found dead; never called from within a method of this.
    """

    def __init__(
        self,
        own: AgentRecord,
        network: AgentNetwork | None,
        loop_back: Callable[[Message], None],
        post: Callable[[Callable[[], None]], None],
        lost: Callable[[str, str], None],
    ) -> None:
        self._own = own
        self._network = network
        self._loop_back = loop_back
        self._post = post
        self._lost = lost
        self._links: dict[str, _Link] = {}
        self._leaving: set[threading.Thread] = set()

    def follow(self, agent: AgentRecord) -> None:
        """Notice when this agent dies, or is dead already."""
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
            link.send(message)
        except (EthaRayError, OSError) as error:
            self._drop(agent.incarnation, link, str(error))

    def remind(self, agent: AgentRecord, message: Message) -> None:
        """Send a message to an agent that was lost, if it is one of this host that may only stand still: it is read once that goes on.

        Agents of two hosts lose one another both, and what was said to one that died is of no use to the next.
        """
        if agent.incarnation != self._own.incarnation and shares_memory(agent) and is_alive(agent.pid, agent.start_time):
            self.tell(agent, message)

    def check(self) -> None:
        """Send what waits, and find out who died."""
        for incarnation, link in list(self._links.items()):
            try:
                link.check()
            except (EthaRayError, OSError) as error:
                self._drop(incarnation, link, str(error))

    def gone(self, agent: AgentRecord) -> str:
        """Why an agent of this host may have failed its workers; empty if it has not. Cheap.

        An agent that was killed, or stands still, says nothing to those who read its workers' memory, and its workers may write at
        once when they find that out, before `check` looks.
        """
        if agent.incarnation == self._own.incarnation:
            return ""
        link = self._links.get(agent.incarnation)
        if link is None:
            return f"agent {agent.rank} was lost"
        if not isinstance(link, _QueueLink):
            return ""
        try:
            if link.ended():
                link.check()
            silence = link.silence
        except (EthaRayError, OSError) as error:
            self._drop(agent.incarnation, link, str(error))
            return str(error)
        return "" if silence < _SURE else f"agent {agent.rank} has not answered for {silence:.1f} s, and its workers may write by now"

    def left(self, incarnation: str, reason: str) -> None:
        """An agent of another host sends no more, and may have sent what did not come in."""
        logger.debug("an agent left: %s", reason)
        self._lost(incarnation, reason)

    def close(self) -> None:
        """Leave all agents, and wait until that is done."""
        for link in self._links.values():
            self._leave(link)
        self._links.clear()
        for thread in list(self._leaving):
            thread.join()

    def _reach(self, agent: AgentRecord) -> _Link | None:
        incarnation = agent.incarnation
        if incarnation not in self._links:
            try:
                self._links[incarnation] = _QueueLink(agent) if shares_memory(agent) else self._dial(agent)
            except (EthaRayError, OSError) as error:
                self._say_lost(incarnation, str(error))
        return self._links.get(incarnation)

    def _dial(self, agent: AgentRecord) -> _Link:
        if self._network is None or not agent.address:
            if agent.host == host_identity():
                raise AgentDiedError(f"agent {agent.rank} (pid {agent.pid}) is gone: what it left in /dev/shm was removed")
            raise NoTransportError(no_address(self._own, agent))

        def lost(reason: str) -> None:
            self._post(lambda: self._drop(agent.incarnation, link, reason))

        heard = partial(self._network.hears, agent.incarnation)
        link = _ChannelLink(agent, self._network.connect(agent, lost), heard)
        return link

    def _drop(self, incarnation: str, link: _Link, reason: str) -> None:
        if self._links.get(incarnation) is not link:
            return  # noticed before
        del self._links[incarnation]
        self._leave(link)
        self._say_lost(incarnation, reason)

    def _say_lost(self, incarnation: str, reason: str) -> None:
        logger.warning("lost an agent: %s", reason)
        # Its own channel, if it still has one, ends too, so that it does not wait for what was lost here.
        caller = None if self._network is None else self._network.hang_up(incarnation)
        if caller is not None:
            self._leave(caller)
        # Not at once: whoever called is in the midst of telling others.
        self._post(lambda: self._lost(incarnation, reason))

    def _leave(self, link: _Link | Channel) -> None:
        if isinstance(link, _QueueLink):
            link.close()
            return

        def leave() -> None:
            link.close()  # a channel takes a moment for what waits to be sent
            self._leaving.discard(thread)

        thread = threading.Thread(target=leave, name="etha-ray leave", daemon=True)
        self._leaving.add(thread)
        thread.start()
