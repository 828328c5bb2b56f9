"""Leases kept by records, on a backend whose every request can be interrupted, and with clocks that the tests turn."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from etha_ray.errors import LeaseExpiredError, StoreError
from etha_ray.kvstore import KVStore, Lease, MemoryStore, lease_records
from etha_ray.kvstore.base import Change
from etha_ray.kvstore.lease_records import RecordLeases

TTL = 10.0


class Backend:
    """A dictionary; before its ``at``-th request it does something of the test's, and it counts them."""

    def __init__(self) -> None:
        self.values: dict[str, bytes] = {}
        self.count = self.at = 0
        self.action: Callable[[], object] | None = None

    def before(self, at: int, action: Callable[[], object]) -> None:
        self.at, self.action, self.count = at, action, 0

    def request(self) -> dict[str, bytes]:
        self.count += 1
        if self.count == self.at and self.action is not None:
            action, self.action = self.action, None
            action()
        return self.values


class DictStore(RecordLeases):
    """A store on a `Backend`."""

    def __init__(self, backend: Backend) -> None:
        super().__init__()
        self.backend = backend

    def _where(self) -> str:
        return "dict://"

    def _set(self, full: str, data: bytes) -> None:
        self.backend.request()[full] = data

    def _stored_get(self, full: str) -> bytes | None:
        return self.backend.request().get(full)

    def _stored_delete(self, full: str) -> bool:
        return self.backend.request().pop(full, None) is not None

    def _stored_update(self, full: str, change: Change) -> bytes | None:
        values = self.backend.request()
        new = change(values.get(full))
        if new is not None:
            values[full] = new
        return values.get(full)

    def _stored_list(self, prefix: str) -> dict[str, bytes]:
        return {key: value for key, value in self.backend.request().items() if key.startswith(prefix)}

    def _stored_delete_prefix(self, prefix: str) -> int:
        values = self.backend.request()
        return len([values.pop(key) for key in [*values] if key.startswith(prefix)])

    def _close(self, cleanup_prefix: str | None) -> None:
        if cleanup_prefix is not None:
            self._stored_delete_prefix(cleanup_prefix)


class Clock:
    """Stands in for the module `time` in `lease_records`: one host's clocks."""

    def __init__(self) -> None:
        self.now, self.wall_ahead = 1000.0, 0.0

    def monotonic(self) -> float:
        return self.now

    def time(self) -> float:
        return 1.7e9 + self.now + self.wall_ahead


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(lease_records, "time", clock)
    return clock


class Scene:
    """A key ``k`` and a lease of one store, and a second store that looks on; what is done is done by name."""

    def __init__(self, start: str) -> None:
        self.backend = Backend()
        self.owner, self.reader = DictStore(self.backend), DictStore(self.backend)
        self.grant = self.owner._grant(TTL)
        self.full = self.owner._full("k", None)
        if start == "plain":
            self.owner.set("k", "5")
        elif start != "missing":
            self.grant.put(self.full, b"5")
        if start == "over":
            self.grant.revoke()

    def do(self, name: str, store: DictStore) -> object:
        return getattr(self, name)(store)

    def get(self, store: DictStore) -> object:
        return store.get("k")

    def exists(self, store: DictStore) -> object:
        return store.exists("k")

    def listed(self, store: DictStore) -> object:
        return store.list("")

    def set(self, store: DictStore) -> object:
        return store.set("k", "9")

    def delete(self, store: DictStore) -> object:
        return store.delete("k")

    def add(self, store: DictStore) -> object:
        return store.add("k", 1)

    def append(self, store: DictStore) -> object:
        return store.append("k", b"7")

    def compare_5(self, store: DictStore) -> object:
        return store.compare_and_set("k", b"5", b"8")

    def compare_missing(self, store: DictStore) -> object:
        return store.compare_and_set("k", None, b"1")

    def put(self, store: DictStore) -> object:
        return self._of_lease(lambda: self.grant.put(self.full, b"6"))

    def renew(self, store: DictStore) -> object:
        return self._of_lease(self.grant.renew)

    def end(self, store: DictStore) -> object:
        return self.grant.revoke()

    def _of_lease(self, use: Callable[[], None]) -> str:
        try:
            use()
        except LeaseExpiredError:
            return "over"
        return "done"


