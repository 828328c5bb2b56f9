"""What crosses between two sides, and by which pairs: computed on every rank of both from the same tables, without talking."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from etha_ray.errors import NamesMismatchError, TensorMismatchError
from etha_ray.layout import Layout
from etha_ray.weights.fused import split
from etha_ray.weights.names import fits
from etha_ray.weights.shares import Fused, Share, SideShares, side_shares
from etha_ray.weights.tables import Table

_SHOWN = 20
"""Names that an error lists of one side."""


@dataclass(frozen=True)
class Crossing:
    """One tensor as both sides hold it, and the pair that carries it."""

    source: Share
    target: Share
    pair: int


@dataclass(frozen=True)
class PairPlan:
    """A pair: the ranks of both sides in the order of their meshes' indices, and both layouts."""

    source_ranks: tuple[int, ...]
    source: Layout
    target_ranks: tuple[int, ...]
    target: Layout


@dataclass(frozen=True)
class Agreement:
    """What crosses, in the order in which both sides register it, and the pairs. Pair 0 has all ranks of both sides."""

    pairs: tuple[PairPlan, ...]
    crossings: tuple[Crossing, ...]


def agree(name: str, senders: Sequence[Table], receivers: Sequence[Table]) -> Agreement:
    """Match what both sides hold.

    Args:
        name: of the weights, for messages.
        senders, receivers: the tables of all ranks of each side, in order.

    Raises:
        NamesMismatchError: tensors that only one side has, unless one of them is not strict; or nothing in common. Both sides
            raise the same.
        TensorMismatchError, LayoutError: ranks of a side do not fit together, or the sides hold different shapes.
    """
    source, target = side_shares("sender", senders), side_shares("receiver", receivers)
    sources, missing_parts = _resolved(source, target)
    targets, more = _resolved(target, source)
    sent = {alias: share for share in sources for alias in share.names}
    in_scope = [share for share in targets if _in_scope(share.names, source, target)]
    matched = [(found, share) for share in in_scope if (found := _find(sent, share.names)) is not None]
    _check_names(name, source, target, sources, in_scope, (missing_parts, more))
    if not matched:
        raise NamesMismatchError(
            f"weights {name!r}: the sides have no name in common. The sender has {_listed(sent)}; the receiver has"
            f" {_listed(alias for share in targets for alias in share.names)}. Give rename= on one side, or correct only="
        )
    wrong = [f"{share.names[0]} {list(found.shape)} and {list(share.shape)}" for found, share in matched if found.shape != share.shape]
    if wrong:
        raise TensorMismatchError(
            f"weights {name!r}: {len(wrong)} tensors have one global shape on the sender and another on the receiver:"
            f" {_listed(wrong)}. Pull into the same model, and say how plain tensors lie with placements="
        )
    everyone = PairPlan(tuple(range(source.size)), Layout.whole(source.size), tuple(range(target.size)), Layout.whole(target.size))
    pairs = {everyone: 0}
    crossings = []
    for found, share in sorted(matched, key=lambda both: both[1].names):
        pair = pairs.setdefault(PairPlan(found.ranks, found.layout, share.ranks, share.layout), len(pairs))
        crossings.append(Crossing(found, share, pair))
    return Agreement(tuple(pairs), tuple(crossings))


def _resolved(side: SideShares, other: SideShares) -> tuple[list[Share], list[str]]:
    """All shares of ``side``, its fused tensors taken apart; and the names of parts that the other side does not have by themselves."""
    there = {alias: share.shape for share in other.shares for alias in share.names}
    again = {fused.parts: fused for fused in other.fused}
    shares, missing = list(side.shares), []
    for fused in side.fused:
        lacking = [part for part in fused.parts if part not in there]
        if not lacking:
            shares += split(fused, [there[part] for part in fused.parts], side.who)
        elif fused.parts in again:
            shares.append(_as_one(fused, again[fused.parts], side.who))
        elif any(_in_scope((part,), side, other) for part in fused.parts):
            missing += lacking
    return shares, missing


def _as_one(fused: Fused, other: Fused, who: str) -> Share:
    """A tensor that both sides fuse of the same parts: it crosses as it is, where each row has the same place on both."""
    if fused.whole and other.whole:
        return Share(fused.parts, fused.parts, fused.ranks, fused.layout, fused.shape, fused.dtype)
    if (fused.whole, fused.layout, fused.shape) != (other.whole, other.layout, other.shape):
        raise TensorMismatchError(
            f"both sides fuse {', '.join(fused.parts)}, the {who} as {fused.layout} and the other as {other.layout}, and nobody says how"
            " large these are: publish them one by one, or hold both sides alike"
        )
    shape = fused.layout.fit(dict.fromkeys(range(fused.layout.ranks), fused.shape))[1]
    return Share(fused.parts, fused.parts, fused.ranks, fused.layout, shape, fused.dtype)


def _in_scope(names: Sequence[str], source: SideShares, target: SideShares) -> bool:
    """Whether a tensor is among what both sides want to cross: ``only`` on one side is enough."""
    return all(any(fits(alias, side.only) for alias in names) for side in (source, target))


def _find(shares: dict[str, Share], names: Sequence[str]) -> Share | None:
    return next((shares[alias] for alias in names if alias in shares), None)


def _check_names(
    name: str,
    source: SideShares,
    target: SideShares,
    sources: Sequence[Share],
    targets: Sequence[Share],
    missing_parts: tuple[Sequence[str], Sequence[str]],
) -> None:
    """Raise if a side has what the other lacks, and both are strict."""
    if not (source.strict and target.strict):
        return
    sent = {alias for share in sources for alias in share.names}
    pulled = {alias for share in targets for alias in share.names}
    extra = [share.names[0] for share in sources if _in_scope(share.names, source, target) and pulled.isdisjoint(share.names)]
    lacking = [share.names[0] for share in targets if sent.isdisjoint(share.names)]
    extra += missing_parts[0]
    lacking += missing_parts[1]
    if extra or lacking:
        raise NamesMismatchError(
            f"weights {name!r}: the sides hold different tensors. The sender has {len(extra)} that the receiver lacks: {_listed(extra)};"
            f" the receiver has {len(lacking)} that the sender lacks: {_listed(lacking)}. Give rename= or only= on one side, or"
            " strict=False to move what both have"
        )


def _listed(names: Iterable[str]) -> str:
    found = sorted(names)
    more = f" and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
    return (", ".join(found[:_SHOWN]) or "none") + more
