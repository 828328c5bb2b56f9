"""What a registration comes to once all members agree: the other members, their memory opened, and what is to move prepared."""

from __future__ import annotations

from collections.abc import Container, Sequence
from dataclasses import dataclass, field, fields
from functools import partial

from etha_ray.errors import EthaRayError
from etha_ray.memory import OpenedTensors
from etha_ray.tensor_bus.agreement import Agreement, Direction
from etha_ray.tensor_bus.digested import Digested
from etha_ray.tensor_bus.executor import Inflow, Inflows, Part, bytes_out, inflows, prove_in, takers
from etha_ray.tensor_bus.feeding import STAGE_BYTES, Fed, Feed
from etha_ray.tensor_bus.records import BatchRecord, MemberRecord, Standing
from etha_ray.tensor_bus.staging import Staging
from etha_ray.tensor_bus.ways import Ways
from etha_ray.transport.base import NoProgram
from etha_ray.transport.joint import Source, prepare


@dataclass(frozen=True)
class Peer:
    """Another member of the batch."""

    registration: str
    name: str
    member: MemberRecord
    bytes: int
    remote: bool
    """Its agent shares no memory with this one: what moves between them goes over the network."""


@dataclass(frozen=True)
class Membership:
    """A worker's place in a pair of the batch: ``index`` of ``size``, in the order of its side."""

    pair: str
    member: MemberRecord
    index: int
    size: int


@dataclass
class Registered:
    """What a registration came to: everything a transfer needs.

    ``targets`` get bytes from this rank and ``sources`` give it some; ``others`` are all other members, of both sides, and ``side``
    those of this worker's own. By registration, and so are their ``standings``. ``refused`` says why a direction is impossible: such
    a transfer fails with it, and nobody waits for it. ``received`` are the positions, among the worker's tensors, of those that a
    receive writes; ``feeds`` says of each copy of ``feed`` which of them it writes, and from whom. ``relays`` are members of this side
    that pass something on to this rank, and ``instead`` what the senders would have to give if one of them did not; ``takers`` are
    those to whom this rank passes something on. ``digested`` are the worker's tensors, for their digests.
    """

    targets: dict[str, Peer] = field(default_factory=dict)
    sources: dict[str, Peer] = field(default_factory=dict)
    others: dict[str, Peer] = field(default_factory=dict)
    standings: dict[str, Standing] = field(default_factory=dict)
    side: set[str] = field(default_factory=set)
    refused: dict[Direction, EthaRayError] = field(default_factory=dict)
    received: tuple[int, ...] = ()
    memberships: tuple[Membership, ...] = ()
    feeds: list[tuple[int, frozenset[str]]] = field(default_factory=list)
    relays: dict[str, Peer] = field(default_factory=dict)
    instead: dict[str, dict[str, int]] = field(default_factory=dict)
    takers: set[str] = field(default_factory=set)
    feed: Feed = field(default_factory=lambda: _no_feed())
    digested: tuple[Digested, ...] = ()
    staging: Staging = field(default_factory=lambda: Staging((), lambda _: NoProgram()))
    opened: list[OpenedTensors] = field(default_factory=list)

    def take(self, newer: Registered) -> None:
        """Become what a newer agreement came to. The worker's own memory, which was opened first, stays."""
        del self.opened[1:]
        opened = [*self.opened, *newer.opened]
        for each in fields(self):
            setattr(self, each.name, getattr(newer, each.name))
        self.opened = opened

    def close(self) -> None:
        """Let go of all memory; no program runs any more."""
        self.feed, self.staging, self.digested = _no_feed(), Staging((), lambda _: NoProgram()), ()
        for opened in self.opened:
            opened.close()
        self.opened.clear()


@dataclass(frozen=True)
class AgreedPart:
    """One pair's part of a batch: this rank's tensors, everyone's records, and what they agreed to."""

    part: Part
    agreement: Agreement
    local: Sequence[BatchRecord]
    remote: Sequence[BatchRecord]


def connect(ways: Ways, parts: Sequence[AgreedPart], bucket_size: int) -> Registered:
    """Open what this rank receives, and prepare to move it.

    Raises:
        LayoutError, TensorMismatchError: neither direction is possible, or a plan does not prove right.
        NoTransportError: a member that bytes must come from, or go to, shares no memory with this agent, and one has no address.
        HandleExpiredError, MemoryHandleError, PeerLostError: a sender's memory cannot be opened, or its agent not be reached.
        ConfigError: the network does not take buckets of this size.
    """
    ways = ways.afresh()
    result = Registered()
    result.digested = tuple(_digested(part) for part in parts)
    matches = [(part.part.pair_name, part.part.match) for part in parts]
    result.memberships = tuple(Membership(name, match.local[match.index], match.index, len(match.local)) for name, match in matches)
    for part in parts:
        for direction, error in part.agreement.refused.items():
            result.refused.setdefault(direction, error)
    if len(result.refused) == 2:
        raise result.refused["send"]
    found: list[Fed] = []
    try:
        for part in parts:
            moves = _connect(ways, part, result)
            if result.relays or result.takers:  # in an order, and in parts, that all who pass them on agree on
                moves = sorted((piece for inflow in moves for piece in inflow.cut(STAGE_BYTES)), key=lambda inflow: inflow.key)
            for inflow in moves:
                relay = None if inflow.relay is None else part.local[inflow.relay].registration
                found.append(Fed(inflow, relay, part.part.pair_name, inflow.key))
                result.feeds.append((inflow.place, frozenset(part.remote[source].registration for source in inflow.sources)))
        result.received = tuple(sorted({place for place, _ in result.feeds}))
        prepared = partial(prepare, mapped=ways.mapped, network=ways.network, bucket_size=bucket_size)
        divided = bool(result.relays or result.takers)
        result.feed = Feed(found, lambda inflow: inflow.move.target, prepared, divided=divided)
        for relay in result.feed.warm():
            del result.relays[relay]  # what it would pass on is read from the senders
        result.staging = Staging(found, prepared)
    except BaseException:
        result.close()
        raise
    return result


