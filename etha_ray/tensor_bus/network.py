"""How agents of other hosts reach this one: a listener for their messages and for what they read, and the pool's secret.

The secret is made by the first agent of a pool and kept in the key-value store: who may read the store belongs to the pool.
"""

from __future__ import annotations

import ipaddress
import logging
import os
import socket
from collections.abc import Callable
from urllib.parse import urlsplit

import msgspec

from etha_ray.errors import ConfigError, EthaRayError, PeerLostError
from etha_ray.kvstore import KVStore
from etha_ray.net import SECRET_BYTES, Address, Channel, Server, accept_channels, connect
from etha_ray.tensor_bus.commands import DataReady, DataRevoked, DataTaken, Message, RegistrationClosed, decode_command
from etha_ray.tensor_bus.records import SECRET_KEY, AgentRecord
from etha_ray.transport.network import NetworkTransport

logger = logging.getLogger(__name__)

_ANY_PORT = 9
_MESSAGES = "messages"
_FROM_AGENTS = (DataReady, DataTaken, DataRevoked, RegistrationClosed)


class AgentNetwork:
    """One agent's place in the network.

    Args:
        store: where the pool keeps its secret.
        host: the address of this host to listen on; other agents connect to it.
        receive: takes each message of another agent, on a thread of its own.

    Raises:
        ConfigError: ``host`` is no address of this host.
        StoreError: the secret cannot be had.
    """

    def __init__(self, store: KVStore, host: str, receive: Callable[[Message], None]) -> None:
        self._receive = receive
        self._secret = _pool_secret(store)
        self.transport = NetworkTransport(self._secret)
        services = {**self.transport.services, _MESSAGES: accept_channels(self._take, self._left)}
        self._server = Server(self._secret, services, host)

    @property
    def address(self) -> str:
        """Where others connect to, ``HOST:PORT``."""
        return str(self._server.address)

    def connect(self, agent: AgentRecord, lost: Callable[[str], None]) -> Channel:
        """A channel for messages to ``agent``; ``lost`` gets the reason, on a thread of its own, when the agent cannot be reached."""

        def say(_: Channel, error: EthaRayError) -> None:
            lost(f"agent {agent.rank} on {agent.hostname} cannot be reached any more: {error}")

        return connect(Address.parse(agent.address), self._secret, _MESSAGES, self._take, say)

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
        try:
            self._receive(message)
        except EthaRayError as error:
            logger.debug("a message of %s came too late: %s", channel.peer, error)

    def _left(self, channel: Channel, error: EthaRayError) -> None:
        logger.debug("%s does not send any more: %s", channel.peer, error)


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
