"""Which agent serves this Ray worker? The pool's table in Ray's GCS says who sits on which node and device.

`etha_ray.runtime.launch_agents` writes the table; Ray is imported only in a process that has it loaded already.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

import msgspec

from etha_ray.decoding import Decoder
from etha_ray.errors import StoreError
from etha_ray.kvstore.gcs import GcsStore, in_local_mode
from etha_ray.kvstore.patience import ATTEMPT, OUTAGE

T = TypeVar("T")

COMPONENT = "pool"
_TABLE = "agents"
_SETTINGS = "settings"


class PoolEntry(msgspec.Struct, frozen=True):
    """One agent of a pool."""

    rank: int
    node_id: str
    device: str
    command_queue_path: str
    state_path: str


class PoolSettings(msgspec.Struct, frozen=True):
    """What all agents of a pool have in common, those that are started later too; see `launch_agents`.

    ``auto`` is whether it has an agent on all devices of all nodes.
    """

    auto: bool
    store: str
    memory_budget: int
    integrity: str
    transport: str
    detached: bool


_entries = Decoder(list[PoolEntry])
_settings = Decoder(PoolSettings)


def encoded(value: list[PoolEntry] | PoolSettings) -> bytes:
    """As the GCS has it, and as it goes through Ray, which pickles what it is given."""
    return msgspec.msgpack.encode(value)


def pool_entries(namespace: str, stored: bytes | None) -> list[PoolEntry]:
    """The agents of a pool, by rank, as `stored_pool` gave them; empty when there is none. Raises `StoreError` for what is none."""
    return [] if stored is None else _decoded(stored, _entries, namespace)


def pool_settings(namespace: str, stored: bytes) -> PoolSettings:
    """The settings of a pool, as `stored_pool` gave them. Raises `StoreError` for what is none."""
    return _decoded(stored, _settings, namespace)


def write_pool(namespace: str, entries: bytes, settings: bytes) -> None:
    """Publish a new pool. Needs an initialised Ray."""
    withdraw_pool(namespace)
    with _opened(namespace) as store:
        store.set_bytes(_SETTINGS, settings)
        store.set_bytes(_TABLE, entries)


def extend_pool(namespace: str, entries: bytes) -> None:
    """Publish agents that have joined a pool; workers find the others all the while."""
    with _opened(namespace) as store:
        table = [*pool_entries(namespace, store.get_bytes(_TABLE)), *pool_entries(namespace, entries)]
        store.set_bytes(_TABLE, encoded(table))


def withdraw_pool(namespace: str) -> None:
    """Take a pool's entries back. Needs an initialised Ray."""
    with _opened(namespace) as store:
        store.delete_prefix("")


def stored_pool(namespace: str) -> tuple[bytes | None, bytes | None]:
    """The agents and the settings that `write_pool` published; None where there is no pool. Needs an initialised Ray."""
    with _opened(namespace) as store:
        return store.get_bytes(_TABLE), store.get_bytes(_SETTINGS)


def find_agent_on_node(namespace: str, timeout: float | None = None) -> PoolEntry | None:
    """The agent of this Ray worker's node and device, or None outside Ray and on nodes without agents.

    A worker with a GPU takes the agent of its first GPU. Others take the node's agents in turn: the count is kept in the
    GCS, so workers of different jobs share them evenly.

    Raises `StoreUnavailableError` when the GCS has not answered for ``timeout`` seconds; it has some seconds at least, and `OUTAGE` at
    most.
    """
    ray = sys.modules.get("ray")
    if ray is None or not ray.is_initialized():
        return None
    with _opened(namespace, OUTAGE if timeout is None else max(ATTEMPT, timeout)) as store:
        table = store.get_bytes(_TABLE)
        if table is None:
            return None
        node_id = ray.get_runtime_context().get_node_id()
        here = [entry for entry in pool_entries(namespace, table) if entry.node_id == node_id]
        gpus = ray.get_gpu_ids()
        if gpus and not in_local_mode():  # where it gives the machine's, whatever an actor asked for
            return next((entry for entry in here if entry.device == f"cuda:{gpus[0]}"), None)
        if not here:
            return None
        return here[(store.add(f"turn/{node_id}", 1) - 1) % len(here)]


def _decoded(data: bytes, decoder: Decoder[T], namespace: str) -> T:
    try:
        return decoder.decode(data)
    except msgspec.DecodeError as error:
        raise StoreError(
            f"what Ray's GCS says of pool {namespace!r} cannot be read ({error}): another version of etha_ray launched it; run one version"
            " on the whole cluster, and launch the pool again"
        ) from error


@contextmanager
def _opened(namespace: str, timeout: float = OUTAGE) -> Iterator[GcsStore]:
    store = GcsStore(namespace, COMPONENT, timeout)
    try:
        yield store
    finally:
        store.close(cleanup=False)
