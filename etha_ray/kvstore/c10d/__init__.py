"""Key-value stores for code that knows torch's, torch elastic's or MindSpore's: the same names and behaviour, on backends of ours.

- `C10dStore` is any `KVStore` as a `torch.distributed.Store`, for process groups.
- `EtcdStore` is torch elastic's class of that name, on etcd's v3 API.
- `TCPStore` is MindSpore's ``mint.distributed.TCPStore``.
"""

from __future__ import annotations

from etha_ray.kvstore.c10d.errors import C10dLookupError, C10dQueueEmptyError, C10dTimeoutError, C10dUnavailableError
from etha_ray.kvstore.c10d.etcd import EtcdStore
from etha_ray.kvstore.c10d.store import C10dStore
from etha_ray.kvstore.c10d.tcp import TCPStore

__all__ = [
    "C10dLookupError",
    "C10dQueueEmptyError",
    "C10dStore",
    "C10dTimeoutError",
    "C10dUnavailableError",
    "EtcdStore",
    "TCPStore",
]
