"""Which agent serves this Ray worker? The pool's table in Ray's GCS says who sits on which node and device.

`etha_ray.runtime.launch_agents` writes the table; Ray is imported only in a process that has it loaded already.
"""

from __future__ import annotations

import sys

import msgspec

from etha_ray.decoding import Decoder
from etha_ray.kvstore.gcs import GcsStore, in_local_mode

COMPONENT = "pool"
_TABLE = "agents"


class PoolEntry(msgspec.Struct, frozen=True):
    """One agent of a pool."""

    rank: int
    node_id: str
    device: str
    command_queue_path: str
    state_path: str


_entries = Decoder(list[PoolEntry])


def write_pool(namespace: str, entries: list[PoolEntry]) -> None:
    """Publish a pool; an empty list withdraws it. Needs an initialised Ray."""
    store = GcsStore(namespace=namespace, component=COMPONENT)
    try:
        store.delete_prefix("")
        if entries:
            store.set_bytes(_TABLE, msgspec.msgpack.encode(entries))
    finally:
        store.close(cleanup=False)


def read_pool(namespace: str) -> list[PoolEntry]:
    """The agents of a pool that `write_pool` published, by rank; empty when there is none. Needs an initialised Ray."""
    store = GcsStore(namespace=namespace, component=COMPONENT)
    try:
        table = store.get_bytes(_TABLE)
    finally:
        store.close(cleanup=False)
    return [] if table is None else _entries.decode(table)


def find_agent_on_node(namespace: str) -> PoolEntry | None:
    """The agent of this Ray worker's node and device, or None outside Ray and on nodes without agents.

    A worker with a GPU takes the agent of its first GPU. Others take the node's agents in turn: the count is kept in the
    GCS, so workers of different jobs share them evenly.
    """
    ray = sys.modules.get("ray")
    if ray is None or not ray.is_initialized():
        return None
    store = GcsStore(namespace=namespace, component=COMPONENT)
    try:
        table = store.get_bytes(_TABLE)
        if table is None:
            return None
        node_id = ray.get_runtime_context().get_node_id()
        here = [entry for entry in _entries.decode(table) if entry.node_id == node_id]
        gpus = ray.get_gpu_ids()
        if gpus and not in_local_mode():  # where it gives the machine's, whatever an actor asked for
            return next((entry for entry in here if entry.device == f"cuda:{gpus[0]}"), None)
        if not here:
            return None
        return here[(store.add(f"turn/{node_id}", 1) - 1) % len(here)]
    finally:
        store.close(cleanup=False)
