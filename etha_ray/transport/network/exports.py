"""The owner's side: tensors under names, the programs that readers prepared on them, and a thread for each stream.

A session is one reader's connection: a channel, and the streams that name the channel's hello. When the channel is lost, so
that the reader is dead, stopped or cut off, its streams are ended and its programs dropped.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import msgspec
import torch

from etha_ray.dtypes import CASTABLE, DTYPES
from etha_ray.errors import (
    ConfigError,
    EthaRayError,
    HandleExpiredError,
    NotShareableError,
    PeerLostError,
    TensorMismatchError,
    WrongDeviceError,
)
from etha_ray.net import Channel, Connection, Service, accept_channels
from etha_ray.transport.buckets import Region, cut_into_buckets
from etha_ray.transport.mapped import MappedTransport
from etha_ray.transport.network import wire
from etha_ray.transport.network.runs import BucketMemory, lay_out, send_runs
from etha_ray.transport.network.staging import Staging, check_bucket_size

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
    buckets: list[BucketMemory]


@dataclass
class _Session:
    channel: Channel
    programs: dict[int, _Program] = field(default_factory=dict)
    streams: set[Connection] = field(default_factory=set)
    over: bool = False


class Exports:
    """All exports of an agent, and the services that give them out.

    Args:
        staging: for what must be packed.
        failure_timeout: seconds after which a silent reader is lost.
    """

    def __init__(self, staging: Staging, failure_timeout: float) -> None:
        self._staging = staging
        self._copier = MappedTransport(threads=1)
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
            if tensor.device.type != "cpu":
                raise WrongDeviceError(f"export {name!r}: tensor {index} is on {tensor.device}; the network transport reads cpu tensors")
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
        for stream in streams:
            stream.shutdown()
        for export in exports:
            self._withdraw(export)

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

    def _receive(self, channel: Channel, message: bytes) -> None:
        try:
            request = wire.from_reader.decode(message)
        except msgspec.DecodeError as error:
            raise PeerLostError(f"{channel.peer} sent a request that is none ({error}); run the same etha_ray on both sides") from error
        session = self._sessions[channel.hello]
        if isinstance(request, wire.Release):
            with self._changed:
                session.programs.pop(request.program, None)
            return
        answer: wire.Prepared | wire.Rejected
        try:
            program = self._prepare(request)
            with self._changed:
                if any(export._closed for export in program.exports):
                    raise HandleExpiredError("what was to be read was closed by its owner meanwhile; register it again on both sides")
                session.programs[request.program] = program
            answer = wire.Prepared(request.program)
        except EthaRayError as error:
            answer = wire.Rejected(request.program, type(error).__name__, str(error))
        channel.send(wire.encode(answer))

    def _prepare(self, request: wire.Prepare) -> _Program:
        check_bucket_size(request.bucket_size, self._staging.limit, "the owner's")
        exports: dict[str, Export] = {}
        tensors: dict[str, tuple[torch.Tensor, ...]] = {}
        with self._changed:
            for region in request.regions:
                if region.export not in self._exports:
                    raise HandleExpiredError(f"export {region.export!r} is not there (any more): register it again on its side")
                exports[region.export] = self._exports[region.export]
                tensors[region.export] = exports[region.export].tensors
        views = [_view(tensors[region.export], region) for region in request.regions]
        dtypes = [DTYPES[region.wire] for region in request.regions]
        regions = [Region(region.size, dtype.itemsize) for region, dtype in zip(request.regions, dtypes, strict=True)]
        buckets = [lay_out(bucket, views, dtypes, checked=request.checked) for bucket in cut_into_buckets(regions, request.bucket_size)]
        return _Program(tuple(exports.values()), buckets)

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
        with self._reading(session, request) as bucket:
            if bucket is None:
                reason = "what it reads was closed by its owner; register it again on both sides"
                stream.send(wire.Failed(HandleExpiredError.__name__, reason))
            elif not bucket.staged:
                stream.send(wire.Data(bucket.nbytes, bucket.checksum(None)))
                send_runs(stream, bucket.placed(None))
            else:
                with self._staging.borrow(bucket.staging_nbytes) as staging:
                    bucket.pack(self._copier, staging)
                    stream.send(wire.Data(bucket.nbytes, bucket.checksum(staging)))
                    send_runs(stream, bucket.placed(staging))

    @contextlib.contextmanager
    def _reading(self, session: _Session, request: wire.Fetch) -> Iterator[BucketMemory | None]:
        """The bucket, with its exports kept from closing; None if they are closed."""
        with self._changed:
            program = session.programs.get(request.program)
            if program is not None and not 0 <= request.bucket < len(program.buckets):
                raise PeerLostError(f"a reader asked for bucket {request.bucket} of {len(program.buckets)}")
            exports = () if program is None else program.exports
            for export in exports:
                export._readers += 1
        try:
            yield None if program is None else program.buckets[request.bucket]
        finally:
            with self._changed:
                for export in exports:
                    export._readers -= 1
                self._changed.notify_all()


def _view(tensors: Sequence[torch.Tensor], region: wire.WireRegion) -> torch.Tensor:
    """The region of an export's tensors; everything a reader says is checked."""
    where = f"tensor {region.index} of export {region.export!r}"
    if not 0 <= region.index < len(tensors):
        raise TensorMismatchError(f"{where} is not there: it has {len(tensors)}")
    tensor = tensors[region.index]
    if wire.dtype_name(tensor.dtype) != region.dtype:
        raise TensorMismatchError(f"{where} is {tensor.dtype}, and was taken for {region.dtype}; both sides must mean the same tensor")
    sent = DTYPES.get(region.wire)
    if sent is None or (sent != tensor.dtype and (not {sent, tensor.dtype} <= CASTABLE or sent.itemsize >= tensor.itemsize)):
        raise TensorMismatchError(f"{where} is {tensor.dtype} and cannot be sent as {region.wire}")
    inside = len(region.start) == len(region.size) == tensor.dim() and all(
        first >= 0 and size >= 0 and first + size <= extent
        for first, size, extent in zip(region.start, region.size, tensor.shape, strict=True)
    )
    if not inside:
        raise TensorMismatchError(f"{where} has shape {tuple(tensor.shape)}: {region.size} from {region.start} is not within it")
    return tensor[tuple(slice(first, first + size) for first, size in zip(region.start, region.size, strict=True))]
