"""Which target gets what it wants from another target: what several of them want leaves each source host once.

The copies of a target piece hold the same elements at the same places of their local tensors, so any of them can pass on to the
others what it received. Those with a holder of each contribution on their own agent or host read by themselves. Of all others the
first reads from the sources; they make a *chain*: on each host the first passes on to the others there, and to the first on the
next host. So the bytes cross into each host once, and out of each at most once. What is passed on is the result, in the target's
dtype, of a Partial source as well: combined once, not once for each copy.

The order is that of agents' ranks, so in all tensors of a batch a relay's agent comes before those it passes on to, and nobody waits
in a circle. Everybody finds the chain alone, from both sides and the piece.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from functools import lru_cache

from etha_ray.plan.overlap import Key, view
from etha_ray.plan.side import Side


class Chain:
    """Copies of one target piece that are far from its source: ``relays`` says from whom each gets it, the first from nobody."""

    def __init__(self, target: Side, positions: Sequence[int]) -> None:
        self.first: int | None = None
        self.relays: dict[int, int | None] = {}
        leaders: dict[str, int] = {}
        before: int | None = None
        for _, index in sorted([(target.agents[index], index) for index in positions]):
            host = target.hosts[index]
            if host in leaders:
                self.relays[index] = leaders[host]
                continue
            self.relays[index], leaders[host], before = before, index, index
            if self.first is None:
                self.first = index


class Relays:
    """Who passes on to whom what the source's piece ``key`` gives."""

    def __init__(self, source: Side, target: Side, shape: tuple[int, ...], key: Key) -> None:
        slots = view(source.layout, shape).slots(key)
        self._target, self._shape, self._view = target, shape, view(target.layout, shape)
        self._near_hosts = _common(source.hosts, slots, target.at_host)
        self._near_agents = _common(source.agents, slots, target.at_agent)
        self._chains: dict[Key, Chain] = {}

    def chain(self, key: Key) -> Chain:
        """Those that hold the target piece ``key`` and have no holder of each contribution on their agent or host."""
        if not (self._near_hosts or self._near_agents):
            return _far_chain(self._target, self._shape, key)
        if key not in self._chains:
            target = self._target
            far = [
                index
                for index in self._view.slots(key)[0]
                if target.hosts[index] not in self._near_hosts and target.agents[index] not in self._near_agents
            ]
            self._chains[key] = Chain(target, far)
        return self._chains[key]

    def relay(self, index: int, key: Key) -> int | None:
        """The target position from which ``index``, which holds ``key``, gets its part; None if it reads from the sources itself."""
        return self.chain(key).relays.get(index)


@lru_cache(maxsize=1024)
def _far_chain(target: Side, shape: tuple[int, ...], key: Key) -> Chain:
    return Chain(target, view(target.layout, shape).slots(key)[0])


@lru_cache(maxsize=4096)
def relays(source: Side, target: Side, shape: tuple[int, ...], key: Key) -> Relays:
    """How what the source's piece ``key`` gives is passed on; see `Relays`."""
    return Relays(source, target, shape, key)


@lru_cache(maxsize=1024)
def passed_on(source: Side, target: Side, shape: tuple[int, ...], index: int) -> frozenset[int]:
    """The target positions to which the target position ``index`` passes on some of what it gets."""
    seat = view(target.layout, shape).seat(index)
    if seat is None or view(target.layout, shape).copies(seat[0]) == 1:
        return frozenset()
    pieces = {meeting.key for meeting in view(source.layout, shape).meeting(target.layout.region(index, shape))}
    chains = {id(chain): chain for chain in (relays(source, target, shape, piece).chain(seat[0]) for piece in pieces)}
    return frozenset(other for chain in chains.values() for other, relay in chain.relays.items() if relay == index)


def _common(places: Sequence[Hashable], slots: Sequence[Sequence[int]], wanted: Mapping[Hashable, object]) -> set[Hashable]:
    """The places among ``wanted`` where every slot has a holder."""
    found = {places[holder] for holder in slots[0] if places[holder] in wanted}
    for holders in slots[1:] if found else ():
        found &= {places[holder] for holder in holders}
    return found
