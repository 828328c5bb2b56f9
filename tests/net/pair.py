"""An owner and a reader in this process, and a slow network to put between them."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
from collections.abc import Callable, Sequence

import torch

from etha_ray.net import Address, Server
from etha_ray.transport.network import NetworkTransport, Read, RemoteRegion

SECRET = os.urandom(32)
PATIENCE = 60.0


class Pair:
    """An owner and a reader in this process."""

    def __init__(self, **options: int) -> None:
        self.owner, self.reader = NetworkTransport(SECRET, **options), NetworkTransport(SECRET, **options)
        self.server = Server(SECRET, self.owner.services, "127.0.0.1")
        self.address = self.server.address

    def region(self, index: int, tensor: torch.Tensor, export: str = "x") -> RemoteRegion:
        """All of a tensor that has been exported."""
        return RemoteRegion(self.address, export, index, (0,) * tensor.dim(), tuple(tensor.shape), tensor.dtype)

    def reads(self, sources: Sequence[torch.Tensor], targets: Sequence[torch.Tensor], export: str = "x") -> list[Read]:
        return [Read(self.region(i, s, export), t) for i, (s, t) in enumerate(zip(sources, targets, strict=True))]

    def close(self) -> None:
        for each in (self.reader, self.owner, self.server):
            each.close()


class Relay:
    """Passes connections on to an owner, and can be told to hold back what the owner says: a slow network.

    Or to turn one bit of the next large piece that it passes on: a faulty one. Or to make of anything what ``garble`` makes of it.
    """

    def __init__(self, to: Address) -> None:
        self._to = to
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = Address(*self._listener.getsockname())
        self.open = threading.Event()
        self.open.set()
        self.held_back = threading.Event()
        self.flip = threading.Event()
        self.garble: Callable[[bytes], bytes] | None = None
        self._sockets: list[socket.socket] = [self._listener]
        self._threads = [threading.Thread(target=self._accept, daemon=True)]
        self._threads[0].start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                near = self._listener.accept()[0]
                far = socket.create_connection((self._to.host, self._to.port))
                self._sockets += [near, far]
                for source, sink, slow in ((near, far, False), (far, near, True)):
                    self._threads.append(threading.Thread(target=self._pump, args=(source, sink, slow), daemon=True))
                    self._threads[-1].start()

    def _pump(self, source: socket.socket, sink: socket.socket, slow: bool) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                if slow and len(data) > 4096 and not self.open.is_set():  # heartbeats pass
                    self.held_back.set()
                    self.open.wait(PATIENCE)
                if slow and len(data) > 4096 and self.flip.is_set():
                    self.flip.clear()
                    data = data[:-1] + bytes([data[-1] ^ 1])  # headers come first
                sink.sendall(data if self.garble is None else self.garble(data))
            sink.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        self.open.set()
        for sock in self._sockets:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join()
        for sock in self._sockets:
            sock.close()
