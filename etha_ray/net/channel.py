"""A connection for small messages, in order both ways, that is never silent: who falls silent is lost.

Each end sends a heartbeat whenever it has said nothing for a tenth of the failure timeout. A process that was killed is
noticed by its kernel closing the connection; one that was stopped, or whose packets no longer arrive, by its silence.

Two threads: one reads and calls ``receive``, one sends. `Channel.send` therefore never waits, and a ``receive`` that takes
long holds up nobody but its own channel, and is not taken for a death by either end.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable

import msgspec

from etha_ray.config import FAILURE_TIMEOUT
from etha_ray.decoding import Decoder
from etha_ray.errors import EthaRayError, PeerLostError
from etha_ray.net.address import Address
from etha_ray.net.connection import Connection
from etha_ray.net.handshake import check_secret
from etha_ray.net.server import Service, dial

logger = logging.getLogger(__name__)

MAX_MESSAGE = 64 << 20
"""Bytes of the largest message."""

MAX_OUTBOX = 2 * MAX_MESSAGE
"""Bytes that may wait to be sent. An end that lets more pile up is lost: it is alive, and takes nothing."""

_TICKS = 10
"""Heartbeats in a failure timeout."""

_CLOSE_GRACE = 0.5
"""Seconds that `Channel.close` gives to what still waits to be sent."""


class _Message(msgspec.Struct, frozen=True, tag="m", array_like=True):
    """A message is this frame's payload."""


class _Heartbeat(msgspec.Struct, frozen=True, tag="h", array_like=True):
    """The sender lives."""


class _Goodbye(msgspec.Struct, frozen=True, tag="g", array_like=True):
    """The sender sends nothing more: it closed the channel."""


_decoder: Decoder[_Message | _Heartbeat | _Goodbye] = Decoder(_Message | _Heartbeat | _Goodbye)


class Channel:
    """One end of a channel. Made by `connect` or `accept_channels`.

    ``peer`` says who is at the other end, ``hello`` what the end that connected said of itself.
    """

    def __init__(
        self,
        peer: str,
        hello: bytes,
        receive: Callable[[Channel, bytes], None],
        lost: Callable[[Channel, EthaRayError], None],
        failure_timeout: float,
    ) -> None:
        self.peer = peer
        self.hello = hello
        self._receive = receive
        self._lost = lost
        self._failure_timeout = failure_timeout
        self._changed = threading.Condition()
        self._outbox: deque[bytes] = deque()
        self._outbox_bytes = 0
        self._connection: Connection | None = None
        self._closing = False
        self._ended = False
        self._error: EthaRayError | None = None
        self._reader = threading.current_thread()

    def send(self, message: bytes) -> None:
        """Send a message after those before it; never waits. From any thread. What was sent may still be lost with the other end.

        Raises:
            ValueError: it is longer than `MAX_MESSAGE`.
            PeerLostError: the channel is over.
        """
        if len(message) > MAX_MESSAGE:
            raise ValueError(f"a message of {len(message)} bytes for {self.peer}: {MAX_MESSAGE} is the most; send it in parts")
        with self._changed:
            if self._closing:
                raise PeerLostError(f"the channel to {self.peer} was closed here; open a new one")
            if self._error is not None:
                raise PeerLostError(str(self._error))
            self._outbox.append(bytes(message))
            self._outbox_bytes += len(message)
            full = self._outbox_bytes > MAX_OUTBOX
            if full:
                self._error = PeerLostError(f"lost {self.peer}: it lives, but {self._outbox_bytes} bytes wait to be taken by it")
            self._changed.notify()
        if full:
            self._end()

    def close(self) -> None:
        """End the channel: what waits is sent, for a moment, and all threads are joined. From any thread; may be called twice.

        The other end is told; ``lost`` is not called for it here. It may be running: hold no lock that it takes.
        """
        with self._changed:
            self._closing = True
            self._changed.notify()
        if threading.current_thread() is self._reader:
            return  # in a callback: the threads end when that returns
        self._reader.join(_CLOSE_GRACE)
        if self._reader.is_alive():
            self._end()
            self._reader.join()

    def _end(self) -> None:
        with self._changed:
            self._ended = True
            connection = self._connection
        if connection is not None:
            connection.shutdown()

    # --------------------------------------------------------------------------------------------- the reader's

    def _adopt(self, connection: Connection) -> None:
        """From now on `close` and a full outbox end this connection; at once, if that was asked for."""
        with self._changed:
            self._connection = connection
            ended = self._ended
        if ended:
            connection.shutdown()

    def _run(self, open_connection: Callable[[], Connection], opened: Callable[[Channel], None] | None) -> None:
        """The life of the channel, on the thread that reads."""
        self._reader = threading.current_thread()
        connection = None
        writer = threading.Thread(target=self._write, name=f"{self._reader.name}-send", daemon=True)
        try:
            connection = open_connection()
            connection.receive_alive(self._failure_timeout / _TICKS, _TICKS)
            if opened is not None:
                opened(self)
            writer.start()
            self._read(connection)
            reason: EthaRayError = PeerLostError(f"lost {self.peer}: it closed the channel")
        except EthaRayError as error:
            reason = error
        except Exception as error:
            logger.exception("the handler of messages from %s failed", self.peer)
            reason = PeerLostError(f"lost {self.peer}: the handler of its messages failed: {error}")
        self._finish(connection, writer, reason)

    def _read(self, connection: Connection) -> None:
        while True:
            frame, payload = connection.receive(_decoder, MAX_MESSAGE)
            if isinstance(frame, _Goodbye):
                return
            if isinstance(frame, _Message) and not self._closing:
                self._receive(self, bytes(payload))

    def _finish(self, connection: Connection | None, writer: threading.Thread, reason: EthaRayError) -> None:
        with self._changed:
            self._error = reason = self._error or reason
            closing = self._closing
            self._changed.notify()
        if connection is not None:
            if not closing:
                connection.shutdown()
            if writer.ident is not None:
                writer.join(_CLOSE_GRACE)
                connection.shutdown()  # a writer that still waits for an end that takes nothing
                writer.join()
            connection.close()
        if not closing:
            self._lost(self, reason)

    # --------------------------------------------------------------------------------------------- the writer's

    def _write(self) -> None:
        connection = self._connection
        assert connection is not None
        interval = self._failure_timeout / _TICKS
        try:
            while True:
                with self._changed:
                    if not self._outbox and not self._closing and self._error is None:
                        self._changed.wait(interval)
                    over = self._error is not None and not self._closing
                    message = self._outbox.popleft() if self._outbox else None
                    closing = self._closing
                if over:
                    return
                if message is not None:
                    connection.send(_Message(), message)
                    with self._changed:
                        self._outbox_bytes -= len(message)
                elif closing:
                    connection.send(_Goodbye())
                    connection.finish_sending()
                    return
                else:
                    connection.send(_Heartbeat())
        except EthaRayError as error:
            with self._changed:
                self._error = self._error or error
            connection.shutdown()  # the reader hears of it

    def __repr__(self) -> str:
        state = "closed" if self._closing else "open" if self._error is None else self._error
        return f"Channel({self.peer}, {state})"


