"""How bytes get from one rank's buffers to another's: `MappedTransport` on one host."""

from __future__ import annotations

from etha_ray.transport.base import Capabilities, Copy, CopyProgram, OneSidedTransport
from etha_ray.transport.mapped import MappedTransport

__all__ = ["Capabilities", "Copy", "CopyProgram", "MappedTransport", "OneSidedTransport"]
