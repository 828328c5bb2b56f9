"""The listening end: one socket, one thread for each connection, and no service before the secret was proved.

Strangers cannot tie it up. A handshake must be over in time however its bytes trickle in; of those under way the oldest gives
way to a new one beyond `MAX_STRANGERS`; nothing is allocated by a length they name. What was refused is logged once for each
host and reason.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import socket
import struct
import threading
import time
from collections.abc import Callable, Mapping
from typing import TypeAlias

from etha_ray.config import FAILURE_TIMEOUT
from etha_ray.errors import ConfigError, EthaRayError, PeerLostError
from etha_ray.net.address import Address
from etha_ray.net.connection import Connection
from etha_ray.net.handshake import admit, check_secret, introduce

logger = logging.getLogger(__name__)

Service: TypeAlias = Callable[[Connection, bytes], None]
"""Takes a connection and the hello of who opened it, on a thread of its own; the connection is closed when it returns."""

MAX_STRANGERS = 64
"""Most connections that are under way to prove the secret."""

_MAX_NOTED = 256
_BACKLOG = 256
_SHORT_OF = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})
_SHORTAGE_PAUSE = 0.1
_TIMEVAL = struct.Struct("ll")


class Server:
    """Listens until it is closed.

    Args:
        secret: 32 random bytes that both ends know.
        services: what a connection may ask for.
        host: the address of the interface to listen on, as others are told it by `address`; of a name the first address is taken.
        port: 0 for one that is free.
        failure_timeout: seconds that a handshake may take.

    Raises:
        ConfigError: the secret is none, or host and port cannot be listened on.
    """

    def __init__(
        self, secret: bytes, services: Mapping[str, Service], host: str, port: int = 0, *, failure_timeout: float = FAILURE_TIMEOUT
    ) -> None:
        self._secret = check_secret(secret)
        self._services = dict(services)
        self._failure_timeout = failure_timeout
        self._lock = threading.Lock()
        self._closing = threading.Event()
        self._threads: dict[Connection, threading.Thread] = {}
        self._strangers: dict[Connection, None] = {}
        self._noted: set[tuple[str, str]] = set()
        try:
            family, _, _, _, where = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
            self._listener = socket.create_server(where, family=family, backlog=_BACKLOG)
        except OSError as error:
            raise ConfigError(f"cannot listen on {host!r}, port {port} ({error}): give an address of this host, and a free port") from error
        self.address = Address(host, self._listener.getsockname()[1])
        self._acceptor = threading.Thread(target=self._accept, name="etha-ray-accept", daemon=True)
        self._acceptor.start()

    def close(self) -> None:
        """End all connections and join their threads. From any thread, a service's own among them; may be called twice."""
        self._closing.set()
        with contextlib.suppress(OSError):  # closed before
            self._listener.shutdown(socket.SHUT_RDWR)  # wakes accept; closing the descriptor would not
        if threading.current_thread() is not self._acceptor:
            self._acceptor.join()
        self._listener.close()
        with self._lock:
            connections = list(self._threads.items())
        for connection, _ in connections:
            connection.shutdown()
        for _, thread in connections:
            if thread is not threading.current_thread():
                thread.join()

    def _accept(self) -> None:
        while not self._closing.is_set():
            try:
                sock, where = self._listener.accept()
            except OSError as error:
                if error.errno in _SHORT_OF:
                    self._note("accept", f"no connection can be taken: {error.strerror}; raise the limit (ulimit -n)")
                self._closing.wait(_SHORTAGE_PAUSE)
                continue
            try:
                connection = Connection(sock, str(Address(where[0], where[1])))
            except OSError:
                sock.close()  # it was gone before it was looked at
                continue
            thread = threading.Thread(target=self._serve, args=(connection, where[0]), name=f"etha-ray-{connection.peer}", daemon=True)
            with self._lock:
                oldest = next(iter(self._strangers)) if len(self._strangers) >= MAX_STRANGERS else None
                if oldest is not None:
                    del self._strangers[oldest]
                self._strangers[connection] = None
                self._threads[connection] = thread
            if oldest is not None:
                oldest.shutdown()
            try:
                thread.start()
            except RuntimeError as error:  # the system gives no more threads
                self._note("accept", f"no connection can be taken: {error}")
                self._forget(connection)
                self._closing.wait(_SHORTAGE_PAUSE)

    def _serve(self, connection: Connection, host: str) -> None:
        try:
            try:
                connection.receive_within(self._failure_timeout)
                service, hello = admit(connection, self._secret, frozenset(self._services))
                connection.receive_patiently()
            except (EthaRayError, OSError) as error:
                if not self._closing.is_set():
                    self._note(host, str(error).replace(connection.peer, host))
                return
            with self._lock:
                if self._strangers.pop(connection, connection) is connection:
                    return  # pushed out at the last moment
            self._services[service](connection, hello)
        except EthaRayError as error:
            logger.debug("a connection ended: %s", error)
        except Exception:
            logger.exception("the service of a connection from %s failed", connection.peer)
        finally:
            self._forget(connection)

    def _forget(self, connection: Connection) -> None:
        with self._lock:
            self._strangers.pop(connection, None)
            self._threads.pop(connection, None)
        connection.shutdown()
        connection.close()

    def _note(self, host: str, reason: str) -> None:
        with self._lock:
            if (host, reason) in self._noted or len(self._noted) >= _MAX_NOTED:
                return
            self._noted.add((host, reason))
        logger.warning("server at %s: %s (said once)", self.address, reason)

    def __repr__(self) -> str:
        return f"Server({self.address}, services={sorted(self._services)}{', closed' if self._closing.is_set() else ''})"


def dial(
    address: Address,
    secret: bytes,
    service: str,
    hello: bytes = b"",
    timeout: float = FAILURE_TIMEOUT,
    opened: Callable[[Connection], None] | None = None,
) -> Connection:
    """Open a connection to a service of the server at ``address``.

    Args:
        opened: gets the connection before anything is waited for, so that another thread can `Connection.shutdown` it.

    Raises:
        PeerLostError: nobody listens there, or does not answer as a server within ``timeout`` seconds.
        NoTransportError: the server refused, or the two secrets differ.
    """
    check_secret(secret)
    deadline = time.monotonic() + timeout
    reason = "it has no address"
    try:
        found = socket.getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM)
    except OSError as error:
        raise PeerLostError(f"cannot reach the agent at {address}: {error}") from error
    for family, kind, protocol, _, where in found:
        connection = Connection(socket.socket(family, kind, protocol), f"the agent at {address}")
        try:
            if opened is not None:
                opened(connection)
            left = max(1e-3, deadline - time.monotonic())
            sock = connection.socket
            sock.setsockopt(
                socket.SOL_SOCKET, socket.SO_SNDTIMEO, _TIMEVAL.pack(int(left), int(left % 1 * 1e6))
            )  # how long connect may take
            sock.connect(where)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, _TIMEVAL.pack(0, 0))
            connection.receive_within(max(1e-3, deadline - time.monotonic()))
            introduce(connection, secret, service, hello)
            connection.receive_patiently()
        except BlockingIOError:
            reason = f"it did not answer within {timeout:g} s"
        except OSError as error:
            if isinstance(error, EthaRayError):
                connection.close()
                raise
            reason = error.strerror or str(error)
        except BaseException:
            connection.close()
            raise
        else:
            return connection
        connection.close()
    raise PeerLostError(f"cannot reach the agent at {address}: {reason}. Is it alive, and may this host connect to it?")
