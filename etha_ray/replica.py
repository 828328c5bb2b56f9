"""Who holds a version, as a router asks: `TensorBusClient.ready_replicas`. Pure data."""

from __future__ import annotations

import msgspec


class ReplicaMember(msgspec.Struct, frozen=True):
    """One rank of a side. ``version`` is the one that it holds: of several batches, the lowest."""

    index: int
    version: int
    agent_rank: int
    hostname: str
    pid: int


class Replica(msgspec.Struct, frozen=True):
    """One side of a pair, and those of its members that hold the version asked for.

    Attributes:
        name: the side's, as in `init_pair`.
        size: how many members it has.
        members: those that are ready, by their index on the side's mesh.
    """

    name: str
    size: int
    members: tuple[ReplicaMember, ...]

    @property
    def ranks(self) -> tuple[int, ...]:
        """The indices of those that are ready."""
        return tuple(member.index for member in self.members)

    @property
    def complete(self) -> bool:
        """Whether all members are ready."""
        return len(self.members) == self.size
