"""An owner's side of a lease: renewing through a store's absence, and ending once."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable

import pytest

from etha_ray.errors import LeaseExpiredError, StoreError, StoreUnavailableError
from etha_ray.kvstore import MemoryStore
from etha_ray.kvstore.lease import Grant
from etha_ray.testing import eventually


class Interrupted:
    """A grant whose store can be away, and which says when it was renewed."""

    def __init__(self, grant: Grant) -> None:
        self.grant = grant
        self.away = threading.Event()
        self.failed, self.renewed = threading.Event(), threading.Event()

    @property
    def ttl(self) -> float:
        return self.grant.ttl

    def put(self, full: str, data: bytes) -> None:
        self._reach(lambda: self.grant.put(full, data))

    def renew(self) -> None:
        self._reach(self.grant.renew)
        self.renewed.set()

    def revoke(self) -> None:
        self._reach(self.grant.revoke)

    def _reach(self, use: Callable[[], None]) -> None:
        if self.away.is_set():
            self.failed.set()
            raise StoreUnavailableError("it is away")
        use()


class InterruptedStore(MemoryStore):
    def _grant(self, ttl: float) -> Grant:
        self.granted = Interrupted(super()._grant(ttl))
        return self.granted


@pytest.fixture
def store() -> InterruptedStore:
    return InterruptedStore(uuid.uuid4().hex)


def test_a_store_that_is_away_for_less_than_the_ttl(store: InterruptedStore) -> None:
    lease = store.lease(6.0)
    lease.set("k", "1")
    store.granted.away.set()
    assert store.granted.failed.wait(60)
    assert lease.alive
    first = lease.silence
    with pytest.raises(StoreUnavailableError):
        lease.renew()
    assert lease.silence > first > 0, "since it was first asked in vain"
    with pytest.raises(StoreUnavailableError):
        lease.set("k", "2")
    store.granted.away.clear()
    store.granted.renewed.clear()
    assert store.granted.renewed.wait(60)
    assert lease.alive
    eventually(lambda: lease.silence == 0)
    assert store.get("k") == b"1"
    lease.close()
    assert store.get("k") is None


def test_a_store_that_is_away_for_longer(store: InterruptedStore) -> None:
    lease = store.lease(0.5)
    store.granted.away.set()
    deadline = time.monotonic() + 60
    while lease.alive:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    store.granted.away.clear()
    for use in (lambda: lease.set("k", "1"), lease.renew):
        with pytest.raises(LeaseExpiredError, match=r"not renewed within 0\.5 s"):
            use()
    assert not lease.alive
    assert lease._keeper is not None
    lease._keeper.join(60)
    assert not lease._keeper.is_alive()
    assert store.list("") == {}


def test_closing_while_the_store_is_away_is_no_error(store: InterruptedStore) -> None:
    lease = store.lease(600.0)
    store.granted.away.set()
    lease.close()
    assert not lease.alive
    store.close()


def test_the_thread_ends_with_the_lease(store: InterruptedStore) -> None:
    closed, left = store.lease(600.0), store.lease(600.0)
    closed.close()
    store.close()
    for lease in (closed, left):
        assert lease._keeper is not None
        lease._keeper.join(60)
        assert not lease._keeper.is_alive()


def test_a_store_closed_while_a_lease_is_granted_keeps_none(store: InterruptedStore, monkeypatch: pytest.MonkeyPatch) -> None:
    grant = InterruptedStore._grant

    def close_meanwhile(self: InterruptedStore, ttl: float) -> Grant:
        granted = grant(self, ttl)
        self.close()
        return granted

    monkeypatch.setattr(InterruptedStore, "_grant", close_meanwhile)
    with pytest.raises(RuntimeError, match="closed"):
        store.lease(600.0)
    with pytest.raises(LeaseExpiredError):
        store.granted.grant.renew()


def test_a_process_that_keeps_a_lease_can_exit() -> None:
    program = "from etha_ray.kvstore import MemoryStore; lease = MemoryStore().lease(600.0); lease.set('k', '1')"
    subprocess.run([sys.executable, "-c", program], check=True, timeout=250)


def test_a_store_that_refuses_is_not_silent(store: InterruptedStore, monkeypatch: pytest.MonkeyPatch) -> None:
    lease = store.lease(60.0, renew=False)
    store.granted.away.set()
    with pytest.raises(StoreUnavailableError):
        lease.renew()
    assert lease.silence > 0

    def refuse() -> None:
        raise StoreError("its password was changed")

    monkeypatch.setattr(store.granted, "renew", refuse)
    with pytest.raises(StoreError):
        lease.renew()
    assert lease.silence == 0
