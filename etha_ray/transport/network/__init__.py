"""Reading tensors of another host's agent, by TCP or NCCL: one-sided, as on one host. Only the receiving agent's worker waits.

The owner makes tensors readable by a name (`NetworkTransport.export`); its server does the rest. A reader describes what it
wants as `Read`, prepares a program once, and runs it any number of times. Both cut the same list of regions into the same
buckets (`etha_ray.transport.buckets`), so a request is two numbers and an answer is bytes.

Each end lays a bucket out as it likes: what is contiguous, or has runs long enough, goes by `sendmsg` and `recvmsg` straight
from and into the tensors (`runs`); only short strided runs and casts pass through staging memory, which is bounded
(`staging`). A reader has one channel to each owner, whose heartbeats say whether it lives (`session`), and several streams, which
share the buckets of all its running programs (`streams`); `exports` is the owner's side.

What lies in the memory of a device at both ends (`device`) goes by a communicator instead, in rounds of buckets (`rounds`), which the
owner's end sends (`giving`) and the reader's receives (`taking`), one run after the other on a thread of its own (`joining`).
"""

from __future__ import annotations

from etha_ray.transport.network.device import Path
from etha_ray.transport.network.exports import Export
from etha_ray.transport.network.parts import Read, RemoteRegion
from etha_ray.transport.network.program import NetworkProgram
from etha_ray.transport.network.transport import DEFAULT_MEMORY_BUDGET, NetworkTransport

__all__ = ["DEFAULT_MEMORY_BUDGET", "Export", "NetworkProgram", "NetworkTransport", "Path", "Read", "RemoteRegion"]
