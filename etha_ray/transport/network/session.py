"""The reader's connection to one owner: a channel that says whether it lives, and what carries the bytes: streams and a communicator.

A session lives once. When the channel, any stream or the communicator is lost, everything on it fails and the next run makes a
new session, with a communicator of its own.
"""

from __future__ import annotations

import contextlib
import os
import threading
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError

import msgspec

from etha_ray.errors import CommunicatorError, EthaRayError, PeerLostError, TransferCancelledError, TransferError, error_class
from etha_ray.net import Address, Channel, connect
from etha_ray.transport.base import OneSidedTransport
from etha_ray.transport.network import wire
from etha_ray.transport.network.device import Device
from etha_ray.transport.network.joining import JOIN_TIMEOUT
from etha_ray.transport.network.staging import Staging
from etha_ray.transport.network.streams import Streams
from etha_ray.transport.network.taking import Taker


class Session:
    """A connection to the owner at ``address``. Made at once; it connects in the background.

    Args:
        device: this agent's, if it has one.
        staging, copier: for what must be unpacked.
        streams: how many.
        failure_timeout: seconds after which a silent owner is lost.
    """

    def __init__(
        self,
        address: Address,
        secret: bytes,
        device: Device | None,
        staging: Staging,
        copier: OneSidedTransport,
        streams: int,
        failure_timeout: float,
    ) -> None:
        self.address = address
        self.error: EthaRayError | None = None
        self._device = device
        self._failure_timeout = failure_timeout
        self._lock = threading.Lock()
        self._answers: dict[int, Future[wire.Prepared]] = {}
        self._taker: Future[Taker] = Future()
        session = os.urandom(wire.SESSION_BYTES)
        self.streams = Streams(address, secret, session, staging, copier, streams, failure_timeout, self._cut, self._forgotten)
        self._channel = connect(address, secret, wire.CONTROL, self._receive, self._lost, hello=session, failure_timeout=failure_timeout)

    def prepare(self, request: wire.Prepare) -> Future[wire.Prepared]:
        """Tell the owner of a program, once for each: later calls give the same future. It raises what is wrong with it."""
        with self._lock:
            future = self._answers.get(request.program)
            if future is not None:
                return future
            future = self._answers[request.program] = Future()
            if self.error is not None:
                future.set_exception(self.error)
                return future
        try:
            self._channel.send(wire.encode(request))
        except ValueError as error:
            self._reject(
                request.program, TransferError(f"a program of {len(request.regions)} regions is too large: prepare several ({error})")
            )
        except PeerLostError as error:
            self._fail(error)
        return future

    def taker(self) -> Taker:
        """This end of the communicator that the owner has one end of; waits until it can be used.

        Raises:
            CommunicatorError: it cannot be.
            PeerLostError, TransferCancelledError: the session is over.
        """
        try:
            taker = self._taker.result(JOIN_TIMEOUT)
        except FutureTimeoutError:
            raise CommunicatorError(
                f"the agent at {self.address} lives, and made no communicator within {JOIN_TIMEOUT:g} s: see its log, and restart it"
            ) from None
        taker.joined.result()
        return taker

    def forget(self, program: int, *, tell: bool) -> None:
        """The program is not prepared any more; ``tell`` the owner."""
        with self._lock:
            known = self._answers.pop(program, None) is not None and self.error is None
        if known and tell:
            self._say(wire.Release(program))

    def close(self) -> None:
        """End everything on it, and join its threads."""
        self._fail(TransferCancelledError(f"the connection to the agent at {self.address} was closed"))
        self._channel.close()
        self.streams.wait()
        with contextlib.suppress(EthaRayError):  # there is none
            self._taker.result().wait()

    # --------------------------------------------------------------------------------------------- the channel's

    def _receive(self, channel: Channel, message: bytes) -> None:
        try:
            said = wire.from_owner.decode(message)
        except msgspec.DecodeError as error:
            raise PeerLostError(f"{channel.peer} sent an answer that is none ({error}); run the same etha_ray on both sides") from error
        if isinstance(said, wire.Prepared):
            with self._lock:
                future = self._answers.get(said.program)
                if future is not None and not future.done():
                    future.set_result(said)
        elif isinstance(said, wire.Rejected):
            self._reject(said.program, error_class(said.kind)(f"{channel.peer}: {said.message}"))
        elif isinstance(said, wire.Ready):
            self.streams.open()
        elif isinstance(said, wire.Broken):
            raise error_class(said.kind)(f"{channel.peer}: {said.message}")
        elif isinstance(said, wire.Join):
            self._join(said)
        elif self._taker.done() and self._taker.exception() is None:
            self._taker.result().hear(said)

    def _join(self, said: wire.Join) -> None:
        if self._device is None or self._device.communicators is None or self._taker.done():
            raise PeerLostError(f"{self._channel.peer} wants a communicator that this agent did not ask for")
        taker = Taker(self._device, self._channel.peer, said.unique_id, self._say, self._forgotten, self._cut, self._failure_timeout)
        with self._lock:
            if self.error is not None:
                return
            self._taker.set_result(taker)
            taker.start()

    def _reject(self, program: int, error: EthaRayError) -> None:
        with self._lock:
            future = self._answers.pop(program, None)
            if future is not None and not future.done():
                future.set_exception(error)

    def _say(self, message: wire.FromReader) -> None:
        with contextlib.suppress(PeerLostError):  # that is heard by `_lost`
            self._channel.send(wire.encode(message))

    def _forgotten(self, program: int) -> None:
        self.forget(program, tell=True)

    def _lost(self, channel: Channel, reason: EthaRayError) -> None:
        self._fail(reason)

    def _cut(self, error: EthaRayError) -> None:
        """A path is lost, and with it the session."""
        self._fail(error)
        self._channel.close()

    def _fail(self, error: EthaRayError) -> None:
        with self._lock:
            if self.error is not None:
                return
            self.error = error
            for future in self._answers.values():
                if not future.done():
                    future.set_exception(error)
            if not self._taker.done():
                self._taker.set_exception(error)
        self.streams.end(error)
        with contextlib.suppress(EthaRayError):  # there is none
            self._taker.result().end(error)
