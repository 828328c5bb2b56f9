"""Two processes, each with a device, and what carries bytes from one device to the other: NCCL, through cupy.

`communicator` says what is asked of it, `cupy_nccl` is NCCL; the tests have another one that records what it is asked.
"""

from __future__ import annotations

from etha_ray.transport.nccl.communicator import Communicator, Communicators, Message

__all__ = ["Communicator", "Communicators", "Message"]