STARTS = ["missing", "plain", "leased", "over"]
OPERATIONS = ["get", "exists", "listed", "set", "delete", "add", "append", "compare_5", "compare_missing", "put", "renew", "end"]


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("outer", OPERATIONS)
@pytest.mark.parametrize("inner", OPERATIONS)
def test_one_operation_inside_another(start: str, outer: str, inner: str) -> None:
    """An operation that comes between any two requests of another: both answer, and leave, what one of the two orders gives."""

    def in_order(*order: tuple[str, str]) -> tuple[dict[str, object], bytes | None]:
        scene = Scene(start)
        answers = {which: scene.do(name, scene.owner) for which, name in order}
        return answers, scene.reader.get("k")

    valid = [in_order(("outer", outer), ("inner", inner)), in_order(("inner", inner), ("outer", outer))]
    for at in range(1, 40):
        scene = Scene(start)
        answers: dict[str, object] = {}
        scene.backend.before(at, lambda scene=scene, answers=answers: answers.update(inner=scene.do(inner, scene.owner)))
        answers["outer"] = scene.do(outer, scene.reader)
        if scene.backend.action is not None:
            return
        assert (answers, DictStore(scene.backend).get("k")) in valid, f"{inner} before request {at} of {outer}"
    pytest.fail("the operation does not end")


KEYS = st.sampled_from(["a", "a/1", "b"])
VALUES = st.sampled_from([b"", b"1", b"23"])
STEPS = st.one_of(
    st.tuples(st.just("set_bytes"), KEYS, VALUES),
    st.tuples(st.just("append"), KEYS, VALUES),
    st.tuples(st.just("add"), KEYS, st.integers(-2, 2)),
    st.tuples(st.just("compare_and_set"), KEYS, st.none() | VALUES, VALUES),
    st.tuples(st.sampled_from(["get", "exists", "delete", "list", "delete_prefix"]), KEYS),
    st.tuples(st.just("lease"), st.integers(0, 1), KEYS, VALUES),
    st.tuples(st.just("close"), st.integers(0, 1)),
)


@given(st.lists(STEPS, max_size=12))
def test_records_answer_as_leases_of_the_backend_would(steps: list[tuple[Any, ...]]) -> None:
    backend, namespace = Backend(), uuid.uuid4().hex
    first, second, native = DictStore(backend), DictStore(backend), MemoryStore(namespace)
    leases = [(first.lease(600.0, renew=False), native.lease(600.0, renew=False)) for _ in range(2)]

    def answer(store: KVStore, lease: Lease | None, name: str, *arguments: Any) -> object:
        try:
            if lease is None:
                return getattr(store, name)(*arguments)
            return lease.close() if name == "close" else lease.set_bytes(*arguments[1:])
        except StoreError as error:
            return type(error)

    for name, *arguments in steps:
        by_record, by_native = leases[arguments[0]] if name in ("lease", "close") else (None, None)
        assert answer(second, by_record, name, *arguments) == answer(native, by_native, name, *arguments)
        assert first.list() == second.list() == native.list()
    native.close()


def test_requests() -> None:
    scene = Scene("leased")
    scene.owner.set("own", "1")

    def requests(use: Callable[[], Any]) -> int:
        before = scene.backend.count
        use()
        return scene.backend.count - before

    assert requests(lambda: scene.reader.get("own")) == 1
    assert requests(lambda: scene.reader.exists("own")) == 1
    assert requests(lambda: scene.reader.get("k")) == 3
    scene.grant.revoke()
    scene.reader.get("k")
    assert requests(lambda: scene.reader.get("k")) == 1
    lease = scene.owner._grant(TTL)
    for n in range(20):
        lease.put(scene.owner._full(f"many/{n}", None), b"1")
    assert requests(lambda: scene.reader.list("many/")) == 3
    lease.revoke()
    assert scene.reader.list("many/") == {}
    assert requests(lambda: scene.reader.list("many/")) == 1


