"""From a plan to bytes: who gets how much of this rank, and the copies that fill this rank's tensors.

A receiving agent opens the senders' memory once, at registration, and prepares one program of copies. A transfer only runs
that program.
"""

from __future__ import annotations

import logging
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch

from etha_ray.errors import LayoutError
from etha_ray.plan import Box, Route, paired_route, passed_on, prove_target, routes_into, routes_out_of, turns
from etha_ray.tensor_bus.agreement import AgreedTensor, Held
from etha_ray.tensor_bus.pair import Match
from etha_ray.tensor_bus.records import MemberRecord
from etha_ray.transport.joint import Move, Source, narrowed
from etha_ray.transport.network import RemoteRegion

logger = logging.getLogger(__name__)

_PROVED_BOXES = 4
_TENSORS_A_BOX = 20

OpenRemote = Callable[[int, Sequence[int]], Sequence[Source]]
"""Opens tensors of a remote mesh index: ``open_remote(index, positions)`` gives them in the order of ``positions``."""

OpenRelay = Callable[[int, Sequence[int]], "Sequence[Source] | None"]
"""The same of a local mesh index, to read what it received; None where it cannot be read."""


@dataclass(frozen=True)
class Part:
    """The tensors of one batch that belong to one pair, as this rank holds them, and as both sides agreed to.

    ``places`` says which of the batch's tensors they are.
    """

    batch_id: str
    pair_name: str
    match: Match
    places: Sequence[int]
    tensors: Sequence[torch.Tensor]
    agreed: Sequence[AgreedTensor]

    @cached_property
    def turns(self) -> list[int]:
        """For each tensor, how many of its shape come before it: what `routes_into` wants to know."""
        return turns(tensor.shape for tensor in self.agreed)

    def routes_in(self, position: int) -> tuple[Route, ...]:
        """What this rank receives of the tensor at ``position``."""
        index, tensor = self.match.index, self.agreed[position]
        local, remote = tensor.local.side, tensor.remote.side
        if local is None or remote is None:
            return (paired_route(index, tensor.shape),)
        return routes_into(remote, local, tensor.shape, index, self.turns[position])

    def routes_out(self, position: int) -> tuple[Route, ...]:
        """What this rank gives of the tensor at ``position``."""
        index, tensor = self.match.index, self.agreed[position]
        local, remote = tensor.local.side, tensor.remote.side
        if local is None or remote is None:
            return (paired_route(index, tensor.shape),)
        return routes_out_of(local, remote, tensor.shape, index, self.turns[position])


def bytes_out(part: Part) -> dict[int, int]:
    """Bytes that each remote index reads of this rank; 0 for one that only gets some from others, who have read it."""
    total: dict[int, int] = defaultdict(int)
    for position, tensor in enumerate(part.agreed):
        for route in part.routes_out(position):
            if route.numel:
                given = route.numel * _itemsize(tensor.local, tensor.remote, route)
                total[route.target] += given if route.relay is None else 0
    return dict(total)


