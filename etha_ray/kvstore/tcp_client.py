"""A connection to torch's TCPStore on which every request has its time.

Three facts of torch's client shape this file.

- It waits for an answer for as long as it takes, where the server is stopped or its host cut off; its own timeouts are for ``wait`` and
  ``get`` alone, which then wait without limit for the answer to their giving up. So its socket gets the kernel's timeouts, which torch
  reports as an error. Which socket that is torch says in its ``repr`` only.
- An answer that comes after its request was given up would be taken for the answer to the next one. So a connection on which anything
  failed is let go, and the next request opens another. That also finds a server that was started again, which has none of the old keys.
- One call at a time: who waits for torch's own lock would wait without limit, and go on on a connection that was just given up. So the
  lock is here. Connecting, too, waits without limit for a server that is stopped: it is done on a thread, which is left behind then.
"""

from __future__ import annotations

import logging
import os
import re
import socket
import struct
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from concurrent.futures import TimeoutError as NotYet  # Python 3.10 has a class of its own for it
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Protocol, cast

from torch.distributed import DistError, TCPStore  # type: ignore[attr-defined]

from etha_ray.errors import StoreClosedError, StoreUnavailableError
from etha_ray.kvstore.patience import ATTEMPT, OUTAGE, Patience

logger = logging.getLogger(__name__)

_CONNECT_RETRY = 0.05
_LEAST = 0.5
"""Seconds that a request has at least which others have kept waiting for most of its time."""
_DESCRIPTOR = re.compile(r"\bfd=(\d+)")


class Torch(Protocol):
    """What torch's TCPStore takes; its type stubs know values as str only."""

    port: int

    def set(self, key: str, value: bytes) -> None: ...
    def compare_set(self, key: str, expected: bytes, desired: bytes) -> bytes: ...
    def append(self, key: str, value: bytes) -> None: ...
    def add(self, key: str, n: int) -> int: ...
    def check(self, keys: list[str]) -> bool: ...
    def delete_key(self, key: str) -> bool: ...
    def list_keys(self) -> list[str]: ...


