"""What an etcd store does when servers are killed, silent or gone, and when answers are lost."""

from __future__ import annotations

import contextlib
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from itertools import count
from typing import Any

import pytest

from etha_ray.errors import StoreClosedError, StoreUnavailableError
from etha_ray.kvstore import EtcdStore, create_store
from etha_ray.kvstore.etcd import _CHUNK
from etha_ray.kvstore.watch import KeyEvent
from etha_ray.testing.calls import eventually
from etha_ray.testing.etcd_server import HOST, EtcdServer
from tests.fresh import fresh
from tests.kvstore.etcd_server import start_cluster, watching
from tests.net.silent import unheard


@pytest.fixture
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[EtcdServer]]:
    members = start_cluster(tmp_path_factory.mktemp("cluster"), 3)
    yield members
    for member in members:
        member.kill()  # one that is asked to stop hands over to others first, and waits for those that are gone


@contextmanager
def impatient(store: EtcdStore) -> Iterator[None]:
    """As if the store had been made with a short timeout, which is too short for a test's busy machine to do anything else."""
    patience, store._client._patience = store._client._patience, 0.5
    try:
        yield
    finally:
        store._client._patience = patience


# --- nobody there ------------------------------------------------------------------------------------------------------------------------


def test_nobody_listens() -> None:
    with (
        unheard() as first,
        unheard() as second,
        pytest.raises(StoreUnavailableError, match=f"etcd://{first},{second},.*Is it running") as caught,
    ):
        EtcdStore(endpoints=[str(first), str(second)], timeout=1.0)
    assert isinstance(caught.value, ConnectionError)


def test_a_host_that_is_not_there() -> None:
    with pytest.raises(StoreUnavailableError, match=r"etcd://nosuchhost\.invalid:2379"):
        EtcdStore("nosuchhost.invalid", timeout=0.5)


def test_a_server_that_says_nothing() -> None:
    with socket.create_server((HOST, 0)) as server:
        port = server.getsockname()[1]
        with pytest.raises(StoreUnavailableError, match=f"{HOST}:{port}"):
            EtcdStore(HOST, port, timeout=1.0)


# --- a server that goes and comes back ---------------------------------------------------------------------------------------------------


def test_waits_survive_a_restart(own_etcd: EtcdServer, background: ThreadPoolExecutor) -> None:
    store, other = create_store(own_etcd.url), create_store(own_etcd.url)
    assert isinstance(store, EtcdStore)
    waits: list[Future[Any]] = [
        background.submit(store.wait_for_key, "k", 60),
        background.submit(store.wait_for_value, "v", "2", 60),
        background.submit(store.wait_for_keys, "many/*", 2, None, 60),
        background.submit(store.watch("watched").next, 60),
    ]
    for _ in range(2):
        watching(store, len(waits))
        own_etcd.kill()
        eventually(lambda: all(watch.id is None for watch in tuple(store._watches._watches)))
        own_etcd.restart()
    watching(store, len(waits))
    assert not any(wait.done() for wait in waits)
    for key in ("k", "many/1", "many/2", "watched"):
        other.set(key, "1")
    other.set("v", "2")
    assert [wait.result(60) for wait in waits] == [b"1", b"2", ["many/1", "many/2"], KeyEvent("watched", b"1")]
    other.close()
    store.close()


def test_what_happens_while_no_watch_is_there(own_etcd: EtcdServer, background: ThreadPoolExecutor) -> None:
    """A key that is set after the restart, before the watch begins again."""
    store, other = EtcdStore(HOST, own_etcd.port), EtcdStore(HOST, own_etcd.port)
    for n in range(3):
        wait = background.submit(store.wait_for_key, f"k{n}", 60)
        watching(store)
        own_etcd.kill()
        put = background.submit(other.set, f"k{n}", "v")
        own_etcd.restart()
        put.result(60)
        assert wait.result(60) == b"v"
    other.close()
    store.close()


