"""A transport within one host whose copies are looked at once more when they are done.

Nothing travels there, so this is off unless asked for. Both ends are at hand, so no checksum is needed: source and target are
compared, bit for bit. What is cast or combined on its way has no bits in common with its sources, and is not compared.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from etha_ray.errors import IntegrityError
from etha_ray.transport.base import Capabilities, Copy, CopyProgram, OneSidedTransport
from etha_ray.transport.cutting import plain_pieces

_PIECE_BYTES = 256 << 10


class CheckedTransport(OneSidedTransport):
    """Copies as ``transport`` does, and compares. Closing it closes that one."""

    def __init__(self, transport: OneSidedTransport) -> None:
        self._transport = transport

    @property
    def capabilities(self) -> Capabilities:
        return self._transport.capabilities

    def prepare(self, copies: Sequence[Copy]) -> CopyProgram:
        return _CheckedProgram(self._transport.prepare(copies), copies)

    def close(self) -> None:
        self._transport.close()

    def __repr__(self) -> str:
        return f"CheckedTransport({self._transport!r})"


class _CheckedProgram(CopyProgram):
    def __init__(self, program: CopyProgram, copies: Sequence[Copy]) -> None:
        self._program = program
        self._copies = copies
        self._wrong: frozenset[int] | None = None

    @property
    def nbytes(self) -> int:
        return self._program.nbytes

    def run(self) -> int:
        """As in the interface. Raises `IntegrityError` when a target has other bits than its source."""
        self._wrong = None
        count = self._program.run()
        wrong = [place for place, copy in enumerate(self._copies) if copy.is_plain and not _equal(copy)]
        if wrong:
            self._wrong = frozenset(wrong)
            first = self._copies[wrong[0]].name or f"copy {wrong[0]}"
            more = f" (and {len(wrong) - 1} more copies)" if len(wrong) > 1 else ""
            raise IntegrityError(
                f"{first}{more}: what was copied is not what its source holds (memory failed, or somebody wrote to one of both meanwhile)"
            )
        return count

    def unfinished(self) -> frozenset[int] | None:
        """As in the interface."""
        return self._program.unfinished() if self._wrong is None else self._wrong


def _equal(copy: Copy) -> bool:
    if not copy.target.numel():
        return True
    pieces = plain_pieces(copy.target, copy.sources[0], _PIECE_BYTES)
    return all(np.array_equal(_integers(target), _integers(source)) for target, source in pieces)


def _integers(piece: torch.Tensor) -> Any:
    """Whose comparison is that of the bits: no NaN differs from itself."""
    return (torch.view_as_real(piece).view(torch.int64) if piece.is_complex() else piece).numpy()
