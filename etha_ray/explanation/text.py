"""A plan's numbers in words: the same sentences for a terminal, a log and a page."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from textwrap import wrap

from etha_ray.explanation.groups import Groups, grouped
from etha_ray.explanation.numbers import PlanNumbers
from etha_ray.plan import Side
from etha_ray.report import format_bytes

_WIDTH = 80
"""Columns of a terminal that a table must fit in."""
_FEW = 8
"""Pairs of relay and reader that are named one by one."""


def heading(numbers: PlanNumbers) -> str:
    """What is explained, in one line."""
    shape = "x".join(map(str, numbers.shape)) or "a scalar"
    return f"{numbers.source.layout}  →  {numbers.target.layout}, {shape} of {_count(numbers.itemsize, 'byte')} an element"


def sentences(numbers: PlanNumbers) -> list[tuple[str, str]]:
    """What there is to say, as (word, sentence), in the order of interest."""
    found = [
        ("moves", f"{format_bytes(numbers.total)} in {_count(numbers.routes, 'route')}, {_count(numbers.boxes, 'box', 'boxes')}"),
        ("where", _where(numbers)),
        ("source", f"{_seats(numbers.source)}; {_spread(numbers.egress, 'gives')}"),
        ("target", f"{_seats(numbers.target)}; {_spread(numbers.ingress, 'receives')}"),
        ("hosts", _hosts(numbers)),
        ("path", _path(numbers)),
        ("time", _time(numbers)),
    ]
    reduction = numbers.source.layout.partial
    if reduction is not None:
        divided = f", divided by {reduction.divisor}" if reduction.divisor > 1 else ""
        found.insert(1, ("reduces", f"each element is the {reduction.op} of {reduction.count} contributions{divided}"))
    return found


def assumption(numbers: PlanNumbers) -> str:
    """What the time rests on."""
    return (
        f"assumes one full-duplex link of {format_bytes(round(numbers.bandwidth))}/s a host, all links busy at once, and nothing else "
        "that limits; copies inside a host are not counted"
    )


def plain(numbers: PlanNumbers) -> str:
    """All of it for a log: no colours, no box-drawing."""
    said = [*sentences(numbers), *([("", assumption(numbers))] if numbers.between_hosts else [])]
    lines = [heading(numbers)]
    for word, sentence in said:
        lines += wrap(sentence, _WIDTH, initial_indent=f"{word:<8}", subsequent_indent=" " * 8)
    table = byte_table(numbers, _WIDTH)
    if table is None:
        return "\n".join([*lines, "the table of bytes by source and target is too wide to show here"])
    rows = table.rows()
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join([*lines, table.title, *("  ".join(map(str.rjust, row, widths)) for row in rows)])


@dataclass(frozen=True)
class ByteTable:
    """Bytes by source and target, whichever way they take, ranks taken together so that it is not too wide.

    Attributes:
        sums: bytes by (row, column), where there are any.
    """

    givers: Groups
    takers: Groups
    sums: Mapping[tuple[int, int], int]

    @property
    def title(self) -> str:
        """What rows and columns are."""
        return f"bytes by source {self.givers.unit} (rows) and target {self.takers.unit} (columns)"

    def rows(self) -> list[list[str]]:
        """The cells as text, the first row and the first column being names."""
        rows = [["", *self.takers.labels]]
        for giver, label in enumerate(self.givers.labels):
            sizes = (self.sums.get((giver, taker)) for taker in range(len(self.takers.labels)))
            rows.append([label, *(format_bytes(size) if size else "·" for size in sizes)])
        return rows


def byte_table(numbers: PlanNumbers, width: int) -> ByteTable | None:
    """The finest table that fits into ``width`` columns, two between neighbours; None if there is none."""
    for limit in (16, 12, 8, 6, 4, 3, 2):
        givers, takers = grouped(numbers.source, limit), grouped(numbers.target, limit)
        table = ByteTable(givers, takers, givers.sums(takers, numbers.pairs))
        if sum(max(map(len, column)) + 2 for column in zip(*table.rows(), strict=True)) <= width + 2:
            return table
    return None


def _where(numbers: PlanNumbers) -> str:
    parts = (
        (numbers.between_hosts, "between hosts"),
        (numbers.same_host, "between agents of one host"),
        (numbers.same_agent, "within one agent"),
    )
    return ", ".join(f"{format_bytes(size)} {where}" for size, where in parts if size) or "nothing has to move"


def _seats(side: Side) -> str:
    hosts = list(dict.fromkeys(side.hosts))
    named = hosts[0] if len(hosts) == 1 else f"{_count(len(hosts), 'host')}, {hosts[0]} to {hosts[-1]}"
    return f"{_count(side.layout.ranks, 'rank')} on {named}"


def _spread(sizes: tuple[int, ...], verb: str) -> str:
    largest, mean = max(sizes), sum(sizes) / len(sizes)
    if largest == min(sizes):
        return f"each {verb} {format_bytes(largest)}"
    return f"one {verb} at most {format_bytes(largest)}, on average {format_bytes(round(mean))} (balance {largest / mean:.2f})"


def _hosts(numbers: PlanNumbers) -> str:
    if not numbers.between_hosts:
        return "no byte leaves its host"
    out, into = ([(host, size) for host, size in sizes.items() if size] for sizes in (numbers.host_egress, numbers.host_ingress))
    return f"{_ends(out, 'send')}; {_ends(into, 'receive')}"


def _ends(hosts: list[tuple[str, int]], verb: str) -> str:
    if len(hosts) <= 2:
        return ", ".join(f"{host} {verb}s {format_bytes(size)}" for host, size in hosts)
    low, high = min(size for _, size in hosts), max(size for _, size in hosts)
    amount = f"{format_bytes(low)} each" if low == high else f"{format_bytes(low)} to {format_bytes(high)}"
    return f"{len(hosts)} hosts {verb} {amount}"


def _path(numbers: PlanNumbers) -> str:
    if not numbers.hops:
        return "none"
    hops = f"{_count(numbers.hops, 'hop')} at most"
    if not numbers.relays:
        return f"{hops}; no relays: every target reads from a holder"
    passed, readers = sum(numbers.relayed.values()), len({taker for _, taker in numbers.relayed})
    who = _count(numbers.relays, "target passes", "targets pass")
    return f"{hops}; {who} on {format_bytes(passed)} to {_count(readers, 'other', 'others')}{_chains(numbers)}"


def _chains(numbers: PlanNumbers) -> str:
    """Who passes on to whom, where they are few."""
    if len(numbers.relayed) > _FEW:
        return ""
    return ": " + ", ".join(f"{relay} → {taker}" for relay, taker in sorted(numbers.relayed))


def _time(numbers: PlanNumbers) -> str:
    host, way, size = numbers.busiest
    if not size:
        return "none on the network; copies inside a host are not counted"
    return f"{_seconds(numbers.seconds)}, as {host} {'sends' if way == 'out' else 'receives'} {format_bytes(size)}"


def _seconds(value: float) -> str:
    for unit, factor in (("s", 1), ("ms", 1e3), ("µs", 1e6)):
        if value * factor >= 1:
            return f"{value * factor:.3g} {unit}"
    return f"{value * 1e9:.3g} ns"


def _count(number: int, one: str, many: str = "") -> str:
    return f"{number:,} {one if number == 1 else many or one + 's'}"
