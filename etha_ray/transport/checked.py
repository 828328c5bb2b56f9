"""A transport within one host whose copies are looked at once more when they are done.

Nothing travels there, so this is off unless asked for. Both ends are at hand, so no checksum is needed: source and target are
compared, bit for bit, where the target is. What is cast or combined on its way is computed once more, a part at a time, and compared
with that; only a NaN may then be another one.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from etha_ray.errors import IntegrityError
from etha_ray.transport.base import Capabilities, Copy, CopyProgram, OneSidedTransport
from etha_ray.transport.computing import combine, valued
from etha_ray.transport.cutting import as_bits, plain_pieces, slabs

_PIECE_BYTES = 256 << 10
_DEVICE_ELEMENTS = 16 << 20
_COMPUTED_ELEMENTS = 1 << 20


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
        """As in the interface. Raises `IntegrityError` when a target does not hold what its sources make."""
        self._wrong = None
        count = self._program.run()
        wrong = _wrong(self._copies)
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


def _wrong(copies: Sequence[Copy]) -> list[int]:
    """The places of the copies whose target does not hold what its sources make."""
    wrong: list[int] = []
    places: list[int] = []
    found: list[torch.Tensor] = []
    for place, copy in enumerate(copies):
        if not copy.target.numel():
            continue
        if not copy.is_plain:
            differences = computed_otherwise(copy)
            places += [place] * len(differences)
            found += differences
        elif copy.target.device.type == copy.sources[0].device.type == "cpu":
            if not _equal(copy):
                wrong.append(place)
        else:
            differences = differing(copy.target, copy.sources[0])
            places += [place] * len(differences)
            found += differences
    # The devices compare one after the other and are waited for once.
    for device in {flag.device for flag in found}:
        here = [(place, flag) for place, flag in zip(places, found, strict=True) if flag.device == device]
        differ = torch.stack([flag for _, flag in here]).cpu().tolist()
        wrong += [place for (place, _), differs in zip(here, differ, strict=True) if differs]
    return sorted(set(wrong))


def differing(target: torch.Tensor, source: torch.Tensor) -> list[torch.Tensor]:
    """For parts of ``target``, a truth value each on its device: whether it has other bits than that part of ``source``."""
    flags = []
    for ours, theirs in slabs((as_bits(target), as_bits(source)), _DEVICE_ELEMENTS):
        one, other = (_as_integers(each) for each in (ours, theirs.to(ours.device)))
        flags.append(one.ne(other).any())
    return flags


def computed_otherwise(copy: Copy) -> list[torch.Tensor]:
    """For parts of a target that is cast or combined, a truth value each on its device: whether it holds anything else."""
    flags = []
    for target, *sources in slabs((copy.target, *(valued(source, copy.target) for source in copy.sources)), _COMPUTED_ELEMENTS):
        expected = torch.empty(target.shape, dtype=target.dtype, device=target.device)
        if copy.op is None:
            expected.copy_(sources[0])
        else:
            combine((expected, *sources), copy.op, copy.divisor)
        flags.append(_other_values(expected, target).any())
    return flags


def _other_values(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    if one.is_complex():
        one, other = torch.view_as_real(one), torch.view_as_real(other)
    differ = as_bits(one).ne(as_bits(other))
    if one.dtype.is_floating_point:  # as float32, for torch knows few things of the small ones
        differ &= ~(one.float().isnan() & other.float().isnan())
    return differ


def _equal(copy: Copy) -> bool:
    pieces = plain_pieces(copy.target, copy.sources[0], _PIECE_BYTES)
    return all(np.array_equal(_as_integers(target).numpy(), _as_integers(source).numpy()) for target, source in pieces)


def _as_integers(piece: torch.Tensor) -> torch.Tensor:
    """Whose comparison is that of the bits: no NaN differs from itself."""
    return torch.view_as_real(piece).view(torch.int64) if piece.is_complex() else piece
