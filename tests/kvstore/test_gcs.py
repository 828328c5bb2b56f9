from __future__ import annotations

import os
import signal
import uuid
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import ray
from ray._private import worker
from ray.experimental import internal_kv

from etha_ray.errors import StoreUnavailableError
from etha_ray.kvstore import GcsStore, KVStore
from etha_ray.kvstore.gcs import _LOCAL, _LocalKv
from etha_ray.testing import RayUnderTest
from tests.contracts.kvstore import AddInParallel, KVStoreContract, MakeStore, StoreInAProcess, in_processes


def open_as_driver(address: str, namespace: str) -> GcsStore:
    """In a process of its own: a further driver of the cluster."""
    ray.init(address=address, log_to_driver=False)
    return GcsStore(namespace)


@ray.remote(num_cpus=0.1)
class Adder:
    """A process that adds."""

    def pid(self) -> int:
        return os.getpid()

    def add(self, namespace: str, key: str, count: int, note: str | None = None) -> int:
        """Adds 1 ``count`` times; after each it writes down in ``note`` how often it has."""
        store = GcsStore(namespace)
        for n in range(1, count + 1):
            store.add(key, 1)
            if note is not None:
                store.set(note, str(n))
        store.close(cleanup=False)
        return os.getpid()


@pytest.fixture(scope="module")
def adders(ray_cluster: RayUnderTest) -> Iterator[list[Any]]:
    actors = [Adder.remote() for _ in range(8)]  # type: ignore[attr-defined]
    yield actors
    for actor in actors:
        ray.kill(actor)


@pytest.mark.usefixtures("ray_cluster")
class TestGcsStore(KVStoreContract):
    @pytest.fixture
    def make_store(self) -> Iterator[MakeStore]:
        made: list[KVStore] = []

        def make(**where: str) -> KVStore:
            made.append(GcsStore(**where))
            return made[-1]

        yield make
        for store in made:
            store.close()

    @pytest.fixture
    def store_in_a_process(self, ray_cluster: RayUnderTest) -> Iterator[StoreInAProcess]:
        start, end = in_processes(partial(open_as_driver, ray.get_runtime_context().gcs_address))
        yield start
        end()

    @pytest.fixture
    def add_in_parallel(self, adders: list[Any]) -> AddInParallel:
        def add(namespace: str, key: str, workers: int, count: int) -> None:
            pids = ray.get([adder.add.remote(namespace, key, count) for adder in adders[:workers]], timeout=250)
            assert len({*pids, os.getpid()}) == workers + 1

        return add

    def test_a_killed_adder_stops_nobody(self, store: KVStore, namespace: str, adders: list[Any]) -> None:
        victim = Adder.remote()  # type: ignore[attr-defined]
        pid = ray.get(victim.pid.remote(), timeout=60)
        doomed = victim.add.remote(namespace, "n", 10**6, "noted")
        others = [adder.add.remote(namespace, "n", 50) for adder in adders[:3]]
        store.wait_for_key("noted", 60)
        os.kill(pid, signal.SIGKILL)
        ray.get(others, timeout=60)
        with pytest.raises(ray.exceptions.RayActorError):
            ray.get(doomed, timeout=60)
        noted = int(store.get("noted") or b"0")
        by_victim = store.add("n", 0) - 3 * 50
        # Its last add may have come through without the note.
        assert by_victim in (noted, noted + 1)
        assert store.add("n", 1) == 3 * 50 + by_victim + 1

    def test_cleanup_leaves_nothing_in_the_gcs(self, store: KVStore, namespace: str) -> None:
        store.set("k", "1")
        for _ in range(20):
            store.add("k", 1)
        assert len(entries_of(namespace)) == 22
        store.lease(60).set("leased", "1")
        assert len(entries_of(namespace)) == 24
        store.close()
        assert entries_of(namespace) == []


def entries_of(namespace: str) -> list[bytes]:
    keys = internal_kv._internal_kv_list(b"", namespace=b"etha_ray")
    return [key for key in keys if namespace.encode() in key]


