"""The owner's side: tensors under names, the programs that readers prepared on them, and a thread for each stream.

A session is one reader's connection: a channel, the streams that name the channel's hello, and one end of a communicator if a program
needs it. When the channel is lost, so that the reader is dead, stopped or cut off, all of it is ended and its programs are dropped.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import msgspec
import torch

from etha_ray.errors import (
    ConfigError,
    EthaRayError,
    HandleExpiredError,
    NotShareableError,
    PeerLostError,
    TransferCancelledError,
    error_class,
)
from etha_ray.net import Channel, Connection, Service, accept_channels
from etha_ray.transport.base import OneSidedTransport
from etha_ray.transport.network import wire
from etha_ray.transport.network.device import Device, check_device
from etha_ray.transport.network.given import Given, given
from etha_ray.transport.network.giving import CLOSED, Giver
from etha_ray.transport.network.rounds import Rounds
from etha_ray.transport.network.runs import send_runs
from etha_ray.transport.network.staging import Staging, fitting

logger = logging.getLogger(__name__)


class Export:
    """Tensors that others can read under a name. Made by `NetworkTransport.export`."""

    def __init__(self, exports: Exports, name: str, tensors: Sequence[torch.Tensor]) -> None:
        self.name = name
        self.tensors = tuple(tensors)
        self._exports = exports
        self._readers = 0
        self._closed = False

    def close(self) -> None:
        """End it. When this returns nobody reads the tensors any more, and this object does not hold them. May be called twice.

        Waits for the buckets on their way: that is short, or until their reader counts as lost. Later requests of its readers
        fail with `HandleExpiredError`.
        """
        self._exports._withdraw(self)

    def __repr__(self) -> str:
        return f"Export({self.name!r}, {'closed' if self._closed else f'{len(self.tensors)} tensors'})"


@dataclass(frozen=True)
class _Program:
    exports: tuple[Export, ...]
    given: Given

    @property
    def rounds(self) -> Rounds:
        """What goes by the communicator."""
        if self.given.rounds is None:
            raise PeerLostError("a reader asked for rounds of a program that has none")
        return self.given.rounds

    @property
    def closing(self) -> bool:
        """Whether somebody waits for its tensors to be let go."""
        return any(export._closed for export in self.exports)


@dataclass
class _Session:
    channel: Channel
    programs: dict[int, _Program] = field(default_factory=dict)
    streams: set[Connection] = field(default_factory=set)
    giver: Giver | None = None
    over: bool = False


class Exports:
    """All exports of an agent, and the services that give them out.

    Args:
        staging, copier: for what must be packed.
        failure_timeout: seconds after which a silent reader is lost.
        device: the agent's, if it has one.
    """

    def __init__(self, staging: Staging, copier: OneSidedTransport, failure_timeout: float, device: Device | None) -> None:
        self._staging = staging
        self._copier = copier
        self._device = device
        self._changed = threading.Condition()
        self._exports: dict[str, Export] = {}
        self._sessions: dict[bytes, _Session] = {}
        self.services: Mapping[str, Service] = {
            wire.CONTROL: accept_channels(self._receive, self._lost, opened=self._opened, failure_timeout=failure_timeout),
            wire.STREAM: self._serve,
        }

    def export(self, name: str, tensors: Sequence[torch.Tensor]) -> Export:
        """See `NetworkTransport.export`."""
        for index, tensor in enumerate(tensors):
            check_device(tensor, self._device, f"export {name!r}: tensor {index}")
            if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_conj() or tensor.is_neg():
                raise NotShareableError(f"export {name!r}: tensor {index} is not dense, or a lazily conjugated or negated view")
        export = Export(self, name, [tensor.detach() for tensor in tensors])
        with self._changed:
            if name in self._exports:
                raise ConfigError(f"export {name!r} exists already; close it first, or take another name")
            self._exports[name] = export
        return export

    def close(self) -> None:
        """Close all exports; sessions end with their server."""
        with self._changed:
            exports = list(self._exports.values())
            streams = [stream for session in self._sessions.values() for stream in session.streams]
            givers = [session.giver for session in self._sessions.values() if session.giver is not None]
        for stream in streams:
            stream.shutdown()
        for giver in givers:
            giver.end(TransferCancelledError("the transport was closed"))
        for export in exports:
            self._withdraw(export)
        for giver in givers:
            giver.wait()

    def _withdraw(self, export: Export) -> None:
        with self._changed:
            export._closed = True
            if self._exports.get(export.name) is export:
                del self._exports[export.name]
            for session in self._sessions.values():
                gone = [number for number, program in session.programs.items() if export in program.exports]
                for number in gone:
                    del session.programs[number]
            self._changed.wait_for(lambda: not export._readers)
            export.tensors = ()

    # ---------------------------------------------------------------------------------------------- the channel's

    def _opened(self, channel: Channel) -> None:
        if len(channel.hello) != wire.SESSION_BYTES:
            raise PeerLostError(f"{channel.peer} gave no session id")
        with self._changed:
            if channel.hello in self._sessions:
                raise PeerLostError(f"{channel.peer} gave a session id that is taken")
            self._sessions[channel.hello] = _Session(channel)
        channel.send(wire.encode(wire.Ready()))

    def _lost(self, channel: Channel, reason: EthaRayError) -> None:
        with self._changed:
            session = self._sessions.get(channel.hello)
            if session is None or session.channel is not channel:
                return
            del self._sessions[channel.hello]
            session.over = True
            session.programs.clear()
            streams = list(session.streams)
        logger.info("a reader's session ended: %s", reason)
        for stream in streams:
            stream.shutdown()
        if session.giver is not None:
            session.giver.end(reason)
            session.giver.wait()

    def _receive(self, channel: Channel, message: bytes) -> None:
        try:
            request = wire.from_reader.decode(message)
        except msgspec.DecodeError as error:
            raise PeerLostError(f"{channel.peer} sent a request that is none ({error}); run the same etha_ray on both sides") from error
        session = self._sessions[channel.hello]
        if isinstance(request, wire.Prepare):
            channel.send(wire.encode(self._prepare(session, request)))
        elif isinstance(request, wire.Release):
            with self._changed:
                session.programs.pop(request.program, None)
        elif session.giver is None:
            raise PeerLostError(f"{channel.peer} spoke of a communicator, and has none")
        elif isinstance(request, wire.Broken):
            session.giver.end(error_class(request.kind)(f"{channel.peer}: {request.message}"))  # the reader closes the channel
        elif isinstance(request, wire.Pull):
            session.giver.pull(request)
        else:
            session.giver.stop(request.run)

    def _prepare(self, session: _Session, request: wire.Prepare) -> wire.Prepared | wire.Rejected:
        try:
            bucket_size = fitting(request.bucket_size, self._staging.limit)
            exports: dict[str, Export] = {}
            tensors: dict[str, tuple[torch.Tensor, ...]] = {}
            with self._changed:
                for region in request.regions:
                    if region.export not in self._exports:
                        raise HandleExpiredError(f"export {region.export!r} is not there (any more): register it again on its side")
                    exports[region.export] = self._exports[region.export]
                    tensors[region.export] = exports[region.export].tensors
            program = _Program(tuple(exports.values()), given(request, bucket_size, tensors, self._device))
            if program.given.rounds is not None:
                self._introduce(session)
            with self._changed:
                if program.closing:
                    raise HandleExpiredError("what was to be read was closed by its owner meanwhile; register it again on both sides")
                session.programs[request.program] = program
        except EthaRayError as error:
            return wire.Rejected(request.program, type(error).__name__, str(error))
        return program.given.answer

    def _introduce(self, session: _Session) -> None:
        """Have the session get a communicator, for the first of its programs that goes by one."""
        if session.giver is not None:
            return
        assert self._device is not None
        channel = session.channel

        def say(message: wire.FromOwner) -> None:
            with contextlib.suppress(PeerLostError):  # that is heard by `_lost`
                channel.send(wire.encode(message))

        session.giver = Giver(self._device, channel.peer, say, lambda program: self._reading(session, program))
        session.giver.start()

    # ----------------------------------------------------------------------------------------------- the streams'

    def _serve(self, stream: Connection, hello: bytes) -> None:
        with self._changed:
            session = self._sessions.get(hello)
            if session is None:
                raise PeerLostError(f"{stream.peer} opened a stream of a session that is over")
            session.streams.add(stream)
        try:
            while not session.over:
                request, _ = stream.receive(wire.fetches)
                self._answer(session, stream, request)
        finally:
            with self._changed:
                session.streams.discard(stream)

    def _answer(self, session: _Session, stream: Connection, request: wire.Fetch) -> None:
        with self._reading(session, request.program) as program:
            if program is None:
                stream.send(wire.Failed(HandleExpiredError.__name__, CLOSED))
                return
            buckets = program.given.buckets
            if not 0 <= request.bucket < len(buckets):
                raise PeerLostError(f"a reader asked for bucket {request.bucket} of {len(buckets)}")
            bucket = buckets[request.bucket]
            if not bucket.staged:
                stream.send(wire.Data(bucket.nbytes, bucket.checksum(None)))
                send_runs(stream, bucket.placed(None))
            else:
                with self._staging.borrow(bucket.staging_nbytes) as staging:
                    bucket.pack(self._copier, staging)
                    stream.send(wire.Data(bucket.nbytes, bucket.checksum(staging)))
                    send_runs(stream, bucket.placed(staging))

    @contextlib.contextmanager
    def _reading(self, session: _Session, number: int) -> Iterator[_Program | None]:
        """A program, with its exports kept from closing; None if they are closed."""
        with self._changed:
            program = session.programs.get(number)
            exports = () if program is None else program.exports
            for export in exports:
                export._readers += 1
        try:
            yield program
        finally:
            with self._changed:
                for export in exports:
                    export._readers -= 1
                self._changed.notify_all()
