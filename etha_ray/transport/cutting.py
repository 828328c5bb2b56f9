"""Copies cut into pieces: views of one shape, merged into as few dimensions as their strides allow, and cut alike.

Everything here is done once, when a program is prepared; a piece is what one call then moves.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TypeAlias

import torch

Views: TypeAlias = tuple[torch.Tensor, ...]
"""The target, then the sources."""

_LINE_BYTES = 64
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64, 16: torch.complex128}
_WIDER = (torch.complex128, torch.int64, torch.int32, torch.int16)


def plain_pieces(target: torch.Tensor, source: torch.Tensor, limit: int) -> list[Views]:
    """The copy as pieces of equal bits, of at most ``limit`` bytes, in elements as wide as they can be."""
    views: Views = as_bits(target), as_bits(source)
    if all(view.is_contiguous() for view in views):
        views = views[0].view(-1), views[1].view(-1)
    else:
        views = _widened(*_merged(views))
    return _pieces(views, limit // views[0].itemsize)


def computed_pieces(views: Views, limit: int) -> list[Views]:
    """The views as pieces of at most ``limit`` elements, in their own dtypes."""
    if all(view.is_contiguous() for view in views):
        return _pieces(tuple(view.detach().view(-1) for view in views), limit)
    return _pieces(_merged(tuple(view.detach() for view in views)), limit)


def slabs(views: Views, limit: int) -> list[Views]:
    """The views, which are not empty, as parts of at most ``limit`` elements, in their own dtypes, cut along leading dimensions only.

    For a GPU, whose calls cost more than its caches gain from strips.
    """
    parts: list[Views] = []
    _cut(_merged(tuple(view.detach() for view in views)), limit, parts)
    return parts


def grouped(pieces: Sequence[Views], most_bytes: int, most: int) -> Iterator[tuple[list[torch.Tensor], list[torch.Tensor]]]:
    """Targets and sources of pieces with one source, by groups of about ``most_bytes`` and at most ``most`` pieces."""
    targets: list[torch.Tensor] = []
    sources: list[torch.Tensor] = []
    size = 0
    for target, source in pieces:
        targets.append(target)
        sources.append(source)
        size += max(target.nbytes, source.nbytes)
        if size >= most_bytes or len(targets) == most:
            yield targets, sources
            targets, sources, size = [], [], 0
    if targets:
        yield targets, sources


def _pieces(views: Views, limit: int) -> list[Views]:
    pieces: list[Views] = []
    if views[0].dim() > 1 and views[0].stride(-1) == 1 and any(source.stride(-1) != 1 for source in views[1:]):
        # A transposition touches a line of the source for each element. Strips one target line wide use each source
        # line up while it is cached: five times as fast as row after row.
        for strip in _split(views, _LINE_BYTES // views[0].itemsize, -1):
            _cut(strip, limit, pieces)
    else:
        _cut(views, limit, pieces)
    return pieces


def _cut(views: Views, limit: int, pieces: list[Views]) -> None:
    """Append the views, cut along the leading dimensions into pieces of at most ``limit`` elements."""
    target = views[0]
    if target.numel() <= limit:
        pieces.append(views)
        return
    rows = limit // (target.numel() // len(target))
    if rows:
        pieces.extend(_split(views, rows, 0))
        return
    for inner in zip(*views, strict=True):
        _cut(inner, limit, pieces)


def _split(views: Views, size: int, dim: int) -> Iterator[Views]:
    return zip(*(torch.split(view, size, dim) for view in views), strict=True)


def as_bits(tensor: torch.Tensor) -> torch.Tensor:
    """The same memory as a type that both torch and NumPy copy bit for bit (NumPy has no bfloat16 nor float8)."""
    return tensor.detach().view(_BITS[tensor.dtype.itemsize])


def _merged(views: Views) -> Views:
    """The same elements over as few dimensions as the strides of all allow, at least one, in the target's order."""
    dims = [dim for dim in zip(views[0].shape, *(view.stride() for view in views), strict=True) if dim[0] > 1]
    dims.sort(key=lambda dim: dim[1:], reverse=True)  # by the target's stride first
    merged: list[tuple[int, ...]] = []
    for size, *steps in dims:
        if merged and all(outer == size * step for outer, step in zip(merged[-1][1:], steps, strict=True)):
            merged[-1] = (merged[-1][0] * size, *steps)
        else:
            merged.append((size, *steps))
    sizes, *strides = zip(*(merged or [(1,) * (1 + len(views))]), strict=True)
    return tuple(view.as_strided(sizes, stride) for view, stride in zip(views, strides, strict=True))


def _widened(target: torch.Tensor, source: torch.Tensor) -> Views:
    """The same bytes in wider elements where the innermost runs of both allow: narrow runs cost per element."""
    if source.stride(-1) == 1 and target.stride(-1) == 1:
        for dtype in _WIDER:
            if dtype.itemsize > source.itemsize and _can_widen(source, dtype) and _can_widen(target, dtype):
                return _merged((target.view(dtype), source.view(dtype)))
    return target, source


def _can_widen(tensor: torch.Tensor, dtype: torch.dtype) -> bool:
    ratio = dtype.itemsize // tensor.itemsize
    places = (tensor.shape[-1], tensor.storage_offset(), *tensor.stride()[:-1])
    return all(place % ratio == 0 for place in places) and tensor.data_ptr() % dtype.itemsize == 0
