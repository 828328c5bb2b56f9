"""Copies as the table that ``copy_regions`` works from: pure functions of addresses, sizes and strides.

A *region* is a box of *units*, one of which a thread moves by one load and one store: 1 to 16 bytes, as many as runs, strides
and addresses of both sides allow; or one element to be cast, or `PACK` of them.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch

from etha_ray.transport.kernels.source import CAST, DIMS, IN_PACKS, PACK, TILE

REGION = np.dtype(
    [
        *((name, "<u8") for name in ("source", "target")),
        *((name, "<u4") for name in ("units", "kind", "dims", "unused")),
        ("sizes", "<u4", (DIMS,)),
        *((name, "<i8", (DIMS,)) for name in ("source_steps", "target_steps")),
    ]
)
"""As ``struct Region`` of kernels.cu."""

_WIDEST = 16
_MOST_UNITS = (1 << 31) - 1  # the kernel counts units of a region in 32 bits
_KNOWN = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}

_Dim: TypeAlias = "tuple[int, int, int]"
"""Size, and the steps of the source and of the target: in bytes."""


@dataclass(frozen=True, slots=True)
class Region:
    """A box of units. ``dims``: innermost first, at least one."""

    source: int
    target: int
    kind: int
    dims: tuple[_Dim, ...]

    @property
    def units(self) -> int:
        """How many it has."""
        return math.prod(size for size, _, _ in self.dims)


def regions_of(source: torch.Tensor, target: torch.Tensor) -> list[Region] | None:
    """What copies ``source`` to ``target``, of its shape: bytes where the dtypes agree, else values.

    None where the kernel cannot: an unknown dtype, elements that do not lie at multiples of their size, too many dimensions.
    """
    if not target.numel():
        return []
    dims = _merged(zip(target.shape, _bytes(source), _bytes(target), strict=True))
    regions: list[Region] | None
    if source.dtype == target.dtype:
        regions = _plain(source.data_ptr(), target.data_ptr(), dims, source.itemsize)
    elif source.dtype in _KNOWN and target.dtype in _KNOWN:
        regions = _casts(source, target, dims)
    else:
        return None
    if regions is None or any(len(region.dims) > DIMS for region in regions):
        return None
    return [part for region in regions for part in _parts(region)]


def table_of(regions: Sequence[Region]) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """The regions as an array of `REGION`, and the number of tiles before each and, last, of all (int64)."""
    rows = np.array([_row(region) for region in regions], REGION)
    first = np.zeros(len(regions) + 1, np.int64)
    np.cumsum(-(-rows["units"].astype(np.int64) // TILE), out=first[1:])
    return rows, first


def _row(region: Region) -> tuple[Any, ...]:
    sizes, sources, targets = zip(*region.dims, *[(1, 0, 0)] * (DIMS - len(region.dims)), strict=True)
    return region.source, region.target, region.units, region.kind, len(region.dims), 0, sizes, sources, targets


def _bytes(tensor: torch.Tensor) -> Iterator[int]:
    return (step * tensor.itemsize for step in tensor.stride())


def _merged(dims: Iterable[_Dim]) -> list[_Dim]:
    """As few dimensions as the steps of both allow, outermost first, in the target's order: threads side by side write side by side."""
    merged: list[_Dim] = []
    for size, source, target in sorted((dim for dim in dims if dim[0] > 1), key=lambda dim: (dim[2], dim[1]), reverse=True):
        if merged and merged[-1][1:] == (size * source, size * target):
            merged[-1] = (merged[-1][0] * size, source, target)
        else:
            merged.append((size, source, target))
    return merged


# ----------------------------------------------------------------------------------------------------------------- bytes


def _plain(source: int, target: int, dims: list[_Dim], itemsize: int) -> list[Region]:
    if dims and dims[-1][1:] == (itemsize, itemsize):
        *outer, (count, _, _) = dims
        run = count * itemsize
    else:
        outer, run = dims, itemsize
    steps = (step for _, *both in outer for step in both)
    width = math.gcd(_WIDEST, run, source, target, *steps)
    peeled = math.gcd(_WIDEST, source - target)
    if outer or peeled == width or run // width <= TILE:
        return [_run(source, target, run, width, outer)]
    # A long run whose sides are equally far from a boundary: all between its first boundary and its last is moved in wide units.
    head = -source % peeled
    cuts = itertools.pairwise((0, head, run - (run - head) % peeled, run))
    parts = ((source + start, target + start, stop - start) for start, stop in cuts if stop > start)
    return [_run(*part, math.gcd(_WIDEST, *part), []) for part in parts]


def _run(source: int, target: int, run: int, width: int, outer: list[_Dim]) -> Region:
    inner = [(run // width, width, width)] if run > width or not outer else []
    return Region(source, target, width.bit_length() - 1, (*inner, *reversed(outer)))


# ----------------------------------------------------------------------------------------------------------------- casts


def _casts(source: torch.Tensor, target: torch.Tensor, dims: list[_Dim]) -> list[Region] | None:
    sizes = source.itemsize, target.itemsize
    places = source.data_ptr(), target.data_ptr()
    if any(place % size for place, size in zip(places, sizes, strict=True)):
        return None
    kind = CAST | _KNOWN[source.dtype] << 2 | _KNOWN[target.dtype]
    *outer, (count, *steps) = dims or [(1, *sizes)]
    wide = all(
        not step % min(_WIDEST, PACK * size)
        for size, place, *outer_steps in zip(sizes, places, *(dim[1:] for dim in outer), strict=True)
        for step in (place, *outer_steps)
    )
    packed, rest = divmod(count, PACK)
    if not wide or tuple(steps) != sizes or not packed or (rest and outer):
        return [Region(*places, kind, ((count, steps[0], steps[1]), *reversed(outer)))]
    regions = [Region(*places, kind | IN_PACKS, ((packed, PACK * sizes[0], PACK * sizes[1]), *reversed(outer)))]
    if rest:
        done = packed * PACK
        regions.append(Region(places[0] + done * sizes[0], places[1] + done * sizes[1], kind, ((rest, *sizes),)))
    return regions


# ----------------------------------------------------------------------------------------------------------------- limits


def _parts(region: Region) -> Iterator[Region]:
    """``region`` cut along its outermost dimension until no part has more units than the kernel counts."""
    if region.units <= _MOST_UNITS:
        yield region
        return
    *inner, (size, source, target) = region.dims
    rows = max(1, _MOST_UNITS // (region.units // size))
    for start in range(0, size, rows):
        count = min(rows, size - start)
        dims = (*inner, (count, source, target)) if count > 1 or not inner else tuple(inner)
        yield from _parts(Region(region.source + start * source, region.target + start * target, region.kind, dims))
