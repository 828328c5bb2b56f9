"""A GPU's own transport: copies, casts and checksums of many pieces of memory in one launch."""

from __future__ import annotations

from etha_ray.transport.kernels.sums import MessageSums
from etha_ray.transport.kernels.transport import KernelProgram, KernelTransport

__all__ = ["KernelProgram", "KernelTransport", "MessageSums"]
