"""What is taken back while the store is away is taken back once it is there again, and nobody waits for ever in its place."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from functools import partial

import pytest
import torch

from etha_ray.errors import BatchUnmatchedError, StoreError, StoreUnavailableError
from etha_ray.tensor_bus.jobs import Jobs
from etha_ray.tensor_bus.withdrawals import Withdrawals
from etha_ray.testing import eventually, succeed
from tests.tensor_bus.cluster import LONG, LocalCluster, registered


class Store:
    """One that may be away; ``asked`` for what, in order."""

    def __init__(self) -> None:
        self.away, self.asked = True, list[str]()

    def delete(self, key: str) -> Callable[[], None]:
        def work() -> None:
            self.asked.append(key)
            if self.away:
                raise StoreUnavailableError("it is away")

        return work


@pytest.fixture
def jobs() -> Iterator[Jobs]:
    jobs = Jobs(lambda: None)
    yield jobs
    jobs.close()


def settled(jobs: Jobs, condition: Callable[[], bool]) -> None:
    eventually(lambda: (jobs.run(jobs.take()), condition())[1])


def test_what_can_be_taken_back_is_done_at_once(jobs: Jobs) -> None:
    store, said = Store(), list[str]()
    store.away = False
    Withdrawals(jobs).start("one", store.delete("one"), lambda: said.append("tried"), lambda: said.append("done"))
    settled(jobs, lambda: said == ["done", "tried"])
    assert store.asked == ["one"]


def test_a_store_that_is_away_is_asked_again_and_nobody_waits_for_it(jobs: Jobs, caplog: pytest.LogCaptureFixture) -> None:
    store, said = Store(), list[str]()
    withdrawals = Withdrawals(jobs)
    for key in ("one", "two"):
        withdrawals.start(key, store.delete(key), lambda key=key: said.append(f"{key} tried"), lambda key=key: said.append(f"{key} done"))  # type: ignore[misc]
        settled(jobs, lambda key=key: f"{key} tried" in said)  # type: ignore[misc]
    assert "the store is away" in caplog.text
    del store.asked[:]
    withdrawals.again()
    withdrawals.again()  # the first is under way
    settled(jobs, lambda: withdrawals._job is None)
    assert store.asked == ["one"], "a store that is away is asked once"
    store.away = False
    withdrawals.again()
    settled(jobs, lambda: said[2:] == ["one done", "two done"])
    del store.asked[:]
    withdrawals.again()
    assert withdrawals._job is None
    assert store.asked == []


def test_nobody_waits_for_a_store_that_is_known_to_be_silent(jobs: Jobs) -> None:
    """And who waits is told once, whatever comes of it."""
    answers, said = threading.Event(), list[str]()
    withdrawals = Withdrawals(jobs)

    def start(name: str) -> None:
        withdrawals.start(name, partial(_wait, answers), lambda: said.append(f"{name} tried"), lambda: said.append(name))

    start("before")
    withdrawals.again(silent=False)
    jobs.run(jobs.take())
    assert said == []
    withdrawals.again(silent=True)
    assert said == ["before tried"]
    start("after")
    assert said == ["before tried"]
    settled(jobs, lambda: said == ["before tried", "after tried"])
    answers.set()
    settled(jobs, lambda: len(said) >= 4)
    assert sorted(said[2:]) == ["after", "before"]
    withdrawals.again(silent=False)
    start("later")
    settled(jobs, lambda: said[4:] == ["later", "later tried"])


def test_one_that_fails_for_another_reason_keeps_no_other_from_being_taken_back(jobs: Jobs, caplog: pytest.LogCaptureFixture) -> None:
    store, said = Store(), list[str]()
    withdrawals = Withdrawals(jobs)
    broken = store.delete("broken")

    def fails() -> None:
        broken()
        raise ZeroDivisionError("a fault of ours")

    withdrawals.start("broken", fails, lambda: None, lambda: said.append("broken"))
    withdrawals.start("whole", store.delete("whole"), lambda: None, lambda: said.append("whole"))
    settled(jobs, lambda: store.asked.count("broken") + store.asked.count("whole") == 2 and len(withdrawals._owed) == 2)
    store.away = False

    def all_done() -> bool:
        withdrawals.again()
        return sorted(said) == ["broken", "whole"]

    settled(jobs, all_done)
    assert "a fault of ours" in caplog.text


@pytest.fixture
def cluster() -> Iterator[LocalCluster]:
    with LocalCluster(2) as made:
        yield made


def test_a_client_that_leaves_while_the_store_is_away_leaves_its_place(cluster: LocalCluster, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its process lives on, and so does its agent: nothing else would ever free the place."""
    one, two = cluster.pair("p")
    handlers = registered(one, two, "p", torch.ones(3), torch.zeros(3))
    succeed(
        lambda: handlers[0].transfer("send", blocking=True, timeout=LONG), lambda: handlers[1].transfer("recv", timeout=LONG).result(LONG)
    )
    with monkeypatch.context() as patch:
        patch.setattr(cluster.store, "delete", _away)
        one.close()
        two.close()
    again = cluster.pair("p")
    target = torch.zeros(3)
    handlers = registered(*again, "p", torch.ones(3), target)
    handlers[0].transfer("send")
    handlers[1].transfer("recv").result(LONG)
    assert torch.equal(target, torch.ones(3))


