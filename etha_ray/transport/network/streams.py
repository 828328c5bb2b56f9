"""Several TCP connections to one owner, which fetch buckets: how all that lies in hosts' memory goes.

All running programs share the streams. Each stream takes the next bucket of the program whose turn it is, so a small program
does not wait for a large one to end; while a bucket comes in, the next is asked for already, so the line is never idle.
"""

from __future__ import annotations

import logging
import socket
import threading
from collections import deque
from collections.abc import Callable, Sequence

from etha_ray.errors import EthaRayError, IntegrityError, TransferError, error_class
from etha_ray.net import Address, Connection, dial
from etha_ray.transport.base import OneSidedTransport
from etha_ray.transport.network import wire
from etha_ray.transport.network.fetching import DataPath, Job
from etha_ray.transport.network.runs import BucketMemory, receive_runs
from etha_ray.transport.network.staging import Staging

logger = logging.getLogger(__name__)

_DEPTH = 2
"""Buckets that a stream has asked for at a time."""


class Fetching(Job):
    """A run by streams. Its fields are the streams', under their lock.

    Args:
        finished, describe: see `Job`.
    """

    def __init__(
        self,
        program: int,
        buckets: Sequence[BucketMemory],
        finished: Callable[[Job], None],
        describe: Callable[[int], str],
    ) -> None:
        super().__init__(program, finished, describe)
        self.buckets = buckets
        self.next = 0
        self.outstanding = 0


class Streams(DataPath[Fetching]):
    """The streams of one session. They are opened by `open`, and dial in the background.

    Args:
        session: the session's id, which the owner knows it by.
        staging, copier: for what must be unpacked.
        count: how many.
        failure_timeout: seconds after which an owner that does not answer is lost.
        failed: called when a stream is lost, and with it the session.
        forget: called with a program that the owner has no more.
    """

    def __init__(
        self,
        address: Address,
        secret: bytes,
        session: bytes,
        staging: Staging,
        copier: OneSidedTransport,
        count: int,
        failure_timeout: float,
        failed: Callable[[EthaRayError], None],
        forget: Callable[[int], None],
    ) -> None:
        self._address = address
        self._secret = secret
        self._session = session
        self._staging = staging
        self._copier = copier
        self._count = count
        self._failure_timeout = failure_timeout
        self._failed = failed
        self._forget = forget
        self._error: EthaRayError | None = None
        self._changed = threading.Condition()
        self._running: deque[Fetching] = deque()
        self._streams: set[Connection] = set()
        self._threads: list[threading.Thread] = []

    def submit(self, fetching: Fetching) -> None:
        """Begin to fetch."""
        with self._changed:
            fetching.error = fetching.error or self._error
            if fetching.error is None:
                self._running.append(fetching)
                self._changed.notify(min(len(fetching.buckets), self._count))
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

    def end(self, error: EthaRayError) -> None:
        """As in the interface. The streams are shut down."""
        with self._changed:
            self._error = self._error or error
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

    def wait(self) -> None:
        """As in the interface."""
        for thread in self._threads:
            thread.join()

    def open(self) -> None:
        """Open them, the first time: the owner knows the session."""
        with self._changed:
            if self._error is not None or self._threads:
                return
            self._threads = [
                threading.Thread(target=self._stream, name=f"etha-ray-{self._address}-stream{number}", daemon=True)
                for number in range(self._count)
            ]
        for thread in self._threads:
            thread.start()

    def _stream(self) -> None:
        asked: deque[tuple[Fetching, int]] = deque()
        stream = None
        try:
            stream = dial(self._address, self._secret, wire.STREAM, self._session, self._failure_timeout, self._adopt)
            _watch(stream, self._failure_timeout)
            while self._ask(stream, asked):
                fetching, bucket = asked[0]
                error = self._take(stream, fetching, bucket)
                asked.popleft()
                self._done(fetching, error)
        except Exception as error:
            if not isinstance(error, EthaRayError):
                logger.exception("a stream from the agent at %s failed", self._address)
                error = TransferError(f"reading from the agent at {self._address} failed: {error}")
            self._failed(error)
        finally:
            for fetching, _ in asked:
                self._done(fetching, self._error)
            if stream is not None:
                with self._changed:
                    self._streams.discard(stream)
                stream.close()

    def _adopt(self, stream: Connection) -> None:
        with self._changed:
            self._streams.add(stream)
            over = self._error is not None
        if over:
            stream.shutdown()

    def _ask(self, stream: Connection, asked: deque[tuple[Fetching, int]]) -> bool:
        """Ask for buckets until `_DEPTH` are on their way, waiting for work if there are none; False when the session is over."""
        while len(asked) < _DEPTH:
            with self._changed:
                while not self._running and not asked and self._error is None:
                    self._changed.wait()
                if self._error is not None:
                    return False
                if not self._running:
                    return True
                fetching = self._running[0]
                if asked and len(fetching.buckets) - fetching.next < self._count:
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
            self._forget(fetching.program)
            return error_class(answer.kind)(f"the agent at {self._address}: {answer.message}")
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
            f"{fetching.describe(number)}: what arrived from the agent at {self._address} has not the checksum that it was sent with"
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
