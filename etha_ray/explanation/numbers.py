"""What a plan costs, as numbers: who gives how much to whom, what crosses between hosts, and how long that takes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from etha_ray.plan import Side


@dataclass(frozen=True)
class PlanNumbers:
    """One tensor's way from one side to the other, counted.

    Attributes:
        source: who gives.
        target: who receives.
        shape: the tensor's global shape.
        itemsize: bytes of an element.
        bandwidth: bytes a second that each host's network link carries in each direction; assumed, for `seconds`.
        direct: bytes that targets read from sources, by (source position, target position), for pairs that exchange any.
        relayed: bytes that targets read from other targets, which have received them, by (relay's position, reader's position).
        pairs: bytes by (source position, target position), whichever way they take.
        hops: the longest path that bytes take, in moves: 1 where all targets read from sources; 0 if nothing moves.
        routes: how many routes the plan has: what one target gets from one source, or from all contributors to a Partial.
        boxes: how many rectangles these have together; each is one copy, of each contributor.
    """

    source: Side
    target: Side
    shape: tuple[int, ...]
    itemsize: int
    bandwidth: float
    direct: Mapping[tuple[int, int], int] = field(repr=False)
    relayed: Mapping[tuple[int, int], int] = field(repr=False)
    pairs: Mapping[tuple[int, int], int] = field(repr=False)
    hops: int
    routes: int
    boxes: int

    @property
    def total(self) -> int:
        """Bytes that all targets receive together."""
        return sum(self.ingress)

    @cached_property
    def egress(self) -> tuple[int, ...]:
        """Bytes that each source position gives."""
        return _sums(self.source.layout.ranks, ((giver, size) for (giver, _), size in self.direct.items()))

    @cached_property
    def ingress(self) -> tuple[int, ...]:
        """Bytes that each target position receives."""
        return _sums(self.target.layout.ranks, ((taker, size) for (_, taker), size in (*self.direct.items(), *self.relayed.items())))

    @property
    def largest(self) -> int:
        """The most that one source position gives, in bytes."""
        return max(self.egress)

    @property
    def mean(self) -> float:
        """What a source position gives on average, in bytes."""
        return sum(self.egress) / len(self.egress)

    @property
    def balance(self) -> float:
        """`largest` over `mean`: 1.0 when all sources give alike, and when nothing moves."""
        return self.largest / self.mean if self.largest else 1.0

    @cached_property
    def same_agent(self) -> int:
        """Bytes that an agent copies from one of its own positions to another."""
        found = 0
        for side, sizes in ((self.source, self.direct), (self.target, self.relayed)):
            found += sum(size for (giver, taker), size in sizes.items() if side.agents[giver] == self.target.agents[taker])
        return found

    @property
    def same_host(self) -> int:
        """Bytes between different agents of one host."""
        return self.total - self.same_agent - self.between_hosts

    @property
    def between_hosts(self) -> int:
        """Bytes that cross the network."""
        return sum(self.host_egress.values())

    @cached_property
    def hosts(self) -> tuple[str, ...]:
        """All hosts, the source's first, each in the order of its first position."""
        return tuple(dict.fromkeys((*self.source.hosts, *self.target.hosts)))

    @cached_property
    def host_pairs(self) -> Mapping[tuple[str, str], int]:
        """Bytes by (giving host, receiving host), for hosts that exchange any; a host with itself included."""
        found: Counter[tuple[str, str]] = Counter()
        for side, sizes in ((self.source, self.direct), (self.target, self.relayed)):
            for (giver, taker), size in sizes.items():
                found[side.hosts[giver], self.target.hosts[taker]] += size
        return dict(found)

    @cached_property
    def host_egress(self) -> Mapping[str, int]:
        """Bytes that leave each host for another, 0 included."""
        return self._crossing(0)

    @cached_property
    def host_ingress(self) -> Mapping[str, int]:
        """Bytes that reach each host from another, 0 included."""
        return self._crossing(1)

    @property
    def busiest(self) -> tuple[str, str, int]:
        """The link that is busy longest: host, "out" or "in", bytes."""
        out, into = (
            [(host, way, sizes[host]) for host in self.hosts] for way, sizes in (("out", self.host_egress), ("in", self.host_ingress))
        )
        return max(out + into, key=lambda link: link[2])

    @property
    def seconds(self) -> float:
        """How long the busiest link needs at `bandwidth`; 0 if nothing crosses between hosts.

        Assumes that every host has one full-duplex link, that all of them work at once, and that nothing else limits: not
        the network between them, nor memory, nor the copies inside a host, which are not counted.
        """
        return self.busiest[2] / self.bandwidth

    @property
    def relays(self) -> int:
        """Target positions that pass on what they received."""
        return len({relay for relay, _ in self.relayed})

    def as_dict(self) -> dict[str, Any]:
        """All of it as plain data for JSON; bytes are integers, pairs ascending."""
        host, direction, size = self.busiest
        return {
            "source": _side(self.source),
            "target": _side(self.target),
            "shape": list(self.shape),
            "itemsize": self.itemsize,
            "bytes": self.total,
            "bytes_same_agent": self.same_agent,
            "bytes_same_host": self.same_host,
            "bytes_between_hosts": self.between_hosts,
            "routes": self.routes,
            "boxes": self.boxes,
            "pairs": [{"source": giver, "target": taker, "bytes": size} for (giver, taker), size in sorted(self.pairs.items())],
            "relayed": [{"relay": relay, "target": taker, "bytes": size} for (relay, taker), size in sorted(self.relayed.items())],
            "egress": list(self.egress),
            "ingress": list(self.ingress),
            "largest_egress": self.largest,
            "mean_egress": self.mean,
            "balance": self.balance,
            "hosts": {name: {"egress": self.host_egress[name], "ingress": self.host_ingress[name]} for name in self.hosts},
            "hops": self.hops,
            "relays": self.relays,
            "bandwidth": self.bandwidth,
            "seconds": self.seconds,
            "busiest_link": {"host": host, "direction": direction, "bytes": size},
        }

    def _crossing(self, end: int) -> dict[str, int]:
        found = dict.fromkeys(self.hosts, 0)
        for hosts, size in self.host_pairs.items():
            if hosts[0] != hosts[1]:
                found[hosts[end]] += size
        return found


def _sums(ranks: int, sizes: Iterable[tuple[int, int]]) -> tuple[int, ...]:
    found = [0] * ranks
    for position, size in sizes:
        found[position] += size
    return tuple(found)


def _side(side: Side) -> dict[str, Any]:
    return {"layout": str(side.layout), "agents": list(side.agents), "hosts": list(side.hosts)}
