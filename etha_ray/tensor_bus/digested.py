"""What one rank adds up for the digests of a pair's tensors, and what comes of all ranks' sums."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from etha_ray import digests
from etha_ray.errors import LayoutError
from etha_ray.layout import Layout, Pieces
from etha_ray.tensor_bus.agreement import Held


@dataclass(frozen=True)
class Digested:
    """One pair's tensors of a batch: where they are among the batch's, and who holds them. ``members``: registrations, by mesh index."""

    pair_name: str
    places: Sequence[int]
    tensors: Sequence[torch.Tensor]
    held: Sequence[Held]
    index: int
    members: Sequence[str]

    def partial(self) -> int | None:
        """The place of a tensor that has no value of its own, as ranks hold contributions to it."""
        sides = zip(self.places, self.held, strict=True)
        return next((place for place, held in sides if held.side is not None and held.side.layout.partial is not None), None)

    def added_up(self) -> bytes:
        """What this rank adds to the sums of each tensor."""
        rows = []
        for tensor, held in zip(self.tensors, self.held, strict=True):
            layout: Layout | Pieces = Layout.whole() if held.side is None else held.side.layout
            index = 0 if held.side is None else self.index
            rows.append(digests.sums(tensor, held.shape, digests.owned(layout, index, held.shape)))
        return np.stack(rows).tobytes()

    def digests(self, parts: dict[str, bytes], own: str) -> dict[int, str]:
        """Of each tensor, by its place, from what all ranks added up, by registration; without meshes each rank's are its own."""
        count = len(self.held)
        rows = {member: np.frombuffer(parts[member], dtype=np.uint64).reshape(count, 3) for member in self.members}
        found = {}
        for position, (place, held) in enumerate(zip(self.places, self.held, strict=True)):
            whose = [own] if held.side is None else self.members
            total = np.stack([rows[member][position] for member in whose]).sum(axis=0, dtype=np.uint64)
            whole = digests.elements(held.dtype, held.shape)
            if int(total[2]) != whole:
                raise LayoutError(
                    f"tensor {place}: the ranks of this side hold {int(total[2])} of its {whole} elements, which have no digest"
                )
            found[place] = digests.digest(total, held.dtype, held.shape)
        return found
