"""Who counts as a member of a pair: agents of other hosts that are away for a while, and those that never come back."""

from __future__ import annotations

from contextlib import closing

import msgspec

from etha_ray.kvstore import KVStore, MemoryStore
from etha_ray.tensor_bus.members import claim, members_and_absent, members_of
from etha_ray.tensor_bus.records import AgentRecord, MemberRecord, agent_key, encode


def far_agent(incarnation: str = "first") -> AgentRecord:
    """On a host of which nothing but the store is known here."""
    return AgentRecord(3, incarnation, 77, 1.0, "far", "far:0", "/nowhere", "nonce", "/queue", "/state", "cpu", "198.51.100.1:9")


def joined(store: KVStore) -> MemberRecord:
    member = MemberRecord("attempt", "a", "b", 1, None, 0, "client", 78, 1.0, far_agent())
    claim(store, "pair", member, "0")
    return member


def test_one_whose_agent_is_away_keeps_its_place() -> None:
    with closing(MemoryStore()) as store:
        member = joined(store)
        assert members_and_absent(store, "pair", "a") == ([], {"attempt"})
        store.set_bytes(agent_key(3), encode(far_agent()))  # it has a lease again
        assert members_and_absent(store, "pair", "a") == ([member], set())


def test_one_whose_agent_was_replaced_is_removed() -> None:
    with closing(MemoryStore()) as store:
        joined(store)
        store.set_bytes(agent_key(3), encode(far_agent("second")))
        assert members_and_absent(store, "pair", "a") == ([], set())
        assert store.list("pair/") == {}


def test_another_may_take_the_place_of_one_that_is_away() -> None:
    with closing(MemoryStore()) as store:
        first = joined(store)
        store.set_bytes(agent_key(4), encode(msgspec.structs.replace(far_agent("another"), rank=4)))
        second = msgspec.structs.replace(
            first, attempt="next", client_id="next", agent=msgspec.structs.replace(far_agent("another"), rank=4)
        )
        claim(store, "pair", second, "0")
        assert members_of(store, "pair", "a") == [second]
