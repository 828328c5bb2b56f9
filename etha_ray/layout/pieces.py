"""Shards that no placement describes: each rank says which box of the global tensor it holds.

For ragged experts, packed projections and the like. A layout of this kind belongs to one tensor, since it has its shape.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from etha_ray.errors import LayoutError
from etha_ray.layout.layout import Reduction
from etha_ray.layout.mesh import ints
from etha_ray.layout.region import Region

Piece = tuple[tuple[int, ...], tuple[int, ...]]
"""``(offsets, sizes)`` of a box in a global tensor, one entry per dimension each."""


@dataclass(frozen=True)
class Pieces:
    """What each rank of a group holds of one tensor, said by the ranks themselves.

    Ranks that say the same box hold replicas of it. On a target boxes may overlap in any way; on a source two boxes must be
    the same or apart, because a region that two ranks hold among other things has no owner whom all ranks would agree on.

    Attributes:
        shape: the tensor's global shape.
        pieces: per rank ``(offsets, sizes)`` of its box, or None for a rank that holds nothing of this tensor.

    Raises:
        LayoutError: there are no ranks, a box has another number of dimensions than the tensor, or lies outside of it.
    """

    shape: tuple[int, ...]
    pieces: tuple[Piece | None, ...]
    _hash: int = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        shape = ints(self.shape, "global_shape")
        if any(size < 0 for size in shape):
            raise LayoutError(f"global_shape {shape} has a dimension below 0")
        if not self.pieces:
            raise LayoutError("a tensor held in explicit pieces needs at least one rank")
        object.__setattr__(self, "shape", shape)
        object.__setattr__(self, "pieces", tuple(_checked(shape, rank, piece) for rank, piece in enumerate(self.pieces)))
        # A cache key for each of its routes; what thousands of ranks hold is hashed once.
        object.__setattr__(self, "_hash", hash((self.shape, self.pieces)))

    def __hash__(self) -> int:
        return self._hash

    @property
    def ranks(self) -> int:
        """How many ranks the group has."""
        return len(self.pieces)

    @property
    def partial(self) -> Reduction | None:
        """Always None: an explicit piece holds values, not contributions to them."""
        return None

    def encode(self) -> str:
        """This layout as text; equal pieces, equal text."""
        boxes = ("-" if piece is None else f"{_text(piece[0])}+{_text(piece[1])}" for piece in self.pieces)
        return f"pieces of {_text(self.shape)}: {' '.join(boxes)}"

    def __str__(self) -> str:
        return f"explicit pieces on {self.ranks} ranks"

    def region(self, index: int, global_shape: Sequence[int]) -> Region:
        """What rank ``index`` holds of the tensor.

        Raises:
            LayoutError: no such rank, or ``global_shape`` is not this tensor's.
        """
        self.check_shape(global_shape)
        if not 0 <= index < self.ranks:
            raise LayoutError(f"there is no rank {index} among the explicit pieces of ranks 0 to {self.ranks - 1}")
        return self._regions[index]

    def check_shape(self, global_shape: Sequence[int]) -> None:
        """Raise `LayoutError` if ``global_shape`` is not this tensor's."""
        if tuple(global_shape) != self.shape:
            raise LayoutError(f"explicit pieces of a tensor of shape {self.shape} cannot be used for one of shape {tuple(global_shape)}")

    def holders(self) -> dict[Piece, tuple[int, ...]]:
        """Each box that holds something, in the order of its first rank, and the ranks that hold it, ascending."""
        return self._holders

    def check_source(self) -> None:
        """Raise `LayoutError` naming two ranks whose boxes overlap without being the same."""
        if self._clash is not None:
            one, other = self._clash
            raise LayoutError(
                f"ranks {one} and {other} hold boxes of a tensor of shape {self.shape} that overlap but are not the same, "
                f"{_shown(self.pieces[one])} and {_shown(self.pieces[other])}: on a source boxes must be the same (replicas) or "
                "apart; register the part that they share as a tensor of its own, or from one of them"
            )

    @cached_property
    def _regions(self) -> tuple[Region, ...]:
        nothing = Region(((),) * len(self.shape))
        return tuple(nothing if piece is None else _region(piece) for piece in self.pieces)

    @cached_property
    def _holders(self) -> dict[Piece, tuple[int, ...]]:
        found: dict[Piece, list[int]] = {}
        for rank, piece in enumerate(self.pieces):
            if piece is not None and 0 not in piece[1]:
                found.setdefault(piece, []).append(rank)
        return {piece: tuple(ranks) for piece, ranks in found.items()}

    @cached_property
    def _clash(self) -> tuple[int, int] | None:
        return next(((self._holders[one][0], self._holders[other][0]) for one, other in _overlaps(list(self._holders))), None)


def _checked(shape: tuple[int, ...], rank: int, piece: Piece | None) -> Piece | None:
    if piece is None:
        if not shape:
            raise LayoutError(f"rank {rank} holds nothing of a tensor without dimensions: every rank of it must hold its one element")
        return None
    offsets, sizes = ints(piece[0], f"offsets of rank {rank}"), ints(piece[1], f"sizes of rank {rank}")
    if len(offsets) != len(shape) or len(sizes) != len(shape):
        raise LayoutError(
            f"rank {rank} holds a piece of offsets {offsets} and sizes {sizes}, but the tensor has shape {shape}: give one of each "
            "per dimension"
        )
    if any(at < 0 or size < 0 or at + size > whole for at, size, whole in zip(offsets, sizes, shape, strict=True)):
        raise LayoutError(f"rank {rank} holds {_shown((offsets, sizes))}, which is not inside a tensor of shape {shape}")
    return offsets, sizes


def _region(piece: Piece) -> Region:
    return Region(tuple(((at, at + size),) if size else () for at, size in zip(*piece, strict=True)))


def _overlaps(boxes: Sequence[Piece]) -> Iterator[tuple[Piece, Piece]]:
    """Pairs of ``boxes`` that share an element: a sweep along the dimension that separates most of them."""
    if not boxes or not boxes[0][0]:
        return
    sweep = max(range(len(boxes[0][0])), key=lambda dim: len({offsets[dim] for offsets, _ in boxes}))
    near: list[Piece] = []
    for box in sorted(boxes, key=lambda box: box[0][sweep]):
        near = [other for other in near if other[0][sweep] + other[1][sweep] > box[0][sweep]]
        yield from ((other, box) for other in near if _meet(other, box))
        near.append(box)


def _meet(one: Piece, other: Piece) -> bool:
    return all(at < start + size and start < at + length for at, length, start, size in zip(*one, *other, strict=True))


def _text(values: Sequence[int]) -> str:
    return "x".join(map(str, values))


def _shown(piece: Piece | None) -> str:
    if piece is None:
        return "nothing"
    return "[" + ", ".join(f"{at}:{at + size}" for at, size in zip(*piece, strict=True)) + "]"
