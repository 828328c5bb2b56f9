"""What goes from whom to whom: the data that a plan is made of."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

Segment = tuple[int, int, int]
"""``(source_start, target_start, size)`` along one dimension, in local coordinates."""


@dataclass(frozen=True, order=True)
class Box:
    """One rectangular piece: where it starts in the source's and in the target's own local tensor, and its size."""

    source_start: tuple[int, ...]
    target_start: tuple[int, ...]
    size: tuple[int, ...]

    @property
    def numel(self) -> int:
        """How many elements the box has; 1 for a tensor without dimensions."""
        return math.prod(self.size)


@dataclass(frozen=True, order=True)
class Route:
    """Everything that mesh position ``source`` gives to mesh position ``target``.

    Where the source side is Partial, every one of ``sources`` gives its contribution: the same boxes, at the same places of
    its own local tensor. The target combines them in this order by the `Reduction` of the source's layout, whose ``partial``
    it is, and divides once by its divisor.

    Attributes:
        boxes: the pieces, ascending, as few as can be; empty only where there is nothing to give.
        numel: elements in all boxes together; what each of the sources gives.
        others: the contributors after ``source``, in the order of their mesh coordinates; empty but for Partial.
        relay: the target position that passes this on: it gets the same boxes from the same sources, and holds them at the same
            places of its local tensor. None where the target reads from the sources.
    """

    source: int
    target: int
    boxes: tuple[Box, ...]
    numel: int
    others: tuple[int, ...] = ()
    relay: int | None = None

    @property
    def sources(self) -> tuple[int, ...]:
        """All that it comes from: one, or every contributor of a Partial."""
        return (self.source, *self.others)


def paired_route(index: int, local_shape: Sequence[int]) -> Route:
    """The route of a pair without meshes: position ``index`` gives its whole local tensor to position ``index``."""
    size = tuple(local_shape)
    start = (0,) * len(size)
    numel = math.prod(size)
    return Route(index, index, (Box(start, start, size),) if numel else (), numel)
