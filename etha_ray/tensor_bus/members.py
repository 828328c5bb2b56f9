"""Claims in the kvstore: who takes which place, who is still missing, who was refused and why."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeVar

from etha_ray.errors import CoordinateTakenError, EthaRayError, error_class
from etha_ray.kvstore import KVStore
from etha_ray.processes import is_alive
from etha_ray.tensor_bus.host import host_identity, shares_memory
from etha_ray.tensor_bus.records import AGENTS, AgentRecord, MemberRecord, NoticeRecord, Verdict, decode, encode, pair_prefix, verdict_key

Claim = TypeVar("Claim", MemberRecord, NoticeRecord)


def gone_among(store: KVStore, members: Iterable[MemberRecord | NoticeRecord]) -> dict[str, bool]:
    """The attempts of those whose worker or agent is not known to live; each with whether it is known never to come back.

    Where memory is shared with an agent, the processes are looked at. Of another host the store knows which agents live, by their
    leases; a worker that dies there is taken out of the pair by its agent. An agent that was cut off from the store for longer than
    its lease, or stood still, comes back, unless another has taken its rank. What says it is this host and shares no memory may be a
    machine cloned from this one: an agent that others can connect to lives while its lease does.
    """
    here = host_identity()
    gone: dict[str, bool] = {}
    living: dict[int, str] | None = None
    for member in members:
        agent = member.agent
        if shares_memory(agent):
            if not (is_alive(member.worker_pid, member.worker_start_time) and is_alive(agent.pid, agent.start_time)):
                gone[member.attempt] = True
        elif agent.host == here and not agent.address:
            gone[member.attempt] = True  # it took its nonce with it
        else:
            if living is None:
                found = (decode(value, AgentRecord, key) for key, value in store.list(AGENTS).items())
                living = {record.rank: record.incarnation for record in found}
            if living.get(agent.rank) != agent.incarnation:
                gone[member.attempt] = agent.rank in living
    return gone


def slot_of(member: MemberRecord, order: int) -> str:
    """The last part of a member's key: its mesh index, or without a mesh a name that sorts by agent rank, then ``order``."""
    return f"{member.index:08d}" if member.index is not None else f"{member.agent.rank:08d}.{order:08d}"


def place_of(pair_name: str, member: MemberRecord, slot: str) -> str:
    """The key of a member's place."""
    return pair_prefix(pair_name, member.peer) + slot


def give_back(store: KVStore, pair_name: str, member: MemberRecord, slot: str) -> None:
    """Give back the place that `claim` took for ``member``, if it did, and what it was told there. May be called more than once."""
    release(store, place_of(pair_name, member, slot), member)
    store.delete(verdict_key(member.attempt))


def claim(store: KVStore, pair_name: str, member: MemberRecord, slot: str) -> str:
    """Take ``slot`` for ``member`` and return its key.

    Raises:
        CoordinateTakenError: a worker that is not known to be dead holds it.
    """
    key = place_of(pair_name, member, slot)
    holder = take(store, key, member)
    if holder is not None:
        raise CoordinateTakenError(
            f"pair {pair_name!r}: index {member.index} of {member.peer!r} is held by pid {holder.worker_pid} on agent"
            f" {holder.agent.rank} ({holder.agent.hostname}); this is pid {member.worker_pid} on agent"
            f" {member.agent.rank}. Give each worker its own coordinate, or close the other worker's client first"
        )
    return key


def take(store: KVStore, key: str, record: Claim) -> Claim | None:
    """Store ``record`` under ``key``, in place of one of the same client or of a dead one; returns who else holds it, if one does."""
    mine, expected = encode(record), None
    while True:
        held = store.compare_and_set(key, expected, mine)
        if held == mine:
            return None
        if held is None:  # deleted between two looks
            expected = None
            continue
        holder = decode(held, type(record), key)
        if not gone_among(store, [holder]) and holder.client_id != record.client_id:
            return holder
        expected = held


def release(store: KVStore, key: str, record: MemberRecord | NoticeRecord) -> None:
    """Give back the place that ``record`` took under ``key``, unless another has taken it since.

    Two steps, as neither torch's store nor the GCS deletes on a condition: who takes the place between them loses it. So who has put
    something there looks whether it still is, and puts it back: `pair.match`, `Notices.read`.
    """
    held = store.get_bytes(key)
    if held is not None and decode(held, type(record), key).attempt == record.attempt:
        store.delete(key)


def members_of(store: KVStore, pair_name: str, peer: str) -> list[MemberRecord]:
    """The members of one side of a pair that live, in the order of their slots."""
    return members_and_absent(store, pair_name, peer)[0]


def members_and_absent(store: KVStore, pair_name: str, peer: str) -> tuple[list[MemberRecord], set[str]]:
    """The members of one side of a pair that live, in the order of their slots, and the attempts of those that may come back."""
    prefix = pair_prefix(pair_name, peer)
    found = {key: decode(value, MemberRecord, key) for key, value in sorted(store.list(prefix).items())}
    gone = gone_among(store, found.values())
    for key, member in found.items():
        if gone.get(member.attempt):
            release(store, key, member)
    living = [member for member in found.values() if member.attempt not in gone]
    return living, {attempt for attempt, for_good in gone.items() if not for_good}


def refuse(store: KVStore, addressees: Iterable[str], error: EthaRayError, told: Iterable[str] = ()) -> None:
    """Tell attempts or registrations why they cannot be matched: whoever finds out first tells the others.

    ``told`` know it already; who is told by this passes it on to those it knows beyond them.
    """
    addressees = set(addressees)
    verdict = encode(Verdict(kind=type(error).__name__, message=str(error), told=tuple(sorted(addressees.union(told)))))
    for addressee in addressees:
        store.set_bytes(verdict_key(addressee), verdict)


def is_refused(store: KVStore, addressee: str) -> bool:
    """Whether an attempt or registration was told so, and is about to withdraw."""
    return store.exists(verdict_key(addressee))


def raise_if_refused(store: KVStore, addressee: str, known: Iterable[str] = ()) -> None:
    """Raise what `refuse` said to ``addressee``, if it did, and pass it on to those ``known`` here who were not told."""
    key = verdict_key(addressee)
    data = store.get_bytes(key)
    if data is not None:
        verdict = decode(data, Verdict, key)
        error = error_class(verdict.kind)(verdict.message)
        refuse(store, set(known).difference(verdict.told), error, verdict.told)
        raise error
