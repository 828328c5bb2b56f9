"""Can one side send a tensor to the other? Pure functions of how both hold it."""

from __future__ import annotations

import math
from functools import lru_cache

import torch

from etha_ray.dtypes import CASTABLE, cast_loss, combine_problem
from etha_ray.errors import LayoutError, TensorMismatchError
from etha_ray.layout import Pieces
from etha_ray.plan import Side, check_sides, routes_into

Problem = tuple[type[LayoutError], str]
"""The error to raise, and why with a remedy."""


@lru_cache(maxsize=4096)
def direction_problem(
    source_dtype: torch.dtype, target_dtype: torch.dtype, lossy: bool, source: Side | None, target: Side | None, shape: tuple[int, ...]
) -> Problem | None:
    """Why a tensor of ``shape`` cannot be sent; None if it can.

    ``lossy``: whether the target takes what a cast loses. Sides are None between ranks that exchange whole tensors.
    """
    if source_dtype != target_dtype and not {source_dtype, target_dtype} <= CASTABLE:
        return TensorMismatchError, "neither dtype can be cast to the other; register the same dtype on both sides"
    loss = cast_loss(source_dtype, target_dtype)
    if loss is not None and not lossy:
        return TensorMismatchError, (
            f"{_name(target_dtype)} loses what {_name(source_dtype)} values are, for {loss}. Register another dtype, or let the side"
            " that receives call register_tensors(..., allow_lossy=True)"
        )
    if source is None or target is None:
        return None
    partial = source.layout.partial
    if partial is not None and partial.count > 1:
        problem = combine_problem(source_dtype, partial.op, partial.divisor)
        if problem is not None:
            return TensorMismatchError, f"it is Partial, and {problem}"
    try:
        check_sides(source.layout, target.layout)
        if isinstance(source.layout, Pieces):
            _check_covered(source, source.layout, target, shape)
    except LayoutError as error:
        return LayoutError, str(error)
    return None


def _check_covered(source: Side, pieces: Pieces, target: Side, shape: tuple[int, ...]) -> None:
    """Raise `LayoutError` if some target position wants what no source holds. Boxes that share something are the same here."""
    if sum(math.prod(sizes) for _, sizes in pieces.holders()) != math.prod(shape):
        for index in range(target.layout.ranks):
            routes_into(source, target, shape, index)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
