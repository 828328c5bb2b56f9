"""How agents of other hosts reach this one: a listener for their messages and for what they read, and the pool's secret.

The secret is made by the first agent of a pool and kept in the key-value store: who may read the store belongs to the pool.

Two agents have a channel for messages each way, and lose both or none: a message that was lost with one of them must not leave
the other end waiting for it. So who loses its own channel hangs up the other's (`AgentNetwork.hang_up`), and whose channel is
hung up hears of it.
"""

from __future__ import annotations

import ipaddress
import logging
import os
import socket
import threading
from collections.abc import Callable
from urllib.parse import urlsplit

import msgspec

from etha_ray.accelerator import Accelerator
from etha_ray.errors import ConfigError, EthaRayError, PeerLostError
from etha_ray.kvstore import KVStore
from etha_ray.net import SECRET_BYTES, Address, Channel, Server, accept_channels, connect
from etha_ray.tensor_bus.commands import BaseCommand
from etha_ray.tensor_bus.messages import DATA_MESSAGES, Message, RegistrationClosed, decode_command
from etha_ray.tensor_bus.records import SECRET_KEY, AgentRecord
from etha_ray.transport.nccl import Communicators
from etha_ray.transport.network import DEFAULT_MEMORY_BUDGET, NetworkTransport, Path

logger = logging.getLogger(__name__)

_ANY_PORT = 9
_MESSAGES = "messages"
_FROM_AGENTS: tuple[type[BaseCommand], ...] = (*DATA_MESSAGES, RegistrationClosed)


class AgentNetwork:
    """One agent's place in the network.

    Args:
        store: where the pool keeps its secret.
        host: the address of this host to listen on; other agents connect to it.
        incarnation: this agent's; others learn it when it connects.
        memory_budget: bytes of staging memory over all transfers under way.
        checksums: what this agent reads from others is compared with the checksums of what was sent.
        accelerator, communicators, path: the agent's GPU, and how tensors there go; see `NetworkTransport`.

    Raises:
        ConfigError: ``host`` is no address of this host, or none that others could connect to; or the budget is too small.
        StoreError: the secret cannot be had.
    """

    def __init__(
        self,
        store: KVStore,
        host: str,
        incarnation: str,
        memory_budget: int = DEFAULT_MEMORY_BUDGET,
        *,
        checksums: bool = True,
        accelerator: Accelerator | None = None,
        communicators: Communicators | str = "",
        path: Path = "auto",
    ) -> None:
        _check_host(host)
        self._hello = incarnation.encode()
        self._receive: Callable[[Message], None] | None = None
        self._left: Callable[[str, str], None] | None = None
        self._lock = threading.Lock()
        self._callers: dict[bytes, Channel] = {}
        self._secret = _pool_secret(store)
        self.transport = NetworkTransport(
            self._secret,
            memory_budget=memory_budget,
            checksums=checksums,
            accelerator=accelerator,
            communicators=communicators,
            path=path,
        )
        services = {**self.transport.services, _MESSAGES: accept_channels(self._take, self._ended, opened=self._opened)}
        self._server = Server(self._secret, services, host)

    def serve(self, receive: Callable[[Message], None], left: Callable[[str, str], None]) -> None:
        """Let others connect for messages; until now they were sent away.

        Args:
            receive: takes each message of another agent, on a thread of its own. What it raises ends that agent's channel.
            left: called with an agent's incarnation and the reason when it can send nothing more, or what it sent was lost; on that
                thread too, after its last message.
        """
        self._left, self._receive = left, receive

    @property
    def address(self) -> str:
        """Where others connect to, ``HOST:PORT``."""
        return str(self._server.address)

    def connect(self, agent: AgentRecord, lost: Callable[[str], None]) -> Channel:
        """A channel for messages to ``agent``; ``lost`` gets the reason, on a thread of its own, when the agent cannot be reached."""

        def say(_: Channel, error: EthaRayError) -> None:
            lost(f"agent {agent.rank} on {agent.hostname} cannot be reached any more: {error}")

        return connect(Address.parse(agent.address), self._secret, _MESSAGES, self._take, say, hello=self._hello)

    def hears(self, incarnation: str) -> bool:
        """Whether this agent has a channel to here."""
        with self._lock:
            return incarnation.encode() in self._callers

    def hang_up(self, incarnation: str) -> Channel | None:
        """Take no more messages from this agent, on the channel that it has; that one is to be closed by the caller."""
        with self._lock:
            return self._callers.pop(incarnation.encode(), None)

    def close(self) -> None:
        """End all connections and stop listening."""
        self.transport.close()
        self._server.close()

    def _take(self, channel: Channel, data: bytes) -> None:
        try:
            message = decode_command(data)
        except msgspec.DecodeError as error:
            raise PeerLostError(f"{channel.peer} sent a message that cannot be read ({error}); run the same etha_ray everywhere") from error
        if not isinstance(message, _FROM_AGENTS):
            raise PeerLostError(f"{channel.peer} sent a {type(message).__name__}, which is for workers to send")
        if self._receive is None:
            raise PeerLostError(f"{channel.peer} sent a message to an agent that is starting up")
        self._receive(message)

    def _opened(self, channel: Channel) -> None:
        if self._left is None:
            raise PeerLostError(f"{channel.peer} connected to an agent that is starting up")
        with self._lock:
            earlier, self._callers[channel.hello] = self._callers.get(channel.hello), channel
        if earlier is not None:  # its end has not been noticed here, and its last messages may be lost
            self._say_left(channel.hello, f"{channel.peer} has lost its connection")

    def _ended(self, channel: Channel, error: EthaRayError) -> None:
        with self._lock:
            current = self._callers.get(channel.hello) is channel
            if current:
                del self._callers[channel.hello]
        if current:
            self._say_left(channel.hello, str(error))

    def _say_left(self, hello: bytes, reason: str) -> None:
        logger.debug("no more messages: %s", reason)
        if self._left is not None:
            self._left(hello.decode(errors="replace"), reason)


def _check_host(host: str) -> None:
    try:
        nowhere = ipaddress.ip_address(host).is_unspecified
    except ValueError:
        return  # a name
    if nowhere:
        raise ConfigError(f"host {host!r} is no address that others could connect to: give that of one of this host's interfaces")


def _pool_secret(store: KVStore) -> bytes:
    secret = store.compare_and_set(SECRET_KEY, None, os.urandom(SECRET_BYTES))
    assert secret is not None  # missing was what it was compared to
    return secret


def address_towards(store_url: str) -> str | None:
    """This host's address on its way to the store, which others can reach too; None where that is loopback, or no host is named."""
    first = urlsplit(store_url).netloc.rpartition("@")[2].split(",")[0]
    host = urlsplit(f"//{first}").hostname
    if not host:
        return None
    try:
        family, kind, protocol, _, where = socket.getaddrinfo(host, _ANY_PORT, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.connect(where)  # sends nothing: only the way is looked up
            address = str(probe.getsockname()[0])
    except OSError as error:
        raise ConfigError(f"no way leads to the store's host {host!r} ({error}): correct the store URL, or give --host") from error
    return None if ipaddress.ip_address(address.partition("%")[0]).is_loopback else address