def test_a_batch_that_is_closed_while_the_store_is_away_can_be_registered_again(
    cluster: LocalCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two = cluster.pair("p")
    for away in (True, False):
        handlers = registered(one, two, "p", torch.ones(3), torch.zeros(3))
        with monkeypatch.context() as patch:
            if away:
                patch.setattr(cluster.store, "delete", _away)
            for handler in handlers:
                handler.close()


def test_a_batch_that_nobody_matched_while_the_store_went_away_can_be_registered_again(
    cluster: LocalCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two = cluster.pair("p")
    with monkeypatch.context() as patch:
        patch.setattr(cluster.store, "delete", _away)
        with pytest.raises(BatchUnmatchedError):
            one.register_tensors("x", [(torch.ones(3), "p")], timeout=0.2)
        assert len(cluster.store.list("batch/")) == 1
    target = torch.zeros(3)
    handlers = registered(one, two, "p", torch.ones(3), target)
    handlers[0].transfer("send")
    handlers[1].transfer("recv").result(LONG)
    assert torch.equal(target, torch.ones(3))


def test_a_batch_that_is_registered_again_while_the_store_is_away_leaves_nothing_of_the_first_time(
    cluster: LocalCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two = cluster.pair("p")
    source, target = torch.ones(3), torch.zeros(3)
    first, second = registered(one, two, "p", source, target)
    with monkeypatch.context() as patch:
        patch.setattr(cluster.store, "delete", _away)
        second.close()
        with pytest.raises(TimeoutError):
            first.wait_ready(0.5)  # it is registered again, and nobody is there
    second = two.register_tensors("x", [(target, "p")], timeout=LONG)
    first.wait_ready(LONG)
    assert len(cluster.store.list("batch/")) == 2
    first.transfer("send")
    second.transfer("recv").result(LONG)
    assert torch.equal(target, source)


def test_who_comes_meanwhile_hears_that_the_store_is_away(cluster: LocalCluster, monkeypatch: pytest.MonkeyPatch) -> None:
    """And not that somebody is slow to leave."""
    one, two = cluster.pair("p")
    handler, _ = registered(one, two, "p", torch.ones(3), torch.zeros(3))
    again = cluster.client(0)
    with monkeypatch.context() as patch:
        for name in ("delete", "exists", "list", "get_bytes", "set_bytes", "compare_and_set"):
            patch.setattr(cluster.store, name, _away)
        handler.close()
        with pytest.raises(StoreUnavailableError):
            one.register_tensors("x", [(torch.ones(3), "p")], timeout=LONG)
        one.close()
        with pytest.raises(StoreUnavailableError):
            again.init_pair("p", "a", "b", 1, timeout=LONG)
    again.init_pair("p", "a", "b", 1, timeout=LONG)


def test_a_place_taken_as_the_store_went_away_is_given_back(cluster: LocalCluster, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who could not be matched may have taken its place all the same."""
    one = cluster.client(0)
    with monkeypatch.context() as patch:
        for name in ("delete", "list"):
            patch.setattr(cluster.store, name, _away)
        with pytest.raises(StoreError):
            one.init_pair("pair", "a", "b", 1, timeout=LONG)
        assert cluster.store.exists("pair/pair/a/00000000.00000001")
    cluster.pair("pair")


def _wait(event: threading.Event) -> None:
    assert event.wait(LONG)


def _away(*_: object, **__: object) -> bool:
    raise StoreUnavailableError("it is away")
