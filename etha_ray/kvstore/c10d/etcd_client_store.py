"""A `KVStore` on somebody else's etcd client: one of etcd-sdk-python (``pyetcd``) or etcd3, which share their interface.

A key ``k`` is the key ``{prefix}/k`` of etcd, so that the owner of the client finds it there. What happens when a connection breaks is
up to the client: nothing is tried again here, and a change whose answer was lost was made or not. (etcd-sdk-python, unless it was made
with ``failover``, refuses to work for five minutes then.) Its watches end with their connection, so waits ask again and again instead.
"""

from __future__ import annotations

import logging
import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import grpc

from etha_ray.errors import ConfigError, LeaseExpiredError, StoreError, StoreUnavailableError
from etha_ray.kvstore.base import Change, KVStore

logger = logging.getLogger(__name__)

_UNREACHABLE = ("UNAVAILABLE", "DEADLINE_EXCEEDED", "CANCELLED", "INTERNAL")


class EtcdClientStore(KVStore):
    """A `KVStore` whose namespace is a prefix in etcd. Closing it leaves the client open."""

    # etcd takes 1.5 MiB in a request unless told otherwise; what is left is for the key and the rest of the message.
    max_value_bytes = 2**20
    max_key_bytes = 64 * 2**10
    poll_to = 0.05

    def __init__(self, client: Any, prefix: str) -> None:
        """Raises `ConfigError` if ``client`` is no client of etcd's v3 API, or ``prefix`` is empty."""
        missing = [name for name in ("put", "get", "get_prefix", "transaction", "transactions", "lease") if not hasattr(client, name)]
        if missing:
            raise ConfigError(
                f"{client!r} is no client of etcd's v3 API (it has no {missing[0]}): give one of pyetcd.client(...), or a KVStore "
                "such as create_store('etcd://...')"
            )
        super().__init__(prefix, "keys")
        self._client = client
        self._own = self._full("", None)

    def _where(self) -> str:
        return f"etcd by {type(self._client).__module__}.{type(self._client).__name__}"

    def _get(self, full: str) -> bytes | None:
        return self._entry(full)[0]

    def _set(self, full: str, data: bytes) -> None:
        with self._calls() as client:
            client.put(self._raw(full), data)

    def _exists(self, full: str) -> bool:
        return self._get(full) is not None

    def _delete(self, full: str) -> bool:
        with self._calls() as client:
            return bool(client.delete(self._raw(full)))

    def _update(self, full: str, change: Change) -> bytes | None:
        key = self._raw(full)
        while True:
            stored, revision = self._entry(full)
            value = change(stored)
            if value is None or value == stored:
                return stored
            with self._calls() as client:
                unchanged = client.transactions.mod(key) == revision
                done, _ = client.transaction(compare=[unchanged], success=[client.transactions.put(key, value)], failure=[])
            if done:
                return value

    def _list(self, prefix: str) -> dict[str, bytes]:
        start = self._raw(prefix)
        with self._calls() as client:
            # Without the values, of which gRPC takes only 4 MiB at a time.
            names = [prefix + meta.key[len(start) :].decode() for _, meta in client.get_prefix(start, keys_only=True)]
        values = {name: self._get(name) for name in names}
        return {name: value for name, value in values.items() if value is not None}

    def _delete_prefix(self, prefix: str) -> int:
        with self._calls() as client:
            return int(client.delete_prefix(self._raw(prefix)).deleted)

    def _grant(self, ttl: float) -> _ClientGrant:
        return _ClientGrant(self, ttl)

    def _close(self, cleanup_prefix: str | None) -> None:
        if cleanup_prefix is None:
            return
        try:
            self._delete_prefix(cleanup_prefix)
        except StoreError as error:
            logger.debug("nothing to clean in %r: %s", self, error)

    def _raw(self, full: str) -> bytes:
        """The key in etcd: without the component's name, for the component that all keys are in unless a call names another."""
        if full.startswith(self._own):
            return f"{self.namespace}/{full[len(self._own) :]}".encode()
        rest = full[len(self._home) :]
        return f"{self.namespace}/{f'%component/{rest}' if rest else ''}".encode()

    def _entry(self, full: str) -> tuple[bytes | None, int]:
        """The value, and the revision that wrote it (0: the key is missing)."""
        with self._calls() as client:
            value, meta = client.get(self._raw(full))
        return (None, 0) if meta is None else (value, meta.mod_revision)

    @contextmanager
    def _calls(self) -> Iterator[Any]:
        """The client; its errors become ours."""
        try:
            yield self._client
        except grpc.RpcError as error:
            if error.code().name in _UNREACHABLE:
                raise self._unavailable(error) from error
            raise StoreError(f"{self!r} refused a request: {error.details()} ({error.code().name})") from error
        except _client_errors() as error:
            raise self._unavailable(error) from error
        except ValueError as error:
            if "failed node" not in str(error) and "closed channel" not in str(error):
                raise
            raise self._unavailable(error) from error

    def _unavailable(self, error: Exception) -> StoreUnavailableError:
        cause = str(error) or type(error).__name__
        return StoreUnavailableError(f"{self!r} cannot be reached ({cause}); is etcd running, and is the client given to it still open?")


class _ClientGrant:
    """A `Grant` that is a lease of the client's."""

    def __init__(self, store: EtcdClientStore, ttl: float) -> None:
        self._store = store
        with store._calls() as client:
            self._lease = client.lease(math.ceil(ttl))

    @property
    def ttl(self) -> float:
        return float(self._lease.ttl)

    def put(self, full: str, data: bytes) -> None:
        with self._store._calls() as client, self._noticed():
            client.put(self._store._raw(full), data, lease=self._lease)

    def renew(self) -> None:
        with self._store._calls():
            answers = self._lease.refresh()
        if not answers or answers[-1].TTL <= 0:
            raise self._ended()

    def revoke(self) -> None:
        try:
            with self._store._calls(), self._noticed():
                self._lease.revoke()
        except LeaseExpiredError:
            pass

    @contextmanager
    def _noticed(self) -> Iterator[None]:
        try:
            yield
        except grpc.RpcError as error:
            if error.code().name != "NOT_FOUND":
                raise
            raise self._ended() from error

    def _ended(self) -> LeaseExpiredError:
        return LeaseExpiredError(f"a lease of {self.ttl:g} s in {self._store!r} was not renewed in time; its keys are gone, take a new one")


def _client_errors() -> tuple[type[Exception], ...]:
    """The errors of whichever of the two packages has been imported: whoever made the client has."""
    packages = (sys.modules.get(name) for name in ("pyetcd", "etcd3"))
    return tuple(package.Etcd3Exception for package in packages if package is not None)
