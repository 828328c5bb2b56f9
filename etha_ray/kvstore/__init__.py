"""Key-value stores for rendezvous: one interface, `KVStore`, over etcd, Ray's GCS, torch's TCPStore and plain memory.

A backend is imported when its name is first used, so importing this loads neither Ray nor torch nor gRPC.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from etha_ray.kvstore.base import KVStore
from etha_ray.kvstore.lease import Lease
from etha_ray.kvstore.memory import MemoryStore
from etha_ray.kvstore.url import create_store
from etha_ray.kvstore.watch import KeyEvent, Watch

if TYPE_CHECKING:
    from etha_ray.kvstore.etcd import EtcdStore
    from etha_ray.kvstore.gcs import GcsStore
    from etha_ray.kvstore.tcp import TorchTCPStore

__all__ = ["EtcdStore", "GcsStore", "KVStore", "KeyEvent", "Lease", "MemoryStore", "TorchTCPStore", "Watch", "create_store"]

_MODULES = {"EtcdStore": "etcd", "GcsStore": "gcs", "TorchTCPStore": "tcp"}


def __getattr__(name: str) -> object:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
