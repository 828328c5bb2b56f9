"""Placements as short text, the only form in which etha_ray keeps and compares them.

===================  ======================================================  ====================================================
token                torch                                                   what a rank holds along that mesh dimension
===================  ======================================================  ====================================================
``R``                ``Replicate()``                                         all of it
``S0``, ``S-1``      ``Shard(0)``, ``Shard(-1)``                             its `torch.chunk` of the tensor dimension
``SS0/2``            ``_StridedShard(0, split_factor=2)``                    its chunk of each of 2 chunks, one after the other
``P(sum)``           ``Partial("sum")``; also avg, max, min and product      one contribution to all of it
===================  ======================================================  ====================================================
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

from etha_ray.errors import LayoutError

ReduceOp = Literal["sum", "avg", "max", "min", "product"]

CombineOp = Literal["sum", "max", "min", "product"]
"""The same without avg, which is a sum and a division."""

REDUCE_OPS: tuple[ReduceOp, ...] = ("sum", "avg", "max", "min", "product")
"""What the contributions of a Partial may be combined by."""

_TOKEN = re.compile(r"R|S(?P<shard>-?\d+)|SS(?P<strided>-?\d+)/(?P<factor>\d+)|P\((?P<op>[a-z]+)\)")
_SUPPORTED = (
    'supported are Shard(dim) ("S0", "S-1"), _StridedShard(dim, split_factor=n) ("SS0/2"), Replicate() ("R") and, on a source, '
    'Partial(op) ("P(sum)") with op sum, avg, max, min or product'
)


@dataclass(frozen=True)
class Placement:
    """A token, taken apart.

    Attributes:
        dim: the tensor dimension that is sharded, maybe negative; None where nothing is.
        split_factor: into how many chunks the dimension is cut before each of them is sharded; 1 for ``Shard``.
        op: how contributions are combined; None where the placement is not Partial.
    """

    dim: int | None = None
    split_factor: int = 1
    op: ReduceOp | None = None


@lru_cache(maxsize=1024)
def parse(token: str) -> Placement:
    """``token`` taken apart. Raises `LayoutError` for what is no placement."""
    found = _TOKEN.fullmatch(token)
    if found is None:
        raise LayoutError(f"{token!r} is not a placement: {_SUPPORTED}")
    if found["shard"] is not None:
        return Placement(dim=int(found["shard"]))
    if found["strided"] is not None:
        if int(found["factor"]) < 1:
            raise LayoutError(f"{token!r} is not a placement: split_factor must be at least 1")
        return Placement(dim=int(found["strided"]), split_factor=int(found["factor"]))
    if found["op"] is None:
        return Placement()
    for op in REDUCE_OPS:
        if op == found["op"]:
            return Placement(op=op)
    raise LayoutError(f"{token!r} is not supported: {_SUPPORTED}")


def placement_tokens(placements: Iterable[Any]) -> tuple[str, ...]:
    """``placements`` as tokens: torch placements or tokens, in order; a negative dim is kept.

    Raises:
        LayoutError: a placement is of a kind that is not in the table above, or is not a placement.
    """
    if isinstance(placements, str) or not isinstance(placements, Iterable):
        raise LayoutError(f"placements is {placements!r}, but it must be a list with one placement per mesh dimension")
    return tuple(_token(placement) for placement in placements)


def sharding(token: str, dim: int) -> str:
    """``token``, which shards some dimension, sharding ``dim`` instead."""
    strided = token.startswith("SS")
    return f"SS{dim}/{parse(token).split_factor}" if strided else f"S{dim}"


def reduce_ops(tokens: Sequence[str]) -> tuple[ReduceOp, ...]:
    """The operations of those ``tokens`` that are Partial, each once, in order.

    Raises:
        LayoutError: they cannot be combined: as in DTensor only sum and avg may stand in one list, since the result of any
            other mixture depends on which is applied first.
    """
    ops = tuple(dict.fromkeys(op for op in (parse(token).op for token in tokens) if op is not None))
    if len(ops) > 1 and set(ops) != {"sum", "avg"}:
        raise LayoutError(
            f"placements [{', '.join(tokens)}] mix Partial({ops[0]}) and Partial({ops[1]}), whose result depends on which is "
            "applied first: use one operation, or sum and avg, as DTensor does; or redistribute one of them first"
        )
    return ops


def _token(placement: Any) -> str:
    if isinstance(placement, str):
        dim = parse(placement).dim
        return placement if dim is None else sharding(placement, dim)  # "S-00" is "S0"
    from torch.distributed.tensor import Partial, Replicate, Shard
    from torch.distributed.tensor.placement_types import _StridedShard

    # Exact types: a subclass holds other elements (in some torch versions _StridedShard is one of Shard), or other values
    # (_MaskPartial is one of Partial).
    kind = type(placement)
    if kind is Shard:
        return f"S{int(placement.dim)}"
    if kind is _StridedShard:
        return sharding(f"SS0/{int(placement.split_factor)}", int(placement.dim))
    if kind is Replicate:
        return "R"
    if kind is Partial and placement.reduce_op in REDUCE_OPS:
        return f"P({placement.reduce_op})"
    raise LayoutError(f"placement {placement!r} is not supported: {_SUPPORTED}. Redistribute the tensor to one of these first")