def _digested(agreed: AgreedPart) -> Digested:
    part, members = agreed.part, [record.registration for record in agreed.local]
    return Digested(part.pair_name, part.places, part.tensors, [tensor.local for tensor in part.agreed], part.match.index, members)


def _no_feed() -> Feed:
    return Feed((), lambda inflow: inflow.tensor, lambda _: NoProgram())


def torn_positions(registered: Registered, spoilt: Container[str], unfinished: frozenset[int] | None) -> tuple[int, ...]:
    """The tensors that may hold bytes of two versions, once the data of ``spoilt`` did not stand while the program read it, or some of
    its copies were left ``unfinished`` (None: nobody knows which)."""
    if unfinished is None:
        return registered.received
    feeds = enumerate(registered.feeds)
    return tuple(sorted({place for at, (place, sources) in feeds if at in unfinished or any(source in spoilt for source in sources)}))


def _connect(ways: Ways, agreed: AgreedPart, result: Registered) -> list[Inflow]:
    """What one pair moves; notes its members in ``result``."""
    part, match = agreed.part, agreed.part.match
    for index, record in enumerate(agreed.local):
        if index != match.index:
            member = match.local[index]
            remote = not ways.is_mapped(member.agent)
            result.others[record.registration] = Peer(record.registration, f"{member.peer}[{index}]", member, 0, remote)
            result.standings[record.registration] = record.standing or Standing()
            result.side.add(record.registration)

    def open_remote(index: int, positions: Sequence[int]) -> Sequence[Source]:
        member, registration = match.remote[index], agreed.remote[index].registration
        opened = ways.open(member, registration, part, positions)
        if opened is None:
            ways.check_source(part, member)
            return ways.regions(member, export_name(registration, part.pair_name), part, positions)
        result.opened.append(opened)
        return opened.tensors

    def open_relay(index: int, positions: Sequence[int]) -> Sequence[Source] | None:
        member, registration = match.local[index], agreed.local[index].registration
        opened = ways.open(member, registration, part, positions)
        if opened is not None:
            result.opened.append(opened)
            return opened.tensors
        if not ways.can_reach(member.agent):
            return None  # it reads from others, and gives to nobody
        return ways.regions(member, export_name(registration, part.pair_name), part, positions, local=True)

    found = Inflows()
    if "recv" not in result.refused:
        prove_in(part)
        found = inflows(part, open_remote, open_relay)
        result.takers |= {agreed.local[index].registration for index in takers(part)}
    bytes_from = found.direct
    _note_relays(ways, agreed, found, result)
    bytes_to = bytes_out(part) if "send" not in result.refused else {}
    for index, record in enumerate(agreed.remote):
        member = match.remote[index]
        name, remote = f"{member.peer}[{index}]", not ways.is_mapped(member.agent)
        known = result.others.get(record.registration)
        if known is not None and known.name != name:
            name = f"{known.name}+{name}"  # in several pairs of this batch
        result.others[record.registration] = Peer(record.registration, name, member, 0, remote)
        result.standings[record.registration] = record.standing or Standing()
        for table, counts in ((result.sources, bytes_from), (result.targets, bytes_to)):
            before = table[record.registration].bytes if record.registration in table else None
            if index in counts or before is not None:
                table[record.registration] = Peer(record.registration, name, member, (before or 0) + counts.get(index, 0), remote)
        if index in bytes_to:
            ways.check_target(part, member)
    return found.moves


def _note_relays(ways: Ways, agreed: AgreedPart, found: Inflows, result: Registered) -> None:
    """Enter who passes on what to this rank."""
    for index, size in found.relayed.items():
        registration, member = agreed.local[index].registration, agreed.part.match.local[index]
        known = result.relays.get(registration)
        name, remote = f"{member.peer}[{index}]", not ways.is_mapped(member.agent)
        result.relays[registration] = Peer(registration, name, member, size + (0 if known is None else known.bytes), remote)
        instead = result.instead.setdefault(registration, {})
        for source, given in found.instead[index].items():
            of = agreed.remote[source].registration
            instead[of] = instead.get(of, 0) + given


def export_name(registration: str, pair_name: str) -> str:
    """Under which name an agent gives the tensors of one pair to agents of other hosts."""
    return f"{registration}/{pair_name}"
