"""What a transfer did: bytes, seconds, and where the time went."""

from __future__ import annotations

from typing import Literal

import msgspec


class Span(msgspec.Struct, frozen=True):
    """One stretch of a transfer's time, in seconds from its start."""

    name: str
    start: float
    seconds: float


class TransferReport(msgspec.Struct, frozen=True):
    """The outcome of one completed transfer of one batch, as one worker's agent saw it.

    Attributes:
        batch_id: the batch that was transferred.
        direction: "send" or "recv".
        bytes: bytes that this rank gave ("send") or got ("recv").
        seconds: from the agent taking the command to its completion, waiting for the other side included.
        move_seconds: of these, the seconds in which bytes moved.
        spans: where the time went, in order.
        peers: bytes per member of the other side, by "name[index]".
        version: which version of the batch was sent or received; see `BatchHandler.version`.
    """

    batch_id: str
    direction: Literal["send", "recv"]
    bytes: int
    seconds: float
    move_seconds: float
    spans: tuple[Span, ...] = ()
    peers: dict[str, int] = {}
    version: int = 0

    @property
    def gb_per_s(self) -> float:
        """Bytes over the seconds in which they moved, in 1e9 bytes a second; 0 when nothing moved."""
        return self.bytes / self.move_seconds / 1e9 if self.move_seconds > 0 else 0.0

    def __str__(self) -> str:
        where = ", ".join(f"{span.name} {_milliseconds(span.seconds)}" for span in self.spans)
        return (
            f"{self.direction} {self.batch_id} v{self.version}: {format_bytes(self.bytes)} in {_milliseconds(self.seconds)}"
            f" ({self.gb_per_s:.2f} GB/s while moving; {where or 'no spans'})"
        )


def _milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:.2f} ms" if seconds < 1 else f"{seconds:.2f} s"


def format_bytes(count: int) -> str:
    """``count`` bytes in the largest decimal unit that keeps the number at or above 1."""
    value = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.2f} {unit}"
        value /= 1000
    return f"{value:.2f} TB"
