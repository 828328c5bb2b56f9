"""Reading tensors of another host's agent over TCP: one-sided, as on one host. Only the receiving agent's worker waits.

The owner makes tensors readable by a name (`NetworkTransport.export`); its server does the rest. A reader describes what it
wants as `Read`, prepares a program once, and runs it any number of times. Both cut the same list of regions into the same
buckets (`etha_ray.transport.buckets`), so a request is two numbers and an answer is bytes.

Each end lays a bucket out as it likes: what is contiguous, or has runs long enough, goes by `sendmsg` and `recvmsg` straight
from and into the tensors (`runs`); only short strided runs and casts pass through staging memory, which is bounded
(`staging`). A reader has one channel to each owner, whose heartbeats say whether it lives, and several streams, which share
the buckets of all its running programs (`session`); `exports` is the owner's side.
"""

from __future__ import annotations

from etha_ray.transport.network.exports import Export
from etha_ray.transport.network.program import NetworkProgram, Read, RemoteRegion
from etha_ray.transport.network.transport import DEFAULT_MEMORY_BUDGET, NetworkTransport

__all__ = ["DEFAULT_MEMORY_BUDGET", "Export", "NetworkProgram", "NetworkTransport", "Read", "RemoteRegion"]
