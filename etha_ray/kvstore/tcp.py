"""A store on `torch.distributed.TCPStore`: what a torchrun job has already.

Five facts of torch's store shape this file.

- Its ``get`` waits for a missing key. ``compare_set(key, X, X)`` does not: it answers the value of the key, or X if there is none, and
  changes nothing. With an X that nobody stores it is a read in one round trip that no deletion can make hang.
- Its ``compare_set`` takes an empty ``expected`` for "is missing", so an empty value and no value would be the same. An empty value is
  therefore stored as the marker `_EMPTY`; every other value is stored as it is.
- Its ``set`` and ``append`` are sent and not answered. A question is asked after each, so that a write that has returned is done.
- Its ``append`` and ``add`` know nothing of leases. A key under one is made an ordinary key before, see `_of_no_lease`; one that comes
  under a lease between that and the append stays under it, with what was appended.
- One client object runs one call at a time, so a ``wait`` inside torch would hold up every other thread. Waits are short looks with
  pauses between them. `tcp_client` has what else follows for a server that is silent.

Why not ``wait`` on a second connection? It wakes 0.3 ms after the put (p50). Polling wakes 0.8 ms after it in waits of 20 ms at most, 2 ms
in ones of 100 ms, and 6 ms in longer ones (torch 2.13, two processes, 2 cores). But nothing ends a ``wait`` before its timeout, so `close`
would have to leave a thread and a connection behind for each that is under way. With short timeouts in a row, each of them writes two
warnings into the log, and a put at the moment when one ends is seen only 5 s later: 9 of 200 puts, with timeouts of 20 ms. And ``wait`` is
for keys that are missing: not for a value, any change, or the end of a lease.
"""

from __future__ import annotations

import logging
import os
import time
from contextlib import AbstractContextManager
from datetime import timedelta
from typing import cast

from torch.distributed import DistError, TCPStore  # type: ignore[attr-defined]

from etha_ray.errors import ConfigError, StoreClosedError, StoreUnavailableError
from etha_ray.kvstore.base import Change
from etha_ray.kvstore.keys import added
from etha_ray.kvstore.lease_records import LEASE_OVERHEAD, RecordLeases, split
from etha_ray.kvstore.patience import OUTAGE, Patience
from etha_ray.kvstore.tcp_client import Torch, TorchClient, connect, knock

logger = logging.getLogger(__name__)

POLL_INTERVAL = 0.001
"""Seconds before a wait looks at the store for the second time; later pauses are longer, up to 10 ms."""

_EMPTY = bytes.fromhex("c0ffd5e1b29a4f0e8a4771c63fe2089d")
"""Random, once: no value begins with it by chance. A value appended to an empty one still begins with it, see `_decoded`."""
_ABSENT = os.urandom(16)
_LIBUV_MAX_PAYLOAD = 8 * 2**20
_LIBUV_MAX_KEY = 8 * 2**10 - 1  # torch puts a slash in front of each key