@dataclass(frozen=True, slots=True)
class Inflow:
    """A move, and what it fills: of the batch's tensor at ``place``, ``tensor``, the box from ``start`` on. ``sources``: remote indices.

    ``position`` is that of the tensor in its pair. ``relay`` is the local index that passes the box on, and ``relayed`` the move from
    there; None where it is read from the sources.
    """

    place: int
    tensor: torch.Tensor
    start: tuple[int, ...]
    sources: tuple[int, ...]
    move: Move
    position: int = 0
    relay: int | None = None
    relayed: Move | None = None

    def within(self, tensor: torch.Tensor) -> torch.Tensor:
        """The same box of another tensor of that shape."""
        size = tuple(self.move.target.shape)
        return tensor if tuple(tensor.shape) == size else tensor[_slices(self.start, size)]

    @property
    def key(self) -> int:
        """Where in the pair it begins, the same for all who receive this box: by tensors, and in a tensor by elements."""
        offset = 0
        for at, extent in zip(self.start, self.tensor.shape, strict=True):
            offset = offset * extent + at
        return self.position << 40 | offset

    def cut(self, nbytes: int) -> Iterator[Inflow]:
        """It in parts of consecutive rows, of about ``nbytes`` bytes of the target each."""
        size = tuple(self.move.target.shape)
        dim = next((dim for dim, extent in enumerate(size) if extent > 1), None)
        if dim is None or self.move.target.nbytes <= nbytes:
            yield self
            return
        rows = max(1, size[dim] * nbytes // self.move.target.nbytes)
        for first in range(0, size[dim], rows):
            count = min(rows, size[dim] - first)
            start = (*self.start[:dim], self.start[dim] + first, *self.start[dim + 1 :])
            relayed = None if self.relayed is None else narrowed(self.relayed, dim, first, count)
            yield replace(self, start=start, move=narrowed(self.move, dim, first, count), relayed=relayed)


@dataclass
class Inflows:
    """What fills this rank's tensors, and the bytes: of each remote index, directly; of each local index that passes some on; and of
    each remote index what such a local one does not have to be asked for."""

    moves: list[Inflow] = field(default_factory=list)
    direct: dict[int, int] = field(default_factory=lambda: defaultdict(int))
    relayed: dict[int, int] = field(default_factory=lambda: defaultdict(int))
    instead: dict[int, dict[int, int]] = field(default_factory=lambda: defaultdict(lambda: defaultdict(int)))


def inflows(part: Part, open_remote: OpenRemote, open_relay: OpenRelay) -> Inflows:
    """What fills this rank's tensors."""
    routes = [(position, route) for position in range(len(part.agreed)) for route in part.routes_in(position) if route.numel]
    wanted: dict[int, dict[int, None]] = defaultdict(dict)
    passing: dict[int, dict[int, None]] = defaultdict(dict)
    found = Inflows()
    for position, route in routes:
        for source in route.sources:
            wanted[source][position] = None
        if route.relay is not None:
            passing[route.relay][position] = None
    relays: dict[tuple[int, int], Source] = {}
    for lending, positions in sorted(passing.items()):
        lent = open_relay(lending, list(positions))
        relays.update(((lending, position), each) for position, each in zip(positions, lent or (), strict=False))
    opened: dict[tuple[int, int], Source] = {}
    for source, positions in sorted(wanted.items()):
        tensors = open_remote(source, list(positions))
        opened.update(((source, position), each) for position, each in zip(positions, tensors, strict=True))
    for position, route in routes:
        sources, target = [opened[source, position] for source in route.sources], part.tensors[position]
        tensor, side = part.agreed[position], part.agreed[position].remote.side
        reduction = side.layout.partial if side is not None and route.others else None
        lender = None if route.relay is None else relays.get((route.relay, position))
        size = route.numel * _itemsize(tensor.remote, tensor.local, route)
        for source in route.sources:
            found.direct[source] += size if lender is None else 0
            if lender is not None and route.relay is not None:
                found.instead[route.relay][source] += size
        if lender is not None and route.relay is not None:
            found.relayed[route.relay] += route.numel * tensor.local.dtype.itemsize
        name = _name(part, position, part.match.remote, route.sources)
        for box in route.boxes:
            views = tuple(_cut(source, box.source_start, box) for source in sources)
            into = target if tuple(target.shape) == box.size else target[_slices(box.target_start, box.size)]
            move = Move(views, into, name=name) if reduction is None else Move(views, into, reduction.op, reduction.divisor, name)
            relayed = None
            if lender is not None and route.relay is not None:
                via = _name(part, position, part.match.local, [route.relay])
                relayed = Move((_cut(lender, box.target_start, box),), into, name=via)
            relay = None if lender is None else route.relay
            found.moves.append(Inflow(part.places[position], target, box.target_start, route.sources, move, position, relay, relayed))
    return found


def takers(part: Part) -> set[int]:
    """The local indices to which this rank passes on some of what it receives."""
    found: set[int] = set()
    for tensor in part.agreed:
        local, remote = tensor.local.side, tensor.remote.side
        if local is not None and remote is not None:
            found |= passed_on(remote, local, tensor.shape, part.match.index)
    return found


def prove_in(part: Part) -> None:
    """Prove that what this rank receives fills its tensors, each element once, with that very element of the sender's.

    Of tensors that are held alike the first is proved. What would take more than a hundredth of the registration is left out;
    ``etha-ray bench small`` measures what it takes (``proof_percent``).

    Raises:
        LayoutError: it does not; the message names the tensor and what is wrong with its routes.
    """
    started, left = time.perf_counter(), _PROVED_BOXES + len(part.agreed) // _TENSORS_A_BOX
    seen: set[object] = set()
    proved = 0
    for position, tensor in enumerate(part.agreed):
        local, remote = tensor.local.side, tensor.remote.side
        held = remote, local, tensor.shape
        if local is None or remote is None or held in seen:
            continue
        seen.add(held)
        routes = part.routes_in(position)
        left -= sum(len(route.boxes) for route in routes)
        if left < 0:
            break
        try:
            prove_target(remote.layout, local.layout, tensor.shape, part.match.index, routes)
        except LayoutError as error:
            where = f"batch {part.batch_id!r}, pair {part.pair_name!r}, tensor {position}"
            raise LayoutError(f"{where}: {error}. This is a fault of etha_ray: please report it") from error
        proved += 1
    seconds = time.perf_counter() - started
    logger.debug(
        "batch %r, pair %r: proved %d ways of %d tensors in %.6f s", part.batch_id, part.pair_name, proved, len(part.agreed), seconds
    )


def _itemsize(source: Held, target: Held, route: Route) -> int:
    """Bytes that an element takes on its way: the narrower dtype's, or the source's where contributions must be combined first."""
    return source.dtype.itemsize if route.others else min(source.dtype.itemsize, target.dtype.itemsize)


def _name(part: Part, position: int, side: Sequence[MemberRecord], sources: Iterable[int]) -> str:
    """What an error calls something of the tensor at ``position``: with all ranks of ``side`` that it comes from, and this rank."""
    own = part.match.index
    givers = ", ".join(_rank(index, side[index]) for index in sources)
    return f"tensor {part.places[position]} of batch {part.batch_id!r}, from {givers} to {_rank(own, part.match.local[own])}"


def _rank(index: int, member: MemberRecord) -> str:
    return f"{member.peer}[{index}] at agent {member.agent.rank}"


def _cut(source: Source, start: tuple[int, ...], box: Box) -> Source:
    if isinstance(source, RemoteRegion):
        return replace(source, start=start, size=box.size)
    return source if tuple(source.shape) == box.size else source[_slices(start, box.size)]


def _slices(start: tuple[int, ...], size: tuple[int, ...]) -> tuple[slice, ...]:
    return tuple(slice(first, first + length) for first, length in zip(start, size, strict=True))