class TorchClient:
    """Requests to torch's server, from any number of threads.

    Args:
        store: the first connection; a master's object also serves, and does so until `close`.
        host, port: where others are opened.
        use_libuv: as the first one was made.
        patience: how long a request may take.
    """

    def __init__(self, store: Torch, host: str, port: int, use_libuv: bool, patience: Patience) -> None:
        self._first: Torch | None = store
        self._host, self._port, self._libuv = host, port, use_libuv
        self._patience = patience
        self._lock = threading.Lock()  # of all below
        self._connection: _Connection | None = _Connection(store)
        self._opening: _Opening | None = None
        self._closed = False

    @contextmanager
    def asking(self) -> Iterator[Torch]:
        """Torch's client, for one request, or for some that belong together. Raises `StoreUnavailableError`."""
        seconds = self._patience.seconds
        began = time.monotonic()
        if not self._lock.acquire(timeout=seconds):
            raise self._silent(began)
        try:
            connection = self._connected(began, began + seconds)
            connection.limit(_left(began + seconds))
            yield connection.torch
        except DistError as error:
            self._drop()
            if self._closed:
                raise StoreClosedError(f"a TorchTCPStore at {self._host}:{self._port} was closed meanwhile: make a new one") from error
            reason = str(error).splitlines()[0]
            if reason == "Socket Timeout":
                raise self._silent(began) from error
            raise StoreUnavailableError(
                f"TorchTCPStore at {self._host}:{self._port} cannot be reached ({reason}): the process that serves it (is_master=True; the"
                " agent of rank 0) has ended, and what it held with it, or its host is cut off. Start it again there, and then what met"
                " in it; etcd survives such an end"
            ) from error
        finally:
            self._lock.release()

    def close(self) -> None:
        """Let go of the connection, and of the server if this is a master's; a request under way in another thread ends."""
        self._closed = True
        connection, self._connection, self._first = self._connection, None, None
        if connection is not None:
            connection.close()

    def _connected(self, began: float, deadline: float) -> _Connection:
        if self._closed:
            raise StoreClosedError(f"a TorchTCPStore at {self._host}:{self._port} is closed: make a new one")
        if self._connection is None:
            if self._opening is None or self._opening.age > OUTAGE:  # what it asked may never be answered: another host may be there now
                knock(self._host, self._port, _left(deadline))
                limit = timedelta(seconds=OUTAGE)
                self._opening = _Opening(lambda: TCPStore(self._host, self._port, None, False, limit, False, use_libuv=self._libuv))
            try:
                self._connection = _Connection(self._opening.result(_left(deadline)))
            except NotYet:
                raise self._silent(began) from None  # the next request waits for the same
            except BaseException:
                self._opening = None
                raise
            self._opening = None
            logger.info("connected again with the TorchTCPStore at %s:%d", self._host, self._port)
        return self._connection

    def _drop(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()

    def _silent(self, began: float) -> StoreUnavailableError:
        return StoreUnavailableError(
            f"TorchTCPStore at {self._host}:{self._port} has not answered for {time.monotonic() - began:.1f} s: see that the process that"
            " serves it (is_master=True; the agent of rank 0) is not stopped and that this host reaches it, then call again"
        )


class _Connection:
    """Torch's client, and its socket."""

    def __init__(self, torch: Torch) -> None:
        self.torch = torch
        self._limit = 0.0
        found = _DESCRIPTOR.search(repr(torch))
        if found is None:
            logger.warning("this torch does not say which socket its TCPStore has: requests wait for a stopped server without limit")
        self._socket = None if found is None else socket.socket(fileno=os.dup(int(found[1])))
        if self._socket is not None:
            self._socket.settimeout(None)  # the descriptor is torch's too, which knows only blocking ones
            weakref.finalize(self, self._socket.close)

    def limit(self, seconds: float) -> None:
        """How long the kernel may keep it waiting from now on."""
        if self._socket is not None and abs(seconds - self._limit) > 0.05 * self._limit:
            whole, part = divmod(seconds, 1.0)
            for option in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
                self._socket.setsockopt(socket.SOL_SOCKET, option, struct.pack("ll", int(whole), int(part * 1e6)))
            self._limit = seconds

    def close(self) -> None:
        """End it, also for who waits on it in another thread."""
        if self._socket is not None:
            with suppress(OSError):  # the other side has done so
                self._socket.shutdown(socket.SHUT_RDWR)
            self._socket.close()


class _Opening:
    """A client of torch's that is being made, on a thread that nobody has to wait for."""

    def __init__(self, connect: Callable[[], TCPStore]) -> None:
        self._began = time.monotonic()
        self._made: Future[TCPStore] = Future()
        threading.Thread(target=self._run, args=(connect,), name="etha-ray tcp connect", daemon=True).start()

    @property
    def age(self) -> float:
        """Seconds since it was begun."""
        return time.monotonic() - self._began

    def result(self, seconds: float) -> Torch:
        """The client; raises `NotYet` while it is not there, and what kept it from being made."""
        return cast(Torch, self._made.result(seconds))

    def _run(self, connect: Callable[[], TCPStore]) -> None:
        try:
            self._made.set_result(connect())
        except BaseException as error:
            self._made.set_exception(error)


def connect(make: Callable[[], TCPStore], host: str, port: int, timeout: float) -> Torch:
    """What ``make`` makes, which is to take ``timeout`` seconds at most. Raises `StoreUnavailableError` where it takes longer."""
    try:
        return _Opening(make).result(timeout + ATTEMPT)  # torch's own error says more, if it comes
    except NotYet:
        raise StoreUnavailableError(
            f"TorchTCPStore at {host}:{port} takes connections and has not answered for {timeout:g} s: see that the process that serves it"
            " (is_master=True; the agent of rank 0) is not stopped, then try again"
        ) from None


def knock(host: str, port: int, seconds: float, tries_until: float = 0.0) -> None:
    """Wait until something listens: torch's own retries run well over the timeout, and fill the log with traces.

    ``seconds`` is for one try; another is made while ``tries_until`` (of `time.monotonic`) has not come.
    """
    began = time.monotonic()
    while True:
        try:
            socket.create_connection((host, port), seconds).close()
            return
        except OSError as error:
            now = time.monotonic()
            if now + _CONNECT_RETRY >= tries_until:
                tried = f" (tried for {now - began:.1f} s)" if tries_until else ""
                raise StoreUnavailableError(
                    f"no TorchTCPStore listens at {host}:{port}{tried}: {error}. Start the process that serves it (is_master=True; in a URL"
                    " ?master=1; the agent of rank 0), or check the address. What one that has ended held is gone with it"
                ) from error
            time.sleep(_CONNECT_RETRY)


def _left(deadline: float) -> float:
    return max(_LEAST, deadline - time.monotonic())
