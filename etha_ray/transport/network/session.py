"""The reader's connection to one owner: a channel that says whether it lives, and streams that fetch buckets.

All running programs share the streams. Each stream takes the next bucket of the program whose turn it is, so a small program
does not wait for a large one to end; while a bucket comes in, the next is asked for already, so the line is never idle.

A session lives once. When the channel, or any stream, is lost, everything on it fails and the next run makes a new session.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future

import msgspec

from etha_ray.errors import EthaRayError, IntegrityError, PeerLostError, TransferCancelledError, TransferError, error_class
from etha_ray.net import Address, Channel, Connection, connect, dial
from etha_ray.transport.mapped import MappedTransport
from etha_ray.transport.network import wire
from etha_ray.transport.network.runs import BucketMemory, receive_runs
from etha_ray.transport.network.staging import Staging

logger = logging.getLogger(__name__)

_DEPTH = 2
"""Buckets that a stream has asked for at a time."""


class Fetching:
    """One run of one program's part that comes from one owner. Its fields are the session's, under the session's lock.

    Args:
        finished: called once, when no byte of it is written any more: all buckets are here, or ``error`` says why not.
        describe: what a bucket, by its number, has of which tensors.
    """

    def __init__(
        self,
        program: int,
        buckets: Sequence[BucketMemory],
        finished: Callable[[Fetching], None],
        describe: Callable[[int], str],
    ) -> None:
        self.program = program
        self.buckets = buckets
        self.finished = finished
        self.describe = describe
        self.next = 0
        self.outstanding = 0
        self.error: EthaRayError | None = None


class Session:
    """A connection to the owner at ``address``. Made at once; it connects in the background.

    Args:
        staging, copier: for what must be unpacked.
        streams: how many.
        failure_timeout: seconds after which a silent owner is lost.
    """

    def __init__(
        self, address: Address, secret: bytes, staging: Staging, copier: MappedTransport, streams: int, failure_timeout: float
    ) -> None:
        self.address = address
        self.error: EthaRayError | None = None
        self._secret = secret
        self._staging = staging
        self._copier = copier
        self._stream_count = streams
        self._failure_timeout = failure_timeout
        self._id = os.urandom(wire.SESSION_BYTES)
        self._changed = threading.Condition()
        self._answers: dict[int, Future[None]] = {}
        self._running: deque[Fetching] = deque()
        self._streams: set[Connection] = set()
        self._threads: list[threading.Thread] = []
        self._channel = connect(address, secret, wire.CONTROL, self._receive, self._lost, hello=self._id, failure_timeout=failure_timeout)

    def prepare(self, request: wire.Prepare) -> Future[None]:
        """Tell the owner of a program, once for each: later calls give the same future. It raises what is wrong with it."""
        with self._changed:
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
            self._answer(
                request.program, TransferError(f"a program of {len(request.regions)} regions is too large: prepare several ({error})")
            )
        except PeerLostError as error:
            self._fail(error)
        return future

    def forget(self, program: int, *, tell: bool) -> None:
        """The program is not prepared any more; ``tell`` the owner."""
        with self._changed:
            known = self._answers.pop(program, None) is not None and self.error is None
        if known and tell:
            with contextlib.suppress(PeerLostError):  # with the session the owner forgets everything
                self._channel.send(wire.encode(wire.Release(program)))

    def submit(self, fetching: Fetching) -> None:
        """Begin to fetch."""
        with self._changed:
            fetching.error = fetching.error or self.error
            if fetching.error is None:
                self._running.append(fetching)
                self._changed.notify(min(len(fetching.buckets), self._stream_count))
                return
        fetching.finished(fetching)

    def cancel(self, fetching: Fetching, error: EthaRayError) -> None:
        """Ask for no more of it. What was asked for still comes, and then it is finished."""
        with self._changed:
            if fetching not in self._running:
                fetching.error = fetching.error or (error if fetching.next < len(fetching.buckets) or fetching.outstanding else None)
                return
            self._running.remove(fetching)
            fetching.error = fetching.error or error
            quiet = not fetching.outstanding
        if quiet:
            fetching.finished(fetching)

    def close(self) -> None:
        """End everything on it, and join its threads."""
        self._fail(TransferCancelledError(f"the connection to the agent at {self.address} was closed"))
        self._channel.close()
        for thread in self._threads:
            thread.join()

    # --------------------------------------------------------------------------------------------- the channel's

    def _receive(self, channel: Channel, message: bytes) -> None:
        try:
            answer = wire.from_owner.decode(message)
        except msgspec.DecodeError as error:
            raise PeerLostError(f"{channel.peer} sent an answer that is none ({error}); run the same etha_ray on both sides") from error
        if isinstance(answer, wire.Prepared):
            self._answer(answer.program, None)
        elif isinstance(answer, wire.Rejected):
            self._answer(answer.program, error_class(answer.kind)(f"{channel.peer}: {answer.message}"))
        else:
            self._open_streams()

    def _answer(self, program: int, error: EthaRayError | None) -> None:
        with self._changed:
            future = self._answers.get(program) if error is None else self._answers.pop(program, None)
            if future is None or future.done():
                return
            if error is None:
                future.set_result(None)
            else:
                future.set_exception(error)

    def _lost(self, channel: Channel, reason: EthaRayError) -> None:
        self._fail(reason)

    def _fail(self, error: EthaRayError) -> None:
        with self._changed:
            if self.error is not None:
                return
            self.error = error
            for future in self._answers.values():
                if not future.done():
                    future.set_exception(error)
            quiet = []
            for fetching in self._running:
                fetching.error = fetching.error or error
                if not fetching.outstanding:
                    quiet.append(fetching)
            self._running.clear()
            streams = list(self._streams)
            self._changed.notify_all()
        for stream in streams:
            stream.shutdown()
        for fetching in quiet:
            fetching.finished(fetching)

    # ---------------------------------------------------------------------------------------------- the streams'

    def _open_streams(self) -> None:
        with self._changed:
            if self.error is not None or self._threads:
                return
            self._threads = [
                threading.Thread(target=self._stream, name=f"etha-ray-{self.address}-stream{number}", daemon=True)
                for number in range(self._stream_count)
            ]
        for thread in self._threads:
            thread.start()

    def _stream(self) -> None:
        asked: deque[tuple[Fetching, int]] = deque()
        stream = None
        try:
            stream = dial(self.address, self._secret, wire.STREAM, self._id, self._failure_timeout, self._adopt)
            _watch(stream, self._failure_timeout)
            while self._ask(stream, asked):
                fetching, bucket = asked[0]
                error = self._take(stream, fetching, bucket)
                asked.popleft()
                self._done(fetching, error)
        except Exception as error:
            if not isinstance(error, EthaRayError):
                logger.exception("a stream from the agent at %s failed", self.address)
                error = TransferError(f"reading from the agent at {self.address} failed: {error}")
            self._fail(error)
            self._channel.close()
        finally:
            for fetching, _ in asked:
                self._done(fetching, self.error)
            if stream is not None:
                with self._changed:
                    self._streams.discard(stream)
                stream.close()

    def _adopt(self, stream: Connection) -> None:
        with self._changed:
            self._streams.add(stream)
            over = self.error is not None
        if over:
            stream.shutdown()

    def _ask(self, stream: Connection, asked: deque[tuple[Fetching, int]]) -> bool:
        """Ask for buckets until `_DEPTH` are on their way, waiting for work if there are none; False when the session is over."""
        while len(asked) < _DEPTH:
            with self._changed:
                while not self._running and not asked and self.error is None:
                    self._changed.wait()
                if self.error is not None:
                    return False
                if not self._running:
                    return True
                fetching = self._running[0]
                if asked and len(fetching.buckets) - fetching.next < self._stream_count:
                    return True  # the last ones are for streams that have none
                self._running.rotate(-1)
                bucket = fetching.next
                fetching.next += 1
                fetching.outstanding += 1
                if fetching.next == len(fetching.buckets):
                    self._running.remove(fetching)
                asked.append((fetching, bucket))
            stream.send(wire.Fetch(fetching.program, bucket))
        return True

    def _take(self, stream: Connection, fetching: Fetching, number: int) -> EthaRayError | None:
        bucket = fetching.buckets[number]
        answer, _ = stream.receive(wire.answers)
        if isinstance(answer, wire.Failed):
            self.forget(fetching.program, tell=True)
            return error_class(answer.kind)(f"the agent at {self.address}: {answer.message}")
        if answer.nbytes != bucket.nbytes:
            raise stream.lost(f"it sent {answer.nbytes} bytes where {bucket.nbytes} were asked for; run the same etha_ray on both sides")
        if not bucket.staged:
            receive_runs(stream, bucket.placed(None))
            return self._compare(fetching, number, answer.checksum, bucket.checksum(None))
        # Borrowed only now that bytes are there: a reader that has a buffer never waits for an owner that waits for one.
        with self._staging.borrow(bucket.staging_nbytes) as staging:
            receive_runs(stream, bucket.placed(staging))
            error = self._compare(fetching, number, answer.checksum, bucket.checksum(staging))
            if error is None:
                bucket.unpack(self._copier, staging)
        return error

    def _compare(self, fetching: Fetching, number: int, sent: int | None, arrived: int | None) -> IntegrityError | None:
        if arrived is None or arrived == sent:
            return None
        return IntegrityError(
            f"{fetching.describe(number)}: what arrived from the agent at {self.address} has not the checksum that it was sent with"
            " (bytes changed on the way, or their sender wrote to them meanwhile)"
        )

    def _done(self, fetching: Fetching, error: EthaRayError | None) -> None:
        with self._changed:
            fetching.outstanding -= 1
            fetching.error = fetching.error or error
            if fetching.error is not None and fetching in self._running:
                self._running.remove(fetching)
            quiet = not fetching.outstanding and (fetching.error is not None or fetching.next == len(fetching.buckets))
        if quiet:
            fetching.finished(fetching)


def _watch(stream: Connection, failure_timeout: float) -> None:
    """Have the kernel notice when this stream alone is cut off, as a firewall may do that forgets it; the channel watches the process."""
    sock = stream.socket
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, max(1, int(failure_timeout / 2)))
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(failure_timeout * 1000))
