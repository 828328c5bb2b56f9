"""What torch computes where a copy is more than moving bytes: casts, and combinations of contributions."""

from __future__ import annotations

from collections.abc import Callable

import torch

from etha_ray.dtypes import combine_dtype
from etha_ray.transport.cutting import Views

_COMBINE: dict[str, Callable[[torch.Tensor, torch.Tensor], object]] = {
    "sum": torch.Tensor.add_,
    "product": torch.Tensor.mul_,
    "max": lambda total, other: torch.maximum(total, other, out=total),
    "min": lambda total, other: torch.minimum(total, other, out=total),
}


def valued(source: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """The part of ``source`` that a cast to the target's dtype reads: torch drops imaginary parts too, but with a warning."""
    if source.dtype.is_complex and not target.dtype.is_complex and target.dtype != torch.bool:
        return torch.view_as_real(source.detach())[..., 0]
    return source


def combine(piece: Views, op: str, divisor: int) -> None:
    """Write one piece of a target from the contributions to it, by way of scratch of its size where the target is."""
    target, first, *others = piece
    total = torch.empty(target.shape, dtype=combine_dtype(first.dtype), device=target.device).copy_(first)
    at_hand = total.dtype == first.dtype and all(other.device == target.device for other in others)
    wide = None if at_hand else torch.empty_like(total)
    for other in others:
        _COMBINE[op](total, other if wide is None else wide.copy_(other))
    if divisor != 1:
        parts = torch.view_as_real(total) if total.is_complex() else total
        # A number would become a multiplication by its reciprocal on a GPU, which rounds otherwise than the division.
        parts.div_(torch.full((), divisor, dtype=parts.dtype, device=parts.device))
    # To the target's dtype by way of the sources': their result is what is cast, not the sharper one of the scratch.
    target.copy_(total if target.dtype == first.dtype else total.to(first.dtype))
