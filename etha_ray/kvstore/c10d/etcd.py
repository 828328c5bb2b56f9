"""A store with the names and behaviour of torch elastic's ``EtcdStore``, on etcd's v3 API."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from typing import Any

from etha_ray.kvstore.base import KVStore
from etha_ray.kvstore.c10d.errors import C10dLookupError
from etha_ray.kvstore.c10d.names import Key
from etha_ray.kvstore.c10d.store import C10dStore


class EtcdStore(C10dStore):
    """A `torch.distributed.Store` whose keys are under a prefix in etcd, and whose waits end with a `LookupError`.

    Torch's class of this name speaks etcd's v2 API, which etcd no longer has. Everything of `C10dStore` is here as well. Keys are stored as
    they are and not in base64, which v3 does not need: ``set("k", ...)`` is ``{prefix}/k``.
    """

    _timeout_error = C10dLookupError

    def __init__(self, etcd_client: Any, etcd_store_prefix: str, timeout: timedelta | None = None) -> None:
        """``etcd_client`` is a client of etcd-sdk-python (``pyetcd.client(...)``) or etcd3, or our `etha_ray.kvstore.EtcdStore`.

        With ours the prefix is inside of its namespace, requests survive a restart of etcd, and waits use etcd's watches; with a client
        it is a prefix of etcd's keys, waits ask every 50 ms, and what happens in an outage is up to the client. ``timeout`` is 300 s
        unless given. Raises `ConfigError` if ``etcd_client`` is something else.
        """
        prefix = etcd_store_prefix.removesuffix("/")
        if isinstance(etcd_client, KVStore):
            super().__init__(etcd_client, prefix)
        else:
            from etha_ray.kvstore.c10d.etcd_client_store import EtcdClientStore  # needs gRPC, as every client does

            super().__init__(EtcdClientStore(etcd_client, prefix))
        self.client = etcd_client
        self.prefix = f"{prefix}/"
        if timeout is not None:
            self.set_timeout(timeout)

    def clone(self) -> EtcdStore:
        return EtcdStore(self.client, self.prefix, self.timeout)

    def wait(self, keys: Sequence[Key], override_timeout: timedelta | float | None = None) -> None:
        """Waits until all the keys are there, as `check` has it; ``override_timeout`` (seconds, if a number) instead of the store's.

        Raises `C10dLookupError` (a `LookupError`, and a ``DistStoreError``) naming the keys that are missing and the seconds.
        """
        super().wait(keys, override_timeout)
