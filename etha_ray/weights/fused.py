"""Where the parts of a fused tensor lie in it, given how large they are on the other side, which holds them one by one.

The parts lie one after the other along dimension 0. Three ways of holding that are told apart:

- whole on each rank: the parts' rows follow one another;
- sharded by ``placements=`` along dimension 0, as vLLM does: each rank holds its rows of the first part, then of the second, ...;
  where there are fewer heads of k and v than ranks, several ranks hold the same ones;
- a DTensor that is sharded along dimension 0: the rows of the whole one are cut, wherever the parts begin.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

from etha_ray.errors import TensorMismatchError
from etha_ray.layout import Layout
from etha_ray.layout.tokens import parse
from etha_ray.weights.shares import Fused, Rows, Share, Span


def split(fused: Fused, shapes: Sequence[tuple[int, ...]], who: str) -> list[Share]:
    """The parts of a fused tensor, given their global shapes.

    Raises `TensorMismatchError` if these do not make up the tensor.
    """
    rows = [shape[0] if shape else 0 for shape in shapes]
    cutting = [dim for dim, token in enumerate(fused.layout.resolve(len(fused.shape)).placements) if parse(token).dim == 0]
    shards = math.prod(fused.layout.mesh_shape[dim] for dim in cutting)
    whole = fused.shape if fused.whole else fused.layout.fit(dict.fromkeys(range(fused.layout.ranks), fused.shape))[1]
    if any(shape[1:] != whole[1:] for shape in shapes):
        raise _misfit(fused, shapes, who)
    if fused.whole or shards == 1:
        if sum(rows) != fused.shape[0]:
            raise _misfit(fused, shapes, who)
        starts = itertools.accumulate(rows, initial=0)
        cuts: list[Rows | Span] = [
            Rows(start, size) if shards == 1 else Span(start, size, fused.shape) for start, size in zip(starts, rows, strict=False)
        ]
        return _shares(fused, shapes, cuts, [fused.layout] * len(rows))
    copies = _copies(rows, fused.shape[0], shards)
    if copies is None:
        raise _misfit(fused, shapes, who)
    layouts = [fused.layout if count == 1 else _replicated(fused, shapes, cutting, count, who) for count in copies]
    local = [size * count // shards for size, count in zip(rows, copies, strict=True)]
    starts = itertools.accumulate(local, initial=0)
    return _shares(fused, shapes, [Rows(start, size) for start, size in zip(starts, local, strict=False)], layouts)


def _copies(rows: Sequence[int], local: int, shards: int) -> list[int] | None:
    """On how many ranks each row of a part is; None if nothing fits.

    Either every row is on one rank, or those of all parts but the largest are on the same number of them.
    """
    largest = max(rows)
    rest = sum(size for size in rows if size != largest)
    if sum(rows) == local * shards:
        count = 1
    elif rest and (local * shards - (sum(rows) - rest)) % rest == 0:
        count = (local * shards - (sum(rows) - rest)) // rest
    else:
        return None
    copies = [1 if size == largest else count for size in rows]
    fit = count >= 1 and shards % count == 0 and all(size * each % shards == 0 for size, each in zip(rows, copies, strict=True))
    return copies if fit else None


def _replicated(fused: Fused, shapes: Sequence[tuple[int, ...]], cutting: Sequence[int], count: int, who: str) -> Layout:
    """The layout in which ``count`` neighbours along the mesh dimension that shards the tensor hold the same."""
    layout, dim = fused.layout, cutting[0]
    if len(cutting) != 1 or layout.placements[dim].startswith("SS"):
        raise _misfit(fused, shapes, who)
    mesh = (*layout.mesh_shape[:dim], layout.mesh_shape[dim] // count, count, *layout.mesh_shape[dim + 1 :])
    return Layout(mesh, (*layout.placements[: dim + 1], "R", *layout.placements[dim + 1 :]))


def _shares(fused: Fused, shapes: Sequence[tuple[int, ...]], cuts: Sequence[Rows | Span], layouts: Sequence[Layout]) -> list[Share]:
    return [
        Share(fused.parts, (name,), fused.ranks, layout, shape, fused.dtype, cut)
        for name, shape, cut, layout in zip(fused.parts, shapes, cuts, layouts, strict=True)
    ]


def _misfit(fused: Fused, shapes: Sequence[tuple[int, ...]], who: str) -> TensorMismatchError:
    parts = ", ".join(f"{name} {list(shape)}" for name, shape in zip(fused.parts, shapes, strict=True))
    what = "global shape" if fused.whole else "each rank's part"
    return TensorMismatchError(
        f"the {who} fuses {parts} into one tensor ({what} {list(fused.shape)} as {fused.layout}), and they do not make it up:"
        " correct rename= or placements="
    )