def test_data_that_is_lost(own_etcd: EtcdServer, background: ThreadPoolExecutor) -> None:
    """A new etcd at the same address, whose revisions begin at 1."""
    store = EtcdStore(HOST, own_etcd.port)
    for n in range(50):
        store.set("old", str(n))
    wait = background.submit(store.wait_for_key, "k", 60)
    watching(store)
    own_etcd.kill()
    shutil.rmtree(own_etcd.folder / own_etcd.name)
    own_etcd.restart()
    assert store.get("old") is None
    assert store.add("n", 1) == 1
    store.set("k", "v")
    assert wait.result(60) == b"v"
    store.close()


def test_calls_wait_for_a_restart(own_etcd: EtcdServer, background: ThreadPoolExecutor) -> None:
    store = EtcdStore(HOST, own_etcd.port)
    store.set("k", "v")
    store.set("n", "1")
    with store.lease(60) as lease:
        own_etcd.kill()
        calls: list[tuple[Callable[[], object], object]] = [
            (lambda: store.get("k"), b"v"),
            (lambda: store.exists("k"), True),
            (lambda: store.add("n", 1), 2),
            (lambda: store.compare_and_set("c", None, b"1"), b"1"),
            (lambda: store.set("s", "1"), None),
            (lambda: store.set_bytes("large", bytes(3 * _CHUNK)), None),
            (lambda: store.delete("missing"), False),
            (lambda: lease.set("l", "1"), None),
            (lambda: lease.renew(), None),
        ]
        answers = [background.submit(call) for call, _ in calls]
        own_etcd.restart()
        assert [answer.result(60) for answer in answers] == [expected for _, expected in calls]
        assert store.list() == {"k": b"v", "n": b"2", "c": b"1", "s": b"1", "l": b"1", "large": bytes(3 * _CHUNK)}
    store.close()


def add_and_report(port: int, number: int) -> None:
    store = EtcdStore(HOST, port)
    for _ in count():
        store.add("n", 1)
        store.set(f"by/{number}", str(int(store.get(f"by/{number}") or b"0") + 1))
        if store.exists("stop"):
            break
    store.close(cleanup=False)


def test_no_add_is_lost_or_made_twice_when_the_server_is_killed(own_etcd: EtcdServer) -> None:
    store = EtcdStore(HOST, own_etcd.port)
    processes = [fresh.Process(target=add_and_report, args=(own_etcd.port, n), daemon=True) for n in range(4)]
    for process in processes:
        process.start()
    for _ in range(4):
        now = int(store.get("n") or b"0")
        eventually(lambda now=now: int(store.get("n") or b"0") > now + 20)  # type: ignore[misc]
        own_etcd.kill()
        own_etcd.restart()
    store.set("stop", "1")
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0] * 4
    assert int(store.get("n") or b"0") == sum(int(value) for value in store.list("by/").values())
    store.close()


def test_a_lease_is_kept_through_a_restart(own_etcd: EtcdServer) -> None:
    store = EtcdStore(HOST, own_etcd.port)
    lease = store.lease(60)
    lease.set("k", "v")
    own_etcd.kill()
    own_etcd.restart()
    lease.renew()
    assert lease.alive
    assert store.get("k") == b"v"
    lease.close()
    assert store.get("k") is None
    store.close()


# --- a server that stays away ------------------------------------------------------------------------------------------------------------


def test_a_longer_outage(own_etcd: EtcdServer, background: ThreadPoolExecutor) -> None:
    store = EtcdStore(HOST, own_etcd.port)
    store.set("k", "v")
    wait = background.submit(store.wait_for_key, "never", 60)
    watching(store)
    with impatient(store):
        own_etcd.kill()
        with pytest.raises(StoreUnavailableError, match=f"{HOST}:{own_etcd.port}"):
            wait.result(60)
        for use in (lambda: store.get("k"), lambda: store.set("k", "v"), lambda: store.add("n", 1), lambda: store.list()):
            with pytest.raises(StoreUnavailableError, match=f"{HOST}:{own_etcd.port}"):
                use()
    own_etcd.restart()
    assert store.get("k") == b"v"
    store.set("k", "w")
    assert store.wait_for_value("k", "w", 30) == b"w"
    store.close()


