"""Communicators without a GPU: they write down what they are asked, really move the bytes over a socket, and fail when told to.

Like NCCL's they are two-sided and wait on the lane: a group is done when the other end has done its part, and if that dies, only `abort`
frees the lane. A group is on its lane only once that was asked for by `ready`: what is handed over before would come before it. The first
one connects the two ends, and is not there before the other end has one, too.
"""

from __future__ import annotations

import contextlib
import ctypes
import socket
import struct
import threading
from collections.abc import Sequence

from etha_ray.accelerator import Lane
from etha_ray.errors import CommunicatorError
from etha_ray.transport.nccl import Communicator, Communicators, Message
from etha_ray.transport.nccl.communicator import RECEIVER, SENDER
from tests.accelerator.lanes import QueuedLane

_HEADER = struct.Struct("<Q")
_CONNECT = b"c"


class RecordingCommunicators(Communicators):
    """``groups`` has the bytes of the messages of each group, by rank. The rest makes faults; None and False for none."""

    def __init__(self) -> None:
        self.groups: tuple[list[list[int]], list[list[int]]] = ([], [])
        self.made: list[RecordingCommunicator] = []
        self.never_joined = False
        self.stands_still = threading.Event()
        """While set, no byte is moved by groups that begin."""
        self.stood_still = threading.Event()
        self.flip: int | None = None
        """One bit of the message of this number is turned, of those that are sent from now on."""
        self._listeners: dict[bytes, socket.socket] = {}

    def unique_id(self) -> bytes:
        listener = socket.create_server(("127.0.0.1", 0))
        unique_id = str(listener.getsockname()[1]).encode()
        self._listeners[unique_id] = listener
        return unique_id

    def join(self, unique_id: bytes, rank: int) -> Communicator:
        communicator = RecordingCommunicator(self, rank)
        self.made.append(communicator)
        if rank == SENDER:
            target, where = communicator.accept, self._listeners.pop(unique_id)
            threading.Thread(target=target, args=(where,), daemon=True).start()
        else:
            threading.Thread(target=communicator.connect, args=(int(unique_id),), daemon=True).start()
        return communicator


class RecordingCommunicator(Communicator):
    def __init__(self, owner: RecordingCommunicators, rank: int) -> None:
        self.error: str | None = None
        """Set it, and it has failed."""
        self.aborted = threading.Event()
        self._owner, self._rank = owner, rank
        self._socket: socket.socket | None = None
        self._thread = threading.get_ident()
        self._pending: tuple[QueuedLane, list[Message]] | None = None
        self._connected = False

    def accept(self, listener: socket.socket) -> None:
        with listener:
            listener.settimeout(0.05)
            while not self.aborted.is_set():
                with contextlib.suppress(TimeoutError):
                    return self._joined(listener.accept()[0])

    def connect(self, port: int) -> None:
        try:
            self._joined(socket.create_connection(("127.0.0.1", port)))
        except OSError as error:
            self.error = f"cannot connect: {error}"

    def _joined(self, sock: socket.socket) -> None:
        self._socket = sock
        sock.settimeout(None)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if self.aborted.is_set():
            self._close()

    def send(self, messages: Sequence[Message], lane: Lane) -> None:
        self._hand_over(messages, lane, SENDER)

    def receive(self, messages: Sequence[Message], lane: Lane) -> None:
        self._hand_over(messages, lane, RECEIVER)

    def _hand_over(self, messages: Sequence[Message], lane: Lane, rank: int) -> None:
        assert rank == self._rank
        assert self.ready()
        assert isinstance(lane, QueuedLane)
        group = list(messages)
        self._owner.groups[rank].append([nbytes for _, nbytes in group])
        if not self._connected:
            assert self._socket is not None
            with contextlib.suppress(OSError):  # that is seen when it is waited for
                self._socket.sendall(_CONNECT)
        self._pending = lane, group

    def ready(self) -> bool:
        assert threading.get_ident() == self._thread, "a communicator was used by two threads"
        if self.aborted.is_set():
            raise CommunicatorError("the communicator was aborted")
        if self.error is not None:
            raise CommunicatorError(self.error)
        if self._pending is not None:
            if not self._connects():
                return False
            (lane, group), self._pending = self._pending, None
            lane.hand_over(lambda: self._move(group))
            return False
        return self._socket is not None and not self._owner.never_joined

    def _connects(self) -> bool:
        """Whether the other end has a group, too: the first one connects the devices."""
        assert self._socket is not None
        if not self._connected:
            try:
                self._connected = bool(self._socket.recv(1, socket.MSG_DONTWAIT))
            except BlockingIOError:
                return False
            except OSError as error:
                self.error = f"connection closed by remote peer ({error})"
        return self._connected

    def abort(self) -> None:
        assert threading.get_ident() == self._thread, "a communicator was used by two threads"
        self.aborted.set()
        self._close()

    def _close(self) -> None:
        if self._socket is not None:
            with contextlib.suppress(OSError):
                self._socket.shutdown(socket.SHUT_RDWR)

    # ------------------------------------------------------------------------------------------------- on the lane

    def _move(self, group: list[Message]) -> None:
        assert self._socket is not None
        while self._owner.stands_still.is_set() and not self.aborted.wait(0.01):
            self._owner.stood_still.set()
        try:
            for address, nbytes in group:
                memory = memoryview((ctypes.c_uint8 * nbytes).from_address(address)).cast("B")
                if self._rank == SENDER:
                    self._socket.sendall(_HEADER.pack(nbytes) + self._flipped(memory))
                else:
                    (sent,) = _HEADER.unpack(self._received(bytearray(_HEADER.size)))
                    assert sent == nbytes, f"a message of {sent} bytes was received as one of {nbytes}"
                    self._received(memory)
            # A group is done when both ends are: a sender that is ahead would hide what NCCL does not allow.
            if self._rank == SENDER:
                self._received(bytearray(1))
            else:
                self._socket.sendall(b"\0")
        except (OSError, AssertionError) as error:
            self.error = self.error or f"remote process exited or there was a network error ({error})"
            self.aborted.wait()  # a device does not notice: its kernel waits for the other end until it is aborted

    def _flipped(self, memory: memoryview) -> bytes:
        data = bytearray(memory)
        if self._owner.flip is not None:
            self._owner.flip -= 1
            if self._owner.flip < 0:
                self._owner.flip = None
                data[-1] ^= 1
        return bytes(data)

    def _received(self, memory: bytearray | memoryview) -> bytearray | memoryview:
        assert self._socket is not None
        view = memoryview(memory)
        while len(view):
            count = self._socket.recv_into(view)
            if not count:
                raise ConnectionResetError("the other end is gone")
            view = view[count:]
        return memory
