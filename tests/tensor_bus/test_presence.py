"""An agent's record in the store: lost, taken again, and given back in every order in which that can happen."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import msgspec
import pytest

from etha_ray.errors import StoreUnavailableError
from etha_ray.kvstore import MemoryStore
from etha_ray.kvstore.lease import Lease
from etha_ray.tensor_bus.jobs import Jobs
from etha_ray.tensor_bus.presence import Presence
from etha_ray.tensor_bus.records import SECRET_KEY, AgentRecord, agent_key, decode, manifest_key, verdict_key
from etha_ray.testing import eventually
from tests.kvstore.test_lease import InterruptedStore

RECORD = AgentRecord(3, "incarnation", 1, 0.0, "host", "host", "", "", "", "", "cpu")


class Store(MemoryStore):
    """Leases of it are given once ``open`` is set, and not while it is ``away``."""

    away = False

    def __init__(self) -> None:
        super().__init__("presence")
        self.open = threading.Event()
        self.open.set()

    def lease(self, ttl: float) -> Lease:
        assert self.open.wait(60)
        if self.away:
            raise StoreUnavailableError("it is away")
        return super().lease(ttl)


@pytest.fixture
def store() -> Iterator[Store]:
    store = Store()
    yield store
    store.close()


@pytest.fixture
def jobs() -> Iterator[Jobs]:
    jobs = Jobs(lambda: None)
    yield jobs
    jobs.close()


def test_it_is_there_as_soon_as_it_is_made_and_gone_once_it_has_left(store: Store, jobs: Jobs) -> None:
    presence = Presence(RECORD, store, jobs)
    found = store.get_bytes(agent_key(3))
    assert found is not None
    assert decode(found, AgentRecord, "") == RECORD
    lease = presence.lease
    presence.renew()
    assert presence.lease is lease, "it was not lost"
    presence.leave()
    eventually(lambda: not store.exists(agent_key(3)))


def test_the_last_to_leave_removes_what_was_nobodys_own(store: Store, jobs: Jobs) -> None:
    keys = [manifest_key("0123"), verdict_key("attempt")]
    first, last = (Presence(msgspec.structs.replace(RECORD, rank=rank), store, jobs) for rank in range(2))
    for key in (*keys, SECRET_KEY):
        store.set(key, "said")
    first.leave()
    eventually(lambda: not store.exists(agent_key(0)))
    assert all(store.exists(key) for key in keys)
    last.leave()
    eventually(lambda: list(store.list()) == [SECRET_KEY])


def test_one_that_never_served_or_whose_store_is_away_removes_nothing_but_its_own(store: Store, jobs: Jobs) -> None:
    store.set(manifest_key("0123"), "said")
    Presence(RECORD, store, jobs).close()
    cut_off = Presence(RECORD, store, jobs)
    cut_off.silent_since = time.time()
    cut_off.leave()
    jobs.close()
    assert list(store.list()) == [manifest_key("0123")]


def test_a_store_that_is_away_is_asked_again(store: Store, jobs: Jobs, caplog: pytest.LogCaptureFixture) -> None:
    presence = Presence(RECORD, store, jobs)
    lost = presence.lease
    lost.close()
    store.away = True
    presence.renew()
    eventually(lambda: (jobs.run(jobs.take()), "it is away" in caplog.text)[1])
    assert presence.lease is lost
    store.away = False
    presence.renew()
    eventually(lambda: (jobs.run(jobs.take()), presence.lease is not lost)[1])
    assert store.exists(agent_key(3))
    presence.close()
    assert not store.exists(agent_key(3))


def test_a_lease_that_comes_after_it_has_left_is_given_back(store: Store, jobs: Jobs) -> None:
    presence = Presence(RECORD, store, jobs)
    presence.lease.close()
    store.open.clear()
    presence.renew()
    presence.renew()  # once is enough
    presence.leave()
    store.open.set()
    eventually(lambda: store.exists(agent_key(3)))
    jobs.close()
    assert not store.exists(agent_key(3))


def test_a_store_that_does_not_answer_is_noticed(jobs: Jobs, caplog: pytest.LogCaptureFixture) -> None:
    store = InterruptedStore("presence")
    presence = Presence(RECORD, store, jobs)
    presence.check_store()
    assert presence.silent_since == 0
    away, began = store.granted.away, time.time()
    away.set()
    eventually(lambda: (presence.check_store(), presence.silent_since)[1])
    assert began - 0.1 < presence.silent_since < time.time() - 1
    assert "agent 3: the store has not answered for" in caplog.text
    presence.lease.close()  # it is lost, and the store is still away
    presence.check_store()
    assert presence.silent_since
    away.clear()
    presence.renew()
    eventually(lambda: (jobs.run(jobs.take()), presence.check_store(), not presence.silent_since)[2])
    assert "agent 3: the store answers again" in caplog.text
    presence.close()
    store.close()