def connect(
    address: Address,
    secret: bytes,
    service: str,
    receive: Callable[[Channel, bytes], None],
    lost: Callable[[Channel, EthaRayError], None],
    *,
    hello: bytes = b"",
    failure_timeout: float = FAILURE_TIMEOUT,
) -> Channel:
    """A channel to a service of the server at ``address``. Returns at once: messages wait until the connection is there.

    Args:
        receive: called with each message, in order, on the channel's own thread.
        lost: called once, on that thread too, when the channel ends by anything but `Channel.close`:
            with `PeerLostError`, or `NoTransportError` where the other end does not want to talk to this one.
        hello: up to 1 KiB that the other end is told before any message.
        failure_timeout: seconds in which the connection must stand, and after which a silent end is lost; the same on both ends.

    Raises:
        ConfigError: the secret is none.
    """
    check_secret(secret)
    channel = Channel(f"the agent at {address}", hello, receive, lost, failure_timeout)

    def open_connection() -> Connection:
        return dial(address, secret, service, hello, failure_timeout, channel._adopt)

    thread = threading.Thread(target=channel._run, args=(open_connection, None), name=f"etha-ray-{address}", daemon=True)
    channel._reader = thread
    thread.start()
    return channel


def accept_channels(
    receive: Callable[[Channel, bytes], None],
    lost: Callable[[Channel, EthaRayError], None],
    *,
    opened: Callable[[Channel], None] | None = None,
    failure_timeout: float = FAILURE_TIMEOUT,
) -> Service:
    """The service that takes what `connect` opens; ``receive`` and ``lost`` are as there.

    ``opened`` is called with each new channel before any message of it; ``lost`` is called for it even if that raises.
    """

    def serve(connection: Connection, hello: bytes) -> None:
        channel = Channel(f"the agent that connected from {connection.peer}", hello, receive, lost, failure_timeout)

        def adopted() -> Connection:
            connection.peer = channel.peer
            channel._adopt(connection)
            return connection

        channel._run(adopted, opened)

    return serve
