"""What a push did."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from etha_ray.report import TransferReport, format_bytes


@dataclass(frozen=True)
class PushReport:
    """One `Publisher.push` as this rank saw it.

    Attributes:
        version: what was pushed.
        seconds: from the call to its return, waiting for replicas included.
        replicas: what crossed to each replica that took it.
        failed: why it did not cross to others, by replica.
    """

    version: int
    seconds: float
    replicas: Mapping[str, TransferReport] = field(default_factory=dict)
    failed: Mapping[str, BaseException] = field(default_factory=dict)

    @property
    def bytes(self) -> int:
        """Bytes that this rank gave to all replicas."""
        return sum(report.bytes for report in self.replicas.values())

    @property
    def move_seconds(self) -> float:
        """Seconds of the replica that took longest; they take at the same time."""
        return max((report.move_seconds for report in self.replicas.values()), default=0.0)

    @property
    def gb_per_s(self) -> float:
        """Bytes over the seconds of the replica that took longest, in 1e9 bytes a second; 0 when nothing moved."""
        return self.bytes / self.move_seconds / 1e9 if self.move_seconds > 0 else 0.0

    def __str__(self) -> str:
        failed = f"; failed: {', '.join(f'{replica} ({error})' for replica, error in self.failed.items())}" if self.failed else ""
        where = ", ".join(self.replicas) or "nobody"
        return f"version {self.version} to {where}: {format_bytes(self.bytes)} in {self.seconds:.3f} s ({self.gb_per_s:.2f} GB/s){failed}"