class Steps:
    """A GCS client that does something of the test's before its ``at``-th request, and counts them."""

    def __init__(self, kv: _LocalKv) -> None:
        self.kv = kv
        self.at = 0
        self.action: Callable[[], object] | None = None
        self.count = 0

    def before(self, at: int, action: Callable[[], object]) -> None:
        self.at, self.action, self.count = at, action, 0

    def __getattr__(self, name: str) -> Any:
        method = getattr(self.kv, name)

        def call(*args: Any) -> Any:
            self.count += 1
            if self.count == self.at and self.action is not None:
                action, self.action = self.action, None
                action()
            return method(*args)

        return call


class Killed(BaseException):
    pass


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> Steps:
    """A GCS of the test's own, whose requests can be interrupted."""
    steps = Steps(_LocalKv())
    monkeypatch.setattr(internal_kv, "internal_kv_get_gcs_client", lambda: steps)
    return steps


STARTS: dict[str, Callable[[KVStore], object]] = {
    "missing": lambda store: None,
    "set": lambda store: store.set("k", "5"),
    "updated once": lambda store: (store.set("k", "4"), store.add("k", 1)),
    "updated often": lambda store: (store.set("k", "-95"), [store.add("k", 1) for _ in range(100)]),
}
UPDATES: dict[str, Callable[[KVStore], object]] = {
    "add": lambda store: store.add("k", 1),
    "append": lambda store: store.append("k", b"7"),
    "compare 5": lambda store: store.compare_and_set("k", b"5", b"8"),
}
OPERATIONS: dict[str, Callable[[KVStore], object]] = {
    **UPDATES,
    "set": lambda store: store.set("k", "9"),
    "delete": lambda store: store.delete("k"),
    "get": lambda store: store.get("k"),
    "compare missing": lambda store: store.compare_and_set("k", None, b"1"),
    "compare 9": lambda store: store.compare_and_set("k", b"9", b"8"),
}


def fresh(known: bool, start: str) -> tuple[KVStore, KVStore]:
    """Two stores of a new namespace with the key as ``start`` says; the first made the start itself if ``known``."""
    namespace = uuid.uuid4().hex
    first, second = GcsStore(namespace), GcsStore(namespace)
    STARTS[start](first if known else second)
    return first, second


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("operation", [*UPDATES, "set", "delete"])
def test_killed_before_any_request(steps: Steps, start: str, operation: str) -> None:
    """Whatever request a process dies before, its operation has happened wholly or not at all, and others go on."""

    def die() -> None:
        raise Killed

    outcomes = []
    for at in range(1, 20):
        first, second = fresh(True, start)
        before = second.get("k")
        steps.before(at, die)
        try:
            OPERATIONS[operation](first)
            finished = True
        except Killed:
            finished = False
        steps.before(0, die)
        after = second.get("k")
        outcomes.append(after == before)
        number = int(after or b"0")
        assert second.add("k", 1) == number + 1
        assert GcsStore(second.namespace).get("k") == b"%d" % (number + 1)
        if finished:
            break
    # Not done at first, and once it is done it stays so.
    assert finished
    assert outcomes == sorted(outcomes, reverse=True)


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("outer", OPERATIONS)
@pytest.mark.parametrize("inner", OPERATIONS)
def test_one_operation_inside_another(steps: Steps, known: bool, start: str, outer: str, inner: str) -> None:
    """An operation that comes between any two requests of another: both answer, and leave, what one of the two orders gives."""

    def in_order(*order: str) -> tuple[dict[str, object], bytes | None]:
        store = fresh(known, start)[0]
        answers = {which: OPERATIONS[outer if which == "outer" else inner](store) for which in order}
        return answers, store.get("k")

    valid = [in_order("outer", "inner"), in_order("inner", "outer")]
    for at in range(1, 40):
        first, second = fresh(known, start)
        answers: dict[str, object] = {}
        steps.before(at, lambda second=second, answers=answers: answers.update(inner=OPERATIONS[inner](second)))
        answers["outer"] = OPERATIONS[outer](first)
        if steps.action is not None:
            steps.action = None
            return
        assert (answers, GcsStore(first.namespace).get("k")) in valid, f"{inner} before request {at} of {outer}"
    pytest.fail("the operation does not end")


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("operation", UPDATES)
def test_a_put_whose_answer_was_lost(steps: Steps, monkeypatch: pytest.MonkeyPatch, start: str, operation: str) -> None:
    """Ray's client sends a request again when no answer came; a put if absent then meets what it has put itself."""
    expected = fresh(True, start)[0]
    answer = OPERATIONS[operation](expected)
    first, second = fresh(True, start)
    put = steps.kv.internal_kv_put

    def twice(*args: Any) -> int:
        put(*args)
        return put(*args)

    monkeypatch.setattr(steps.kv, "internal_kv_put", twice)
    assert OPERATIONS[operation](first) == answer
    assert second.get("k") == expected.get("k")


