"""A TCP socket that speaks in frames, and says by `PeerLostError` whom it lost and why.

A frame is the lengths of its header and of its payload (``!HI``), the CRC-32 of these and of what follows (``!II``), a header (a
msgspec struct, as msgpack), and the payload's raw bytes. Lengths are checked before anything is read, so a stranger's bytes cost at
most `MAX_HEADER` of memory; and nobody waits for bytes that only a damaged length speaks of, while heartbeats keep trickling in.

Two threads may use one connection, one to send and one to receive. Any other may call `shutdown`, which wakes both; only the
thread that receives calls `close`, so a descriptor is never closed, and its number given away, under somebody's system call.
"""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
import time
import zlib
from typing import Any, TypeVar

import msgspec

from etha_ray.decoding import Decoder
from etha_ray.errors import PeerLostError

MAX_HEADER = 4096
"""Bytes of the largest header."""

_LENGTHS = struct.Struct("!HI")
_CHECKS = struct.Struct("!II")
_JOINED_BYTES = 64 << 10  # up to here one copy is cheaper than a system call of its own
_TIMEVAL = struct.Struct("ll")
_MIN_WAIT = 1e-3

_T = TypeVar("_T")


def prefix(head: bytes, payload: bytes = b"") -> bytes:
    """What stands before these two in a frame."""
    lengths = _LENGTHS.pack(len(head), len(payload))
    return lengths + _CHECKS.pack(zlib.crc32(lengths), zlib.crc32(payload, zlib.crc32(head)))


class Connection:
    """One end of a TCP connection.

    Args:
        sock: a blocking stream socket, connected or about to be.
        peer: how errors call the other end.
    """

    def __init__(self, sock: socket.socket, peer: str) -> None:
        self.peer = peer
        self._sock = sock
        self._lock = threading.Lock()
        self._deadline: float | None = None
        self._ticks = 0
        self._silent_ticks = 0
        self._silence = 0.0
        self._encoder = msgspec.msgpack.Encoder()
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    @property
    def socket(self) -> socket.socket:
        """The socket, for who moves bytes by means of its own between frames."""
        return self._sock

    # ------------------------------------------------------------------------------------------------- patience

    def receive_within(self, seconds: float) -> None:
        """From now on all that is received must have come when ``seconds`` are over, however it trickles in."""
        self._deadline = time.monotonic() + seconds
        self._ticks = 0

    def receive_patiently(self) -> None:
        """From now on wait for bytes without a limit."""
        self._deadline, self._ticks = None, 0
        self._set_timeout(0.0)

    def receive_alive(self, interval: float, ticks: int) -> None:
        """From now on the other end is lost once nothing has come for ``ticks`` waits of ``interval`` seconds each.

        Waits are counted rather than a clock read: after a stop of this very process one has passed, and not all.
        """
        self._deadline, self._ticks, self._silent_ticks = None, ticks, 0
        self._silence = interval * ticks
        self._set_timeout(interval)

    def _set_timeout(self, seconds: float) -> None:
        # Of the kernel's kind: Python's own would hold for sending too, and cut a long sendall short.
        whole = int(seconds)
        self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, _TIMEVAL.pack(whole, int((seconds - whole) * 1e6)))

    # --------------------------------------------------------------------------------------------------- frames

    def send(self, header: msgspec.Struct, payload: bytes = b"") -> None:
        """Send a frame; waits while the other end takes nothing.

        Raises:
            PeerLostError: the connection is over.
        """
        head = self._encoder.encode(header)
        assert len(head) <= MAX_HEADER, f"a header of {len(head)} bytes"
        data = prefix(head, payload) + head
        try:
            if len(payload) <= _JOINED_BYTES:
                self._sock.sendall(data + payload)
            else:
                self._sock.sendall(data)
                self._sock.sendall(payload)
        except OSError as error:
            raise self.lost(str(error)) from error

    def receive(self, decoder: Decoder[_T], max_payload: int = 0) -> tuple[_T, bytearray]:
        """The next frame's header and payload.

        Raises:
            PeerLostError: the connection is over, time is up, or what came is no frame that fits the limits.
        """
        lengths = self._take(_LENGTHS.size)
        of_lengths, of_rest = _CHECKS.unpack(self._take(_CHECKS.size))
        head, size = _LENGTHS.unpack(lengths)
        if zlib.crc32(lengths) != of_lengths or not 0 < head <= MAX_HEADER or size > max_payload:
            raise self.lost(f"it sent something else than frames with a payload of at most {max_payload} bytes")
        data = self._take(head)
        payload = self._take(size)
        if zlib.crc32(payload, zlib.crc32(data)) != of_rest:
            raise self.lost("what it sent was damaged on its way")
        try:
            return decoder.decode(data), payload
        except msgspec.DecodeError as error:
            raise self.lost(f"it sent a header that is none ({error}); both sides must run the same etha_ray version") from error

    def _take(self, count: int) -> bytearray:
        # The memory for a payload grows as its bytes come: a length alone allocates nothing much.
        data = bytearray(min(count, 1 << 20))
        done = 0
        while done < count:
            if done == len(data):
                data.extend(bytes(min(count - done, len(data))))
            with memoryview(data) as view, view[done:] as rest:
                done += self._some(rest)
        return data

    def _some(self, view: memoryview) -> int:
        while True:
            if self._deadline is not None:
                left = self._deadline - time.monotonic()
                if left <= 0:
                    raise self.lost("it did not say in time what it should")
                self._set_timeout(max(left, _MIN_WAIT))
            try:
                count = self._sock.recv_into(view)
            except BlockingIOError:
                if self._deadline is None:
                    self._silent_ticks += 1
                    if self._silent_ticks >= self._ticks:
                        raise self.lost(f"nothing was heard of it for {self._silence:g} s") from None
                continue
            except OSError as error:
                raise self.lost(error.strerror or str(error)) from error
            if not count:
                raise self.lost("it closed the connection")
            self._silent_ticks = 0
            return count

    def lost(self, reason: str) -> PeerLostError:
        """The error that this connection is over, to be raised."""
        return PeerLostError(f"lost {self.peer}: {reason}")

    # ------------------------------------------------------------------------------------------------------ end

    def finish_sending(self) -> None:
        """Tell the other end that nothing more comes; receiving goes on."""
        with self._lock, contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_WR)

    def shutdown(self) -> None:
        """End the connection at once: whoever waits on it gets `PeerLostError`. From any thread, any number of times."""
        with self._lock, contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Give the descriptor back. By the thread that receives, once no other one sends."""
        with self._lock:
            self._sock.close()

    def __enter__(self) -> Connection:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"Connection({self.peer})"
