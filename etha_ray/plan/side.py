"""Who sits where on one side of a pair."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from etha_ray.errors import LayoutError
from etha_ray.layout import Layout, Pieces
from etha_ray.plan.digest import digest_inputs


@dataclass(frozen=True)
class Side:
    """Who sits where on one side of a pair.

    Attributes:
        layout: how this side holds the tensor: by placements, or in explicit pieces.
        agents: the agent's rank at each mesh position. Any order, with gaps or repeats; the other side may name the same.
        hosts: the host of that agent. Positions of one agent are on one host.

    Raises:
        LayoutError: there is not one agent and one host per mesh position.
    """

    layout: Layout | Pieces
    agents: tuple[int, ...]
    hosts: tuple[str, ...]
    _hash: int = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "agents", tuple(self.agents))
        object.__setattr__(self, "hosts", tuple(self.hosts))
        ranks = self.layout.ranks
        if len(self.agents) != ranks or len(self.hosts) != ranks:
            raise LayoutError(
                f"layout {self.layout} has {ranks} positions, but {len(self.agents)} agents and {len(self.hosts)} hosts "
                "were given: name one agent and one host per position"
            )
        # Sides are cache keys for every tensor of a model; hashing thousands of hosts each time would cost more than planning.
        # Made from text, so that it holds in another process too, where hash(str) differs.
        object.__setattr__(self, "_hash", int(digest_inputs((self.encode(),))[:15], 16))

    def __hash__(self) -> int:
        return self._hash

    def encode(self) -> str:
        """This side as text; equal sides, equal text."""
        seats = (f"{agent}@{len(host)}:{host}" for agent, host in zip(self.agents, self.hosts, strict=True))
        return f"{self.layout.encode()} [{' '.join(seats)}]"

    @cached_property
    def at_agent(self) -> Mapping[Hashable, Sequence[int]]:
        """The positions of each agent, ascending."""
        return _grouped(self.agents)

    @cached_property
    def at_host(self) -> Mapping[Hashable, Sequence[int]]:
        """The positions on each host, ascending."""
        return _grouped(self.hosts)


def _grouped(places: Iterable[Hashable]) -> dict[Hashable, list[int]]:
    groups: dict[Hashable, list[int]] = {}
    for index, place in enumerate(places):
        groups.setdefault(place, []).append(index)
    return groups
