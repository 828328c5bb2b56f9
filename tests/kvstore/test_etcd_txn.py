"""Changes whose answers are lost: made once, whenever the lost request is carried out, if it is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from etha_ray.errors import LeaseExpiredError
from etha_ray.kvstore import EtcdStore, etcd_client
from etha_ray.kvstore.etcd import _CHUNK
from etha_ray.kvstore.etcd_client import TXN, EtcdClient, NoAnswerError
from etha_ray.testing.etcd_server import HOST, EtcdAddress, EtcdServer


class Lossy:
    """Loses the answers of transactions, each as the next of ``fates`` says; those after the last are answered.

    "before": the request is lost. "after": it is carried out, and the answer is lost. "late": it is carried out by `deliver`.
    ``meanwhile`` is called with each loss.
    """

    def __init__(self, attempt: Callable[..., Any]) -> None:
        self._attempt = attempt
        self._late: list[Any] = []
        self.fates: list[str] = []
        self.meanwhile: Callable[[], object] = lambda: None

    def __call__(self, client: EtcdClient, method: Any, message: Any, tolerated: str = "") -> Any:
        fate = self.fates.pop(0) if method is TXN and self.fates else ""
        if fate == "late":
            self._late.append((client, method, message))
        elif fate != "before":
            answer = self._attempt(client, method, message, tolerated)
        if fate:
            self.meanwhile()
            raise NoAnswerError(fate)
        return answer

    def deliver(self) -> None:
        for client, method, message in self._late:
            self._attempt(client, method, message)


@pytest.fixture
def lossy(monkeypatch: pytest.MonkeyPatch) -> Lossy:
    lossy = Lossy(EtcdClient.attempt)
    monkeypatch.setattr(EtcdClient, "attempt", lambda *arguments: lossy(*arguments))
    monkeypatch.setattr(etcd_client, "_PAUSE", 0.001)
    return lossy


CHANGES: dict[str, Callable[[EtcdStore], object]] = {
    "add": lambda store: store.add("n", 1),
    "append": lambda store: store.append("n", b"0"),
    "append large": lambda store: store.append("n", bytes(2 * _CHUNK)),
    "set": lambda store: store.set("n", "9"),
    "set large": lambda store: store.set_bytes("n", bytes(2 * _CHUNK)),
    "compare": lambda store: store.compare_and_set("n", b"5", b"6"),
    "compare in vain": lambda store: store.compare_and_set("n", b"4", b"6"),
    "compare missing": lambda store: store.compare_and_set("new", None, b"6"),
    "delete": lambda store: store.delete("n"),
    "delete missing": lambda store: store.delete("new"),
    "delete_prefix": lambda store: store.delete_prefix(""),
    "lease": lambda store: store.lease(600).set("n", "7"),
}
FATES = [["before"], ["after"], ["late"], ["before", "late"], ["late", "after"], ["after", "late", "before"]]


@pytest.mark.parametrize("fates", FATES, ids="-".join)
@pytest.mark.parametrize("used", [True, False], ids=["used", "new"])
@pytest.mark.parametrize("change", CHANGES)
def test_a_change_is_made_once(etcd: EtcdAddress, namespace: str, lossy: Lossy, change: str, used: bool, fates: list[str]) -> None:
    outcomes = []
    for losing in ([], fates):
        store = EtcdStore(etcd.host, etcd.port, namespace=f"{namespace}-{len(losing)}")
        if used:
            store.set("n", "1")
        other = EtcdStore(etcd.host, etcd.port, namespace=store.namespace)
        other.set("n", "5")
        other.set("m", "5")
        lossy.fates = [*losing]
        answer = CHANGES[change](store)
        after = other.list()
        lossy.fates = []
        # What comes late finds everything as it was before the change, and the store at rest or at work.
        other.set("n", "5")
        other.delete("new")
        before_late = other.list()
        lossy.deliver()
        assert other.list() == before_late
        assert store.add("n", 1) == 6
        lossy.deliver()
        assert other.add("n", 1) == 7
        outcomes.append((answer, after))
        store.close()
        other.close()
    assert outcomes[0] == outcomes[1]


def test_two_that_add_the_same(etcd: EtcdAddress, namespace: str, lossy: Lossy) -> None:
    """A request is lost, and another store makes just the change that this one wanted to make."""
    store, other = (EtcdStore(etcd.host, etcd.port, namespace=namespace) for _ in range(2))
    for fate in ("before", "after", "late"):
        store.set("n", "5")
        lossy.meanwhile = lambda: other.add("n", 1)
        lossy.fates = [fate]
        assert store.add("n", 1) == (6 if fate == "after" else 7)
        assert store.get("n") == b"7"
        lossy.deliver()
        assert store.get("n") == b"7"
    other.close()
    store.close()


def test_cleaned_up_by_another(etcd: EtcdAddress, namespace: str, lossy: Lossy) -> None:
    """The slot goes with its namespace, before a change and in the middle of one."""
    store = EtcdStore(etcd.host, etcd.port, namespace=namespace)
    for fates in ([], ["before"], ["late"]):
        store.set("k", "v")
        store.set("k", "v")
        EtcdStore(etcd.host, etcd.port, namespace=namespace).close(cleanup=True)
        lossy.fates = [*fates]
        assert store.add("n", 1) == 1
        assert store.add("n", 1) == 2
    store.close()


def test_a_lease_that_ran_out_while_the_answer_was_lost(own_etcd: EtcdServer, lossy: Lossy) -> None:
    store = EtcdStore(HOST, own_etcd.port)
    lease = store.lease(600)
    store._client.call(lambda endpoint: endpoint.lease.LeaseRevoke, revoke(lease))
    lossy.fates = ["before"]
    with pytest.raises(LeaseExpiredError):
        lease.set("k", "v")
    assert not lease.alive
    assert store.list() == {}
    store.close()


def revoke(lease: Any) -> Any:
    from pyetcd import etcdrpc

    return etcdrpc.LeaseRevokeRequest(ID=lease._grant._id)
