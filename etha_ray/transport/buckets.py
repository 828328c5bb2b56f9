"""Many regions cut and grouped into messages of a bounded size: pure functions over frozen data, the same on both ends.

A transport between hosts pays for each message, and needs memory for each that it packs. So regions larger than a bucket are
cut, along their leading dimensions, into boxes that each fill one; smaller ones share buckets. Both ends compute the buckets
from the same regions and need not speak of them.

A bucket's bytes are its members' elements, one member after the other, each in row-major order, without padding. Wider
elements come first, so that every member starts at a multiple of its own itemsize (itemsizes are powers of two).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

DEFAULT_BUCKET_SIZE = 8 << 20
"""Bytes. Large enough that what a message costs is nothing beside its bytes, small enough to balance between streams."""


@dataclass(frozen=True, slots=True)
class Region:
    """What is moved of one tensor: its size per dimension, and the bytes of an element on the wire."""

    size: tuple[int, ...]
    itemsize: int

    @property
    def nbytes(self) -> int:
        """Bytes on the wire."""
        return math.prod(self.size) * self.itemsize


@dataclass(frozen=True, slots=True)
class Member:
    """A box of a region: consecutive elements of it in row-major order."""

    region: int
    """Index of the region."""
    start: tuple[int, ...]
    """Within the region."""
    size: tuple[int, ...]
    offset: int
    """Bytes from the start of the bucket."""
    nbytes: int


@dataclass(frozen=True, slots=True)
class Bucket:
    """What goes in one message."""

    members: tuple[Member, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of all members, which follow one another without a gap."""
        last = self.members[-1]
        return last.offset + last.nbytes

    @property
    def is_direct(self) -> bool:
        """Whether it is one box: where that is contiguous in memory, nothing needs packing."""
        return len(self.members) == 1


def cut_into_buckets(regions: Sequence[Region], bucket_size: int = DEFAULT_BUCKET_SIZE) -> tuple[Bucket, ...]:
    """The buckets of ``regions``, of at most ``bucket_size`` bytes each (of one element, where that is larger).

    Every element is in exactly one bucket. The order follows from the regions alone: by itemsize, widest first, then as
    given. Empty regions are in no bucket.

    Raises ValueError when ``bucket_size`` is less than 1, or an itemsize no power of two.
    """
    if bucket_size < 1:
        raise ValueError(f"bucket_size is {bucket_size} bytes; give at least 1")
    for region in regions:
        if region.itemsize < 1 or region.itemsize & (region.itemsize - 1):
            raise ValueError(f"an itemsize of {region.itemsize} is no power of two")
    buckets: list[Bucket] = []
    shared: list[Member] = []
    filled = 0
    for index in sorted(range(len(regions)), key=lambda index: -regions[index].itemsize):
        region = regions[index]
        for start, size in boxes(region.size, max(1, bucket_size // region.itemsize)):
            nbytes = math.prod(size) * region.itemsize
            if nbytes > bucket_size // 2:
                buckets.append(Bucket((Member(index, start, size, 0, nbytes),)))
                continue
            if filled + nbytes > bucket_size:
                buckets.append(Bucket(tuple(shared)))
                shared, filled = [], 0
            shared.append(Member(index, start, size, filled, nbytes))
            filled += nbytes
    if shared:
        buckets.append(Bucket(tuple(shared)))
    return tuple(buckets)


def boxes(size: tuple[int, ...], limit: int) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Boxes (start, size) of at most ``limit`` elements, in row-major order, each of consecutive elements."""
    count = math.prod(size)
    if not count:
        return
    if count <= limit:
        yield (0,) * len(size), size
        return
    inner = count // size[0]
    if inner <= limit:
        rows = limit // inner
        for first in range(0, size[0], rows):
            yield (first, *(0,) * (len(size) - 1)), (min(rows, size[0] - first), *size[1:])
        return
    for first in range(size[0]):
        for start, rest in boxes(size[1:], limit):
            yield (first, *start), (1, *rest)