def test_plain_reads_and_writes_are_one_request(steps: Steps) -> None:
    store = GcsStore(uuid.uuid4().hex)
    for requests, use in (
        (2, lambda: store.compare_and_set("k", None, b"1")),  # it looks before it writes; so does delete
        (1, lambda: store.set("k", "v")),
        (1, lambda: store.get("k")),
        (1, lambda: store.exists("k")),
        (1, lambda: store.wait_for_key("k", 0)),
        (2, lambda: store.delete("k")),
        (1, lambda: store.delete("k")),
    ):
        steps.count = 0
        use()
        assert steps.count == requests


def test_a_long_row_of_updates_is_found_fast(steps: Steps) -> None:
    namespace = uuid.uuid4().hex
    store = GcsStore(namespace)
    for _ in range(3000):
        store.add("k", 1)
    reader = GcsStore(namespace)
    steps.count = 0
    assert reader.get("k") == b"3000"
    assert steps.count < 16
    steps.count = 0
    assert reader.get("k") == b"3000"
    assert steps.count == 1


def test_listing_more_than_one_message_holds(steps: Steps, monkeypatch: pytest.MonkeyPatch) -> None:
    store = GcsStore(uuid.uuid4().hex)
    for n in range(70):
        store.set(f"k{n}", str(n))
    multi_get = steps.kv.internal_kv_multi_get

    def small(keys: list[bytes], *args: Any) -> dict[bytes, bytes]:
        if len(keys) > 20:
            raise ray.exceptions.RpcError("Sent message larger than max", rpc_code=8)
        return multi_get(keys, *args)

    monkeypatch.setattr(steps.kv, "internal_kv_multi_get", small)
    assert store.list("") == {f"k{n}": b"%d" % n for n in range(70)}


def test_local_mode_is_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "LOCAL_MODE", 2, raising=False)
    monkeypatch.setattr(worker.global_worker, "mode", 2, raising=False)
    namespace = uuid.uuid4().hex
    first, second = GcsStore(namespace), GcsStore(namespace)
    first.set("k", "1")
    assert second.add("k", 1) == 2
    assert first.list("") == {"k": b"2"}
    first.close()
    assert second.list("") == {}
    assert not _LOCAL.internal_kv_keys(b"v/" + namespace.encode(), b"etha_ray", 1.0)


def test_ray_not_initialised(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(internal_kv, "internal_kv_get_gcs_client", lambda: None)
    with pytest.raises(StoreUnavailableError, match=r"ray\.init\(\)"):
        GcsStore()


def test_after_ray_shutdown(monkeypatch: pytest.MonkeyPatch, steps: Steps) -> None:
    store = GcsStore(uuid.uuid4().hex)
    monkeypatch.setattr(internal_kv, "internal_kv_get_gcs_client", lambda: None)
    with pytest.raises(StoreUnavailableError, match=r"ray\.init\(\)"):
        store.set("k", "v")
    with pytest.raises(StoreUnavailableError, match=r"ray\.init\(\)"):
        store.wait_for_key("k", 30)
    store.close()


def test_the_gcs_fails(monkeypatch: pytest.MonkeyPatch, steps: Steps) -> None:
    store = GcsStore(uuid.uuid4().hex)

    def fail(*args: Any) -> None:
        raise ray.exceptions.RpcError("gone")

    monkeypatch.setattr(steps.kv, "internal_kv_multi_get", fail)
    with pytest.raises(StoreUnavailableError, match="gone"):
        store.exists("k")