class TorchTCPStore(RecordLeases):
    """A `KVStore` on torch's TCPStore: one process is the master and serves, all others connect to it.

    The keys live in the master's memory and go with it; leases are kept by records, see `lease_records`. ``host``, ``port`` (the real one
    where 0 was asked), ``world_size`` and ``is_master`` are attributes. With ``use_libuv`` torch takes keys up to 8 KiB and values up to
    8 MiB, of which 32 bytes are kept for a lease; without it there is no such limit. `append` may grow a value beyond it. Pass the same
    ``use_libuv`` on the master and on the others: the server is not asked.

    **Outages.** A request that the master does not answer for ``timeout`` seconds, `patience.OUTAGE` at most, raises
    `StoreUnavailableError`, and what it was to change was changed or not; a wait raises it when its own time ends meanwhile, or some
    seconds later. Once the master answers again, so does the store. Where the master has died that is raised at once; another one that
    is started at the same address is found by the next request, and has none of the keys.
    """

    poll_from = POLL_INTERVAL

    def __init__(
        self,
        host: str,
        port: int,
        world_size: int | None,
        is_master: bool,
        timeout: float = 3600.0,
        wait_for_workers: bool = True,
        namespace: str = "default",
        component: str = "tensorbus",
        *,
        multi_tenant: bool = False,
        master_listen_fd: int | None = None,
        use_libuv: bool = True,
    ) -> None:
        """Serves (master) or connects; with ``wait_for_workers`` it returns when ``world_size`` processes have done so.

        ``world_size=None`` means any number, and then nothing is waited for. ``multi_tenant`` lets several masters of one process share
        a port, ``master_listen_fd`` is a listening socket to serve on.

        Raises `StoreUnavailableError` naming host and port when nobody listens there, or not all workers came, within ``timeout``
        seconds, or when the master cannot listen; `ConfigError` for a port, world size or timeout out of range.
        """
        super().__init__(namespace, component)
        if not 0 <= port < 2**16 or (port == 0 and not is_master):
            raise ConfigError(f"port {port} of a TorchTCPStore must be 1..65535 (0, any free port, for the master only)")
        if world_size is not None and world_size < 1:
            raise ConfigError(f"world_size {world_size} of a TorchTCPStore must be at least 1, or None for any")
        if timeout <= 0:
            raise ConfigError(f"timeout {timeout} of a TorchTCPStore must be above 0 seconds")
        self.host, self.port, self.world_size, self.is_master = host, port, world_size, is_master
        self.max_value_bytes = _LIBUV_MAX_PAYLOAD - LEASE_OVERHEAD if use_libuv else None
        self.max_key_bytes = _LIBUV_MAX_KEY if use_libuv else None
        deadline = time.monotonic() + timeout
        if not is_master:
            knock(host, port, timeout, deadline)
        waits = wait_for_workers and world_size is not None
        seconds = max(0.001, deadline - time.monotonic())
        left = timedelta(seconds=seconds if waits else min(seconds, OUTAGE))  # something listens: what it does not answer now it never will

        def make() -> TCPStore:
            return TCPStore(host, port, world_size, is_master, left, waits, multi_tenant, master_listen_fd, use_libuv)

        try:
            store = cast(Torch, make()) if is_master else connect(make, host, port, left.total_seconds())
        except DistError as error:
            reason = str(error).splitlines()[0]
            raise StoreUnavailableError(
                f"TorchTCPStore at {host}:{port} cannot be reached ({reason}) within {timeout:g} s; is the address right and free, and did"
                f" all {world_size} processes start?"
            ) from error
        self.port = store.port
        self._patience = Patience(timeout, self._closing)
        self._client = TorchClient(store, host, self.port, use_libuv, self._patience)

    def _where(self) -> str:
        return f"tcp://{self.host}:{self.port}"

    def _within(self, deadline: float) -> AbstractContextManager[None]:
        return self._patience.until(deadline)

    def _raw(self, full: str) -> bytes | None:
        with self._client.asking() as torch:
            stored = torch.compare_set(full, _ABSENT, _ABSENT)
        return None if stored == _ABSENT else stored

    def _stored_get(self, full: str) -> bytes | None:
        return _decoded(self._raw(full))

    def _set(self, full: str, data: bytes) -> None:
        with self._client.asking() as torch:
            torch.set(full, data or _EMPTY)
            _settle(torch, full)

    def _stored_delete(self, full: str) -> bool:
        with self._client.asking() as torch:
            return torch.delete_key(full)

    def _stored_update(self, full: str, change: Change) -> bytes | None:
        while True:
            raw = self._raw(full)
            stored = _decoded(raw)
            value = change(stored)
            if value is None or value == stored:
                return stored
            after = value or _EMPTY
            with self._client.asking() as torch:
                # Torch answers the value now stored (or the expected one, if the key is missing), so of two writers that store the same
                # both believe they won. That is what compare_and_set promises; adding and appending cannot go this way.
                if torch.compare_set(full, raw or b"", after) == after:
                    return value

    def _add(self, key: str, full: str, n: int) -> int:
        # Torch's server drops the connection when the value is not a number, so look first.
        raw = self._of_no_lease(full, missing=b"0")
        with self._client.asking() as torch:
            if raw is not None and raw != _EMPTY and raw.startswith(_EMPTY):
                raw = torch.compare_set(full, raw, raw[len(_EMPTY) :])
        added(key, _decoded(raw), n)
        with self._client.asking() as torch:
            return torch.add(full, n)

    def _append(self, key: str, full: str, data: bytes) -> None:
        if not data:
            self._update(full, lambda stored: stored or b"")
            return
        self._of_no_lease(full, missing=_EMPTY)
        with self._client.asking() as torch:
            torch.append(full, data)
            _settle(torch, full)

    def _of_no_lease(self, full: str, missing: bytes) -> bytes | None:
        """Makes a key that is under a lease an ordinary one, of the same value, or ``missing`` if the lease is over; what is stored."""
        while True:
            raw = self._raw(full)
            if raw is None or split(raw)[1] is None:
                return raw
            value = self._get(full)
            with self._client.asking() as torch:
                torch.compare_set(full, raw, missing if value is None else value or _EMPTY)

    def _stored_list(self, prefix: str) -> dict[str, bytes]:
        values = {name: self._stored_get(name) for name in self._names(prefix)}
        return {name: value for name, value in values.items() if value is not None}

    def _stored_delete_prefix(self, prefix: str) -> int:
        return sum(self._stored_delete(name) for name in self._names(prefix))

    def _names(self, prefix: str) -> list[str]:
        with self._client.asking() as torch:
            return [name for name in torch.list_keys() if name.startswith(prefix)]

    def _close(self, cleanup_prefix: str | None) -> None:
        try:
            if cleanup_prefix is not None:
                self._stored_delete_prefix(cleanup_prefix)
        except (StoreUnavailableError, StoreClosedError) as error:
            logger.debug("nothing to clean in %r: %s", self, error)
        self._client.close()


def _settle(torch: Torch, full: str) -> None:
    """Returns when what was sent before has been done: torch's server works off a connection in order, but answers no write."""
    torch.check([full])


def _decoded(raw: bytes | None) -> bytes | None:
    return None if raw is None else raw.removeprefix(_EMPTY)
