"""Ranks taken together until there are few enough of them to look at: by rank, else by host, else several hosts at a time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from etha_ray.plan import Side


@dataclass(frozen=True)
class Groups:
    """The positions of a side as a few rows of a table.

    Attributes:
        unit: what a row stands for: "rank", "host", or "8 hosts".
        labels: the name of each row.
        of: the row of each position.
    """

    unit: str
    labels: tuple[str, ...]
    of: tuple[int, ...]

    @property
    def by_rank(self) -> bool:
        """Whether each rank has a row of its own."""
        return self.unit == "rank"

    def sums(self, columns: Groups, pairs: Mapping[tuple[int, int], int]) -> dict[tuple[int, int], int]:
        """The bytes of ``pairs``, which are positions, by (row here, row of ``columns``)."""
        found: dict[tuple[int, int], int] = {}
        for (giver, taker), size in pairs.items():
            cell = self.of[giver], columns.of[taker]
            found[cell] = found.get(cell, 0) + size
        return found


def grouped(side: Side, limit: int) -> Groups:
    """The positions of ``side`` in at most ``limit`` groups."""
    ranks = side.layout.ranks
    if ranks <= limit:
        return Groups("rank", tuple(map(str, range(ranks))), tuple(range(ranks)))
    hosts = list(dict.fromkeys(side.hosts))
    step = -(-len(hosts) // limit)
    number = {host: place // step for place, host in enumerate(hosts)}
    labels = []
    for start in range(0, len(hosts), step):
        first, last = hosts[start], hosts[min(start + step, len(hosts)) - 1]
        labels.append(_span(first, last))
    return Groups("host" if step == 1 else f"{step} hosts", tuple(labels), tuple(number[host] for host in side.hosts))


def _span(first: str, last: str) -> str:
    """``"host8–15"`` for ``"host8"`` and ``"host15"``; both names in full where only numbers at their end do not tell them apart."""
    if first == last:
        return first
    stem = first.rstrip("0123456789")
    number = last.removeprefix(stem)
    return f"{first}–{number}" if number.isdecimal() and first != stem else f"{first} – {last}"


def ranges(positions: list[int]) -> str:
    """Ascending ``positions`` as short text: ``"0–3, 8"``."""
    runs: list[list[int]] = []
    for position in positions:
        if runs and runs[-1][1] == position - 1:
            runs[-1][1] = position
        else:
            runs.append([position, position])
    return ", ".join(str(first) if first == last else f"{first}–{last}" for first, last in runs)
