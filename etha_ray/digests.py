"""Digests of global tensors that do not depend on how ranks hold them, and take no gathering.

A digest is made of sums over all elements, so ranks may add up what they hold in any order: each element's bits and its index in the
global tensor, in row-major order, are mixed to 64 bits h, and summed are h and h², modulo 2⁶⁴. Of an element that several ranks hold
the first rank's is summed (`owned`). The digest is XXH3 of the sums, the dtype and the global shape.

It finds faults: a changed, swapped or missing element. It is no cryptographic hash, and who wants to can make two tensors that
have the same. Equal digests mean equal bits: 0.0 and -0.0 differ, as do values in two dtypes.
"""

from __future__ import annotations

import itertools
import math
import mmap
from collections.abc import Iterator, Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
import xxhash

from etha_ray.layout import Layout, Pieces
from etha_ray.transport.buckets import boxes
from etha_ray.transport.cutting import as_bits

Box: TypeAlias = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]
"""``(global_start, local_start, size)``."""

Sums: TypeAlias = "np.ndarray[Any, np.dtype[np.uint64]]"
"""Σh, Σh², and how many elements they are of. Those of parts are added."""

_ELEMENTS = 32 << 10  # of which all that is computed stays in the cache
_MOVED_ELEMENTS = 4 << 20  # that come from a GPU at a time
_STEP = np.uint64(0x9E3779B97F4A7C15)  # odd: no two indices are the same multiple of it
_MIX = np.uint64(0xFF51AFD7ED558CCD), np.uint64(0xC4CEB9FE1A85EC53)  # of MurmurHash3's 64-bit finaliser
_SHIFT = np.uint64(33)


def owned(layout: Layout | Pieces, index: int, shape: Sequence[int]) -> list[Box]:
    """The boxes of a tensor of ``shape`` that mesh position ``index`` adds up: of all positions together each held element once.

    Raises:
        LayoutError: no such position, or the layout does not fit the shape.
    """
    region = layout.region(index, shape)
    if isinstance(layout, Layout):
        return [] if layout.replicas(index)[0] != index else list(region.boxes())
    found = list(region.boxes())
    for piece in layout.pieces[:index]:
        if piece is not None:
            found = [part for box in found for part in _without(box, *piece)]
    return found


def sums(tensor: torch.Tensor, shape: Sequence[int], owned_boxes: Sequence[Box]) -> Sums:
    """What the boxes of a local ``tensor``, on any device and of any strides, add to the sums of a global one of ``shape``.

    What is on a GPU comes to the CPU a piece at a time, so that there is never a second tensor.
    """
    total = np.zeros(3, dtype=np.uint64)
    bits = as_bits(tensor)
    if bits.is_complex():  # 16 bytes: two words for each element
        bits, shape = torch.view_as_real(bits).view(torch.int64), (*shape, 2)
        owned_boxes = [((*first, 0), (*at, 0), (*size, 2)) for first, at, size in owned_boxes]
    # Memory that goes back at once: of the allocator's, each thread's arena would keep some.
    scratch = np.frombuffer(mmap.mmap(-1, 2 * 8 * max(1, min(bits.numel(), _ELEMENTS))), dtype=np.uint64).reshape(2, -1)
    with np.errstate(over="ignore"):
        for first, at, size in owned_boxes:
            for moved, piece in boxes(size, _MOVED_ELEMENTS):
                words = bits[_slices(at, moved, piece)].cpu().numpy().view(f"u{bits.itemsize}")
                begin = [a + s for a, s in zip(first, moved, strict=True)]
                for start, part in boxes(piece, _ELEMENTS):
                    _add(
                        total,
                        words[_slices(start, (0,) * len(part), part)],
                        [a + s for a, s in zip(begin, start, strict=True)],
                        shape,
                        scratch,
                    )
    return total


def _slices(at: Sequence[int], start: Sequence[int], size: Sequence[int]) -> tuple[slice, ...]:
    return tuple(slice(a + s, a + s + n) for a, s, n in zip(at, start, size, strict=True))


def digest(total: Sums, dtype: torch.dtype, shape: Sequence[int]) -> str:
    """The digest of a tensor from the sums over all its elements: 32 hexadecimal digits."""
    text = f"{dtype} {list(shape)} {' '.join(map(str, total.tolist()))}"
    return xxhash.xxh3_128_hexdigest(text.encode())


def elements(dtype: torch.dtype, shape: Sequence[int]) -> int:
    """How many elements `sums` counts of a whole tensor."""
    return math.prod(shape) * (2 if dtype.itemsize == 16 else 1)


def _add(total: Sums, words: Any, start: Sequence[int], shape: Sequence[int], scratch: Any) -> None:
    """Add what these words give, which begin at ``start`` of the global tensor. ``scratch``: two rows of at least as many words."""
    flat, shifted = scratch[:, : words.size]
    flat.fill(0)
    mixed = flat.reshape(words.shape)
    stride = 1
    for dim in reversed(range(len(shape))):
        index = np.arange(start[dim], start[dim] + words.shape[dim], dtype=np.uint64) * (np.uint64(stride % 2**64) * _STEP)
        mixed += index.reshape(-1, *(1,) * (len(shape) - 1 - dim))
        stride *= shape[dim]
    mixed = np.add(mixed, words, out=mixed).reshape(-1)
    for factor in _MIX:
        np.bitwise_xor(mixed, np.right_shift(mixed, _SHIFT, out=shifted), out=mixed)
        np.multiply(mixed, factor, out=mixed)
    np.bitwise_xor(mixed, np.right_shift(mixed, _SHIFT, out=shifted), out=mixed)
    total += np.array([mixed.sum(), np.multiply(mixed, mixed, out=shifted).sum(), mixed.size], dtype=np.uint64)


def _without(box: Box, offsets: Sequence[int], sizes: Sequence[int]) -> Iterator[Box]:
    """The parts of ``box`` outside of another one."""
    first, at, size = box
    low = [max(a, b) for a, b in zip(first, offsets, strict=True)]
    high = [min(a + n, b + m) for a, n, b, m in zip(first, size, offsets, sizes, strict=True)]
    if any(one >= two for one, two in zip(low, high, strict=True)):
        yield box
        return
    cuts = [((a, lo), (lo, hi), (hi, a + n)) for a, n, lo, hi in zip(first, size, low, high, strict=True)]
    inside = tuple(cut[1] for cut in cuts)
    for part in itertools.product(*cuts):
        if part != inside and all(one < two for one, two in part):
            yield (
                tuple(one for one, _ in part),
                tuple(a + one - f for a, (one, _), f in zip(at, part, first, strict=True)),
                tuple(two - one for one, two in part),
            )
