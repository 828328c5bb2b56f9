"""One side of a model, put together from its ranks' tables: which ranks hold each tensor, and how."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

from etha_ray.errors import LayoutError, NamesMismatchError, TensorMismatchError
from etha_ray.layout import Layout
from etha_ray.weights.tables import Entry, Table


@dataclass(frozen=True)
class Rows:
    """A part of a fused tensor: these rows of each rank's tensor."""

    start: int
    size: int


@dataclass(frozen=True)
class Span:
    """A part of a fused tensor that is sharded as a whole: these rows of the global one of shape ``whole``."""

    start: int
    size: int
    whole: tuple[int, ...]


@dataclass(frozen=True)
class Share:
    """One tensor, or one part of a fused one, as one side holds it.

    Attributes:
        key: what finds the tensor on a rank; see `NamedTensor.key`.
        names: what both sides call it; several for a tied weight.
        ranks: the side's ranks that hold it, in the order of the mesh indices of ``layout``.
        shape: the global shape.
        cut: which part of the tensor; None for all of it.
    """

    key: tuple[str, ...]
    names: tuple[str, ...]
    ranks: tuple[int, ...]
    layout: Layout
    shape: tuple[int, ...]
    dtype: str
    cut: Rows | Span | None = None


@dataclass(frozen=True)
class Fused:
    """A tensor whose parts have names of their own; how large they are, the other side knows.

    ``shape`` is global if ``whole``; else of each rank's part, in which the parts of that rank lie one after the other.
    """

    parts: tuple[str, ...]
    ranks: tuple[int, ...]
    layout: Layout
    shape: tuple[int, ...]
    whole: bool
    dtype: str


@dataclass(frozen=True)
class SideShares:
    """Everything that one side holds.

    Attributes:
        who: "sender" or "receiver", for messages.
        size: how many ranks it has.
        shares, fused: in the order of the tables.
        only, strict: what the side gave.
    """

    who: str
    size: int
    shares: tuple[Share, ...]
    fused: tuple[Fused, ...]
    only: tuple[str, ...]
    strict: bool


def side_shares(who: str, tables: Sequence[Table]) -> SideShares:
    """Put together the tables of all ranks of one side, in order. Pure: the same on every rank of both sides.

    Raises:
        TensorMismatchError: ranks of the side do not hold the same, or not all that their layouts say.
        LayoutError: local shapes fit no global one.
    """
    by_identity: dict[int, tuple[Table, list[int]]] = {}  # most ranks' tables are one object, which takes long to compare or hash
    for rank, table in enumerate(tables):
        by_identity.setdefault(id(table), (table, []))[1].append(rank)
    first = tables[0]
    for table, ranks in by_identity.values():
        if (table.only, table.strict) != (first.only, first.strict):
            raise TensorMismatchError(f"rank {ranks[0]} of the {who} gives other only= or strict= than rank 0: give the same on all")
    found: dict[tuple[str, ...], list[tuple[Entry, Table, list[int]]]] = {}
    for table, ranks in by_identity.values():
        for entry in table.entries:
            found.setdefault(entry.names or entry.parts, []).append((entry, table, ranks))
    _check_names(who, found)
    shares: list[Share] = []
    fused: list[Fused] = []
    for key, said in found.items():
        entry = said[0][0]
        holders, layout, shape = _placed(who, key, said, len(tables))
        if entry.parts:
            fused.append(Fused(entry.parts, holders, layout, shape, entry.whole, entry.dtype))
        else:
            shares.append(Share(key, entry.names, holders, layout, shape, entry.dtype))
    return SideShares(who, len(tables), tuple(shares), tuple(fused), first.only, first.strict)


def _check_names(who: str, keys: Mapping[tuple[str, ...], object]) -> None:
    """A name has one tensor on a side: ranks that tie weights, or fuse them, in different ways do not fit together."""
    owners: dict[str, tuple[str, ...]] = {}
    for key in keys:
        for name in key:
            if owners.setdefault(name, key) != key:
                raise NamesMismatchError(
                    f"{name!r} belongs to {list(owners[name])} on some ranks of the {who}, and to {list(key)} on others: tie and fuse"
                    " weights alike on all ranks"
                )


def _placed(
    who: str, key: tuple[str, ...], said: Sequence[tuple[Entry, Table, list[int]]], size: int
) -> tuple[tuple[int, ...], Layout, tuple[int, ...]]:
    """Ranks, layout and shape of one tensor: the global shape, but of a fused one that each rank holds parts of."""
    entry, table, _ = said[0]
    holders = sorted(rank for _, _, ranks in said for rank in ranks)
    holding = table.holdings[entry.holding] if entry.holding >= 0 else None
    for other, its, ranks in said[1:]:
        there = its.holdings[other.holding] if other.holding >= 0 else None
        alike = other.shape == entry.shape or not (entry.whole or entry.parts)
        if (other.dtype, other.whole, there) != (entry.dtype, entry.whole, holding) or not alike:
            raise TensorMismatchError(
                f"{key[0]!r}: rank {ranks[0]} of the {who} holds {_shown(other, its)}, and rank {said[0][2][0]} {_shown(entry, table)}"
            )
    if holding is None:
        return tuple(holders), Layout.whole(len(holders)), entry.shape
    layout = Layout.decode(holding.layout)
    missing = sorted(set(holding.ranks).difference(holders))
    if missing or len(holders) != len(holding.ranks):
        raise TensorMismatchError(
            f"{key[0]!r}: ranks {list(holding.ranks)} of {size} on the {who} hold it as {layout}, and it is there on ranks {holders}:"
            " publish or pull the same tensors on all ranks of a mesh"
        )
    if entry.whole or entry.parts:
        return holding.ranks, layout, entry.shape
    shapes = {rank: other.shape for other, _, ranks in said for rank in ranks}
    try:
        return holding.ranks, layout, _global_shape(layout, tuple(shapes[rank] for rank in holding.ranks))
    except LayoutError as error:
        raise LayoutError(f"{key[0]!r} on the {who}: {error}") from error


@lru_cache(maxsize=4096)
def _global_shape(layout: Layout, shapes: tuple[tuple[int, ...], ...]) -> tuple[int, ...]:
    return layout.fit(dict(enumerate(shapes)))[1]


def _shown(entry: Entry, table: Table) -> str:
    where = table.holdings[entry.holding].layout if entry.holding >= 0 else "whole"
    return f"{entry.dtype} {list(entry.shape)} as {where}"
