"""A process that serves a TCPStore, to be killed, started again, and made to stand still."""

from __future__ import annotations

import multiprocessing
import threading
from dataclasses import dataclass
from multiprocessing.connection import Connection

from etha_ray.kvstore import TorchTCPStore
from tests.contracts.kvstore_silence import LONG
from tests.fresh import fresh

HOST = "127.0.0.1"


def serve(port: int, pipe: Connection) -> None:
    store = TorchTCPStore(HOST, port, None, True, 60.0)
    pipe.send(store.port)
    threading.Event().wait(600)


@dataclass
class Master:
    """A process that serves at a port of its own."""

    port: int

    def start(self) -> None:
        ours, theirs = multiprocessing.Pipe()
        self._process = fresh.Process(target=serve, args=(self.port, theirs), daemon=True)
        self._process.start()
        assert ours.poll(LONG)
        ours.recv()

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    def kill(self) -> None:
        self._process.kill()
        self._process.join()