def test_a_wait_whose_time_ends_in_an_outage(own_etcd: EtcdServer) -> None:
    store = EtcdStore(HOST, own_etcd.port)
    own_etcd.kill()
    start = time.monotonic()
    for timeout in (0, 0.5):
        with pytest.raises(StoreUnavailableError):
            store.wait_for_key("k", timeout)
    assert time.monotonic() - start < 20
    store.close()


def test_closing_in_an_outage(own_etcd: EtcdServer, background: ThreadPoolExecutor) -> None:
    store = EtcdStore(HOST, own_etcd.port)
    store.lease(60).set("k", "v")
    waits: list[Future[Any]] = [background.submit(store.wait_for_key, "never", 100), background.submit(store.add, "n", 1)]
    waits[1].result(30)
    watching(store)
    own_etcd.kill()
    waits[1] = background.submit(store.add, "n", 1)
    store.close()
    for wait in waits:
        with pytest.raises(StoreClosedError):
            wait.result(30)


def test_a_server_that_stands_still(own_etcd: EtcdServer, background: ThreadPoolExecutor) -> None:
    store, patient = EtcdStore(HOST, own_etcd.port), EtcdStore(HOST, own_etcd.port)
    store.set("n", "1")
    own_etcd.pause()
    answer = background.submit(patient.add, "n", 1)
    with impatient(store):
        for use in (lambda: store.get("n"), lambda: store.set("k", "v")):
            with pytest.raises(StoreUnavailableError, match=f"{HOST}:{own_etcd.port}"):
                use()
    own_etcd.resume()
    assert answer.result(60) == 2
    assert store.get("n") == b"2"
    patient.close()
    store.close()


# --- a cluster ---------------------------------------------------------------------------------------------------------------------------


def endpoints(members: list[EtcdServer]) -> str:
    return "etcd://" + ",".join(f"{member.host}:{member.port}" for member in members)


def leader(members: list[EtcdServer]) -> EtcdServer:
    """The member that leads, as one says; waits while there is none."""
    import pyetcd

    names: list[str] = []

    def found() -> bool:
        with contextlib.suppress(Exception), pyetcd.client(members[0].host, members[0].port, timeout=10) as client:
            names.append(client.status().leader.name)
        return bool(names)

    eventually(found)
    return next(member for member in members if member.name == names[0])


def test_any_one_member_may_go(cluster: list[EtcdServer], background: ThreadPoolExecutor) -> None:
    store, other = create_store(endpoints(cluster)), create_store(endpoints(cluster[::-1]))
    assert isinstance(store, EtcdStore)
    assert (store.host, store.port) == (cluster[0].host, cluster[0].port)
    for n in range(4):
        victim = cluster[n] if n < 3 else leader(cluster)
        wait = background.submit(store.wait_for_key, f"k{n}", 100)
        watching(store)
        victim.kill()
        assert store.add("n", 1) == 2 * n + 1
        assert other.add("n", 1) == 2 * n + 2
        other.set(f"k{n}", "v")
        assert wait.result(100) == b"v"
        victim.restart()
    other.close()
    store.close()


def test_a_member_that_stands_still(cluster: list[EtcdServer], background: ThreadPoolExecutor) -> None:
    store, other = create_store(endpoints(cluster)), create_store(endpoints(cluster[1:]))
    assert isinstance(store, EtcdStore)
    wait = background.submit(store.wait_for_key, "k", 100)
    watching(store)
    cluster[0].pause()
    assert store.add("n", 1) == 1
    other.set("k", "v")
    # Its own watch is silent: the connection's pings find out.
    assert wait.result(100) == b"v"
    cluster[0].resume()
    other.close()
    store.close()


def test_without_a_majority(cluster: list[EtcdServer], background: ThreadPoolExecutor) -> None:
    store = create_store(endpoints(cluster))
    assert isinstance(store, EtcdStore)
    store.set("k", "v")
    cluster[1].kill()
    cluster[2].kill()
    with impatient(store), pytest.raises(StoreUnavailableError, match=f"{HOST}:{cluster[0].port}"):
        store.set("k", "w")
    cluster[1].restart()
    assert store.add("n", 1) == 1
    assert store.get("k") in (b"v", b"w")
    store.close()
