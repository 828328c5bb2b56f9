"""What goes by communicator, as it lies in one end's memory: messages by rounds, and what is packed before or unpacked after each.

A message is a bucket. One that is a contiguous box of a tensor, in the dtype that travels, is sent from the tensor itself or received into
it; anything else goes through the staging memory of a slot. Both ends cut the same buckets into the same rounds, and each lays them out
as it likes: what is packed at one end may be direct at the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from etha_ray.transport.base import Copy
from etha_ray.transport.buckets import Bucket
from etha_ray.transport.cutting import as_bits
from etha_ray.transport.kernels import KernelProgram, KernelTransport, MessageSums
from etha_ray.transport.nccl import Message
from etha_ray.transport.network.runs import Staged, narrowed
from etha_ray.transport.network.slots import ALIGNMENT, Slot


def cut_into_rounds(sizes: Sequence[int], round_size: int) -> list[range]:
    """Which of the messages, of ``sizes`` bytes, go together: consecutive ones, of at most ``round_size`` bytes with what aligns them.

    A message that is larger goes alone.
    """
    rounds: list[range] = []
    first = filled = 0
    for number, size in enumerate(sizes):
        if number > first and filled + aligned(size) > round_size:
            rounds.append(range(first, number))
            first, filled = number, 0
        filled += aligned(size)
    if sizes:
        rounds.append(range(first, len(sizes)))
    return rounds


def aligned(size: int) -> int:
    """``size`` bytes, and what lies unused before the next message."""
    return -(-size // ALIGNMENT) * ALIGNMENT


@dataclass(frozen=True)
class Loaded:
    """A round, ready to be handed over to a lane of one slot, again and again."""

    messages: list[Message]
    copies: KernelProgram | None
    """What packs it, or unpacks it; None where nothing is staged."""
    sums: MessageSums | None
    """None where it is not checked."""


@dataclass(frozen=True)
class _Place:
    """Where a message lies: in a tensor, or else in the staging memory."""

    tensor: torch.Tensor | None
    offset: int
    nbytes: int

    def within(self, staging: torch.Tensor | None) -> torch.Tensor:
        if self.tensor is not None:
            return self.tensor
        assert staging is not None
        return staging[self.offset : self.offset + self.nbytes]


class Rounds:
    """The messages of a program at one end. Who has it must keep the tensors.

    Args:
        buckets, views, wire: what was cut, from regions that are ``views`` here and travel as ``wire``.
        round_size: of both ends; no more than what a slot's buffer has.
        sends: whether this is the owner's end.
        checked: whether checksums are made.
        slot: the one that is taken first: for this one all is loaded at once.
    """

    def __init__(
        self,
        copier: KernelTransport,
        buckets: Sequence[Bucket],
        views: Sequence[torch.Tensor],
        wire: Sequence[torch.dtype],
        round_size: int,
        slot: Slot,
        *,
        sends: bool,
        checked: bool,
    ) -> None:
        self._copier = copier
        self._sends = sends
        self._checked = checked
        self._rounds = [
            _lay_out(buckets[numbers.start : numbers.stop], views, wire)
            for numbers in cut_into_rounds([bucket.nbytes for bucket in buckets], round_size)
        ]
        self._loaded: dict[tuple[int, int], Loaded] = {}
        self.nbytes = sum(bucket.nbytes for bucket in buckets)
        """Bytes of all messages."""
        self.messages = len(buckets)
        """How many there are."""
        for number in range(len(self)):
            self.load(number, slot)

    def __len__(self) -> int:
        return len(self._rounds)

    def load(self, number: int, slot: Slot) -> Loaded:
        """The round of this number on ``slot``'s lane of this number; made at its first use. On one thread at a time."""
        loaded = self._loaded.get((number, slot.number))
        if loaded is None:
            loaded = self._loaded[number, slot.number] = self._load(number, slot)
        return loaded

    def _load(self, number: int, slot: Slot) -> Loaded:
        places, staged = self._rounds[number]
        staging = slot.buffer(number % len(slot.lanes)) if staged else None
        memory = [place.within(staging) for place in places]
        program = None
        if staging is not None:
            pairs = [(each.view, each.within(staging)) for each in staged]
            program = self._copier.prepare([Copy((view,), within) if self._sends else Copy((within,), view) for view, within in pairs])
        sums = MessageSums(self._copier.accelerator, [[each] for each in memory]) if self._checked else None
        return Loaded([(each.data_ptr(), each.nbytes) for each in memory], program, sums)


def _lay_out(buckets: Sequence[Bucket], views: Sequence[torch.Tensor], wire: Sequence[torch.dtype]) -> tuple[list[_Place], list[Staged]]:
    places: list[_Place] = []
    staged: list[Staged] = []
    filled = 0
    for bucket in buckets:
        members = [(member, narrowed(views[member.region], member)) for member in bucket.members]
        first = members[0][1]
        if bucket.is_direct and first.is_contiguous() and first.dtype == wire[bucket.members[0].region]:
            places.append(_Place(as_bits(first).reshape(-1).view(torch.uint8), 0, bucket.nbytes))
            continue
        places.append(_Place(None, filled, bucket.nbytes))
        staged += [Staged(filled + member.offset, view, wire[member.region]) for member, view in members]
        filled += aligned(bucket.nbytes)
    return places, staged