def test_a_record_that_stands_still_ends_the_lease_for_all(clock: Clock) -> None:
    scene = Scene("leased")
    assert scene.reader.get("k") == b"5"
    for _ in range(5):
        clock.now += 0.9 * TTL
        assert scene.reader.get("k") == b"5"
        scene.grant.renew()
        assert scene.reader.get("k") == b"5"
    clock.now += 0.9 * TTL
    assert scene.reader.get("k") == b"5"
    clock.now += 0.2 * TTL
    assert scene.reader.get("k") is None
    # The reader's verdict holds for all: the owner that comes back hears of it, and its keys do not come back.
    for use in (scene.grant.renew, lambda: scene.grant.put(scene.full, b"6")):
        with pytest.raises(LeaseExpiredError, match="in time"):
            use()
    assert scene.reader.get("k") is None
    assert DictStore(scene.backend).list("") == {}


def test_a_newcomer_does_not_wait_for_what_died_before(clock: Clock) -> None:
    scene = Scene("leased")
    clock.now += 0.9 * TTL
    early = DictStore(scene.backend)
    assert early.get("k") == b"5"
    clock.now += 0.2 * TTL
    assert early.get("k") is None
    assert DictStore(scene.backend).get("k") is None
    assert DictStore(scene.backend).compare_and_set("k", None, b"1") == b"1"


@pytest.mark.parametrize("ahead", [-86400.0, -1.5 * TTL, -0.3 * TTL, 0.3 * TTL])
def test_clocks_that_differ_end_no_lease(clock: Clock, ahead: float) -> None:
    scene = Scene("leased")
    for _ in range(6):
        clock.wall_ahead = ahead
        reader = DictStore(scene.backend)
        assert scene.reader.get("k") == reader.get("k") == b"5"
        clock.now += TTL / 3
        clock.wall_ahead = 0.0
        scene.grant.renew()
    clock.wall_ahead = ahead
    assert reader.get("k") == b"5"
    clock.now += 1.1 * TTL
    assert reader.get("k") is None


def test_a_reader_whose_clock_is_far_ahead_doubts_until_the_next_renewal_and_ends_no_lease(clock: Clock) -> None:
    scene = Scene("leased")
    reader = DictStore(scene.backend)
    clock.wall_ahead = 86400.0
    assert reader.get("k") is None
    clock.now += TTL / 3
    assert reader.get("k") is None
    clock.wall_ahead = 0.0
    scene.grant.renew()
    clock.wall_ahead = 86400.0
    assert reader.get("k") == b"5"
    clock.now += 0.9 * TTL
    assert reader.get("k") == b"5"
    # Once it has not looked for long it is a newcomer again.
    for renewed in (False, True):
        clock.now += 0.9 * TTL
        clock.wall_ahead = 0.0
        scene.grant.renew()
        clock.wall_ahead = 86400.0
        assert reader.get("k") == (b"5" if renewed else None)


def test_a_reader_that_has_not_looked_for_long_does_not_wait_for_what_died_meanwhile(clock: Clock) -> None:
    scene = Scene("leased")
    assert scene.reader.get("k") == b"5"
    for _ in range(5):
        clock.now += TTL / 3
        scene.grant.renew()
    clock.now += 1.1 * TTL
    assert scene.reader.get("k") is None


def test_a_cleaned_namespace_ends_the_lease() -> None:
    scene = Scene("leased")
    DictStore(scene.backend).close(cleanup=True)
    assert scene.backend.values == {}
    with pytest.raises(LeaseExpiredError, match="cleaned"):
        scene.grant.renew()
    assert scene.backend.values == {}


def test_users_do_not_meet_records() -> None:
    scene = Scene("leased")
    for component in ("%lease", "%over", "tensorbus"):
        assert scene.reader.list("", component=component) == ({"k": b"5"} if component == "tensorbus" else {})
        scene.reader.delete_prefix("", component=component)
    scene.grant.renew()
    key = uuid.uuid4().hex
    scene.grant.put(scene.owner._full(key, None), b"1")
    assert scene.reader.list() == {key: b"1"}
