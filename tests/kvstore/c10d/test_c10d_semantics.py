"""PyTorch's semantics, method by method: the same tests run on torch's own stores and on ours."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta
from itertools import chain
from typing import Any

import pytest
import torch.distributed as dist

from etha_ray.errors import StoreError
from tests.kvstore.c10d.backends import ELASTIC, KV, LONG, PREFIXED, SHORT, TORCH, Pair, pairs

KEYS = ["k", "", "a/b", "/a", "a/", "nul\0nul", "nul\0", "nul\0\0", "\0", "naïve", "日本", "\n", "%2F", "%", "%queue", "50% ", "k" * 4096]


@pytest.fixture(scope="module", params=[*TORCH, *KV, *ELASTIC, PREFIXED])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def make_pair(kind: str, request: pytest.FixtureRequest) -> Iterator[Callable[[], Pair]]:
    with pairs(kind, request) as make:
        yield make


@pytest.fixture
def pair(make_pair: Callable[[], Pair]) -> Pair:
    return make_pair()


@pytest.fixture
def store(pair: Pair) -> Any:
    return pair.store


@pytest.fixture
def other(pair: Pair) -> Any:
    """A second store object on the same keys."""
    return pair.other


@pytest.fixture
def background() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(16) as pool:
        yield pool


@pytest.fixture
def only_torch_itself_has_queues(kind: str) -> None:
    if kind == PREFIXED:
        pytest.skip("torch's C++ does not ask a Python store for this, see test_what_cpp_does_not_ask_python_for")


queues = pytest.mark.usefixtures("only_torch_itself_has_queues")


def runs_out(call: Callable[[], object]) -> None:
    with pytest.raises(dist.DistStoreError):
        call()


class TestSetAndGet:
    @pytest.mark.parametrize("value", ["text", "naïve 日本", "", b"", b"\0\xff", bytes(range(256)), bytearray(b"buffer")])
    def test_values(self, store: Any, other: Any, value: Any) -> None:
        store.set("k", value)
        got = other.get("k")
        assert got == (value.encode() if isinstance(value, str) else value)
        assert type(got) is bytes

    def test_keys_are_each_their_own(self, store: Any, other: Any) -> None:
        for n, key in enumerate(KEYS):
            store.set(key, str(n))
        assert [other.get(key) for key in KEYS] == [b"%d" % n for n in range(len(KEYS))]

    def test_a_key_may_be_bytes(self, store: Any) -> None:
        store.set("naïve".encode(), "1")
        assert store.get("naïve") == b"1"
        assert store.delete_key("naïve".encode())

    def test_get_waits_for_the_key(self, store: Any, other: Any, background: ThreadPoolExecutor) -> None:
        got = background.submit(other.get, "k")
        store.set("not k", "0")
        store.set("k", "1")
        assert got.result(60) == b"1"

    def test_get_runs_out(self, store: Any) -> None:
        store.set_timeout(SHORT)
        runs_out(lambda: store.get("k"))

    def test_get_after_delete_waits_again(self, store: Any, other: Any, background: ThreadPoolExecutor) -> None:
        store.set("k", "old")
        assert other.delete_key("k")
        store.set_timeout(SHORT)
        runs_out(lambda: store.get("k"))
        store.set_timeout(LONG)
        got = background.submit(store.get, "k")
        other.set("k", "new")
        assert got.result(60) == b"new"

    def test_delete_key(self, store: Any, other: Any) -> None:
        assert not store.delete_key("k")
        store.set("k", "")
        assert other.delete_key("k")
        assert not store.delete_key("k")
        assert not store.check(["k"])


class TestAdd:
    def test_counts(self, store: Any, other: Any) -> None:
        assert store.add("n", 3) == 3
        assert other.add("n", -5) == -2
        assert store.get("n") == b"-2"
        assert store.add("zero", 0) == 0
        assert other.get("zero") == b"0"
        assert store.add("big", 2**63 - 1) == 2**63 - 1
        assert store.add("yes", True) == 1

    def test_on_top_of_what_was_set(self, store: Any, other: Any) -> None:
        store.set("n", "5")
        assert other.add("n", 2) == 7
        store.set("n", b"-7")
        assert other.add("n", 1) == -6
        other.delete_key("n")
        assert store.add("n", 1) == 1

    @pytest.mark.parametrize("amount", ["1", 1.0, None])
    def test_amount_is_an_int(self, store: Any, amount: Any) -> None:
        with pytest.raises(TypeError):
            store.add("n", amount)
        assert not store.check(["n"])

    def test_from_many_threads(self, store: Any, other: Any, background: ThreadPoolExecutor) -> None:
        def add(n: int) -> list[int]:
            return [(store, other)[n % 2].add("n", 1) for _ in range(25)]

        sums = [total for each in background.map(add, range(8)) for total in each]
        assert sorted(sums) == list(range(1, 8 * 25 + 1))

    def test_on_what_is_no_number(self, store: Any, other: Any, kind: str) -> None:
        expected: dict[str, type[Exception]] = {"torch HashStore": ValueError, "torch TCPStore": dist.DistNetworkError}
        store.set("k", "five")
        with pytest.raises(expected.get(kind, StoreError)) as caught:
            store.add("k", 1)
        assert other.get("k") == b"five"
        if kind not in TORCH:
            assert "'five'" in str(caught.value)
            assert store.get("k") == b"five"


class TestCompareSet:
    @pytest.mark.parametrize(
        ("before", "expected", "desired", "answer", "after"),
        [
            (None, "x", "y", b"x", None),
            (None, "", "y", b"y", b"y"),
            (None, "", "", b"", b""),
            (b"a", "", "y", b"a", b"a"),
            (b"a", "x", "y", b"a", b"a"),
            (b"a", "x", "a", b"a", b"a"),
            (b"a", "a", "y", b"y", b"y"),
            (b"a", "a", "", b"", b""),
            (b"a", "a", "a", b"a", b"a"),
            (b"", "", "y", b"y", b"y"),
            (b"", "", "", b"", b""),
            (b"", "x", "y", b"", b""),
            (b"\0\xff", b"\0\xff", b"\xfe", b"\xfe", b"\xfe"),
        ],
    )
    def test_every_case(self, store: Any, other: Any, before: Any, expected: Any, desired: Any, answer: bytes, after: Any) -> None:
        if before is not None:
            other.set("k", before)
        assert store.compare_set("k", expected, desired) == answer
        assert other.check(["k"]) == (after is not None)
        if after is not None:
            assert other.get("k") == after

    def test_one_of_many_wins(self, store: Any, other: Any, background: ThreadPoolExecutor) -> None:
        answers = list(background.map(lambda n: (store, other)[n % 2].compare_set("k", "", f"writer {n}"), range(8)))
        assert set(answers) == {store.get("k")}


class TestExtendedApi:
    def test_is_there(self, store: Any) -> None:
        assert store.has_extended_api() is True

    def test_append(self, store: Any, other: Any) -> None:
        store.append("k", "a")
        other.append("k", b"\xff")
        assert store.get("k") == b"a\xff"
        store.append("empty", "")
        assert other.get("empty") == b""

    def test_append_from_many_threads(self, store: Any, other: Any, background: ThreadPoolExecutor) -> None:
        list(background.map(lambda n: (store, other)[n % 2].append("k", f"<{n}>"), range(32)))
        assert sorted(store.get("k").decode()[1:-1].split("><"), key=int) == [str(n) for n in range(32)]

    def test_multi(self, store: Any, other: Any) -> None:
        store.multi_set(["a", "b", "a"], ["1", b"\xff", "2"])
        assert other.multi_get(["b", "a", "b"]) == [b"\xff", b"2", b"\xff"]
        store.multi_set([], [])
        with pytest.raises(TypeError):
            store.multi_set(["c", "d"], ["1", 2])
        assert not store.check(["c"])
        assert other.multi_get([]) == []

    def test_multi_get_waits(self, store: Any, other: Any, background: ThreadPoolExecutor) -> None:
        store.set("a", "1")
        got = background.submit(other.multi_get, ["a", "b"])
        store.set("b", "2")
        assert got.result(60) == [b"1", b"2"]
        store.set_timeout(SHORT)
        runs_out(lambda: store.multi_get(["a", "c"]))


class TestCheckAndWait:
    def test_check(self, store: Any, other: Any) -> None:
        assert store.check([])
        assert not store.check(["a"])
        other.set("a", "")
        assert store.check(["a"])
        assert store.check(("a", "a"))
        assert not store.check(["a", "b"])

    def test_wait(self, store: Any, other: Any, background: ThreadPoolExecutor) -> None:
        store.wait([])
        waits: list[Future[None]] = [
            background.submit(store.clone().wait, ["a", "b"]),
            background.submit(store.clone().wait, ("b", "a"), LONG),
        ]
        other.set("b", "1")
        assert not all(wait.done() for wait in waits)
        other.set("a", "1")
        assert [wait.result(60) for wait in waits] == [None, None]
        store.wait(["a", "b"])

    def test_wait_runs_out(self, store: Any, other: Any) -> None:
        other.set("a", "1")
        runs_out(lambda: store.wait(["a", "b"], SHORT))
        runs_out(lambda: store.wait(["b"], 0.15))
        store.set_timeout(SHORT)
        runs_out(lambda: store.wait(["b", "a"]))

    def test_a_wait_holds_up_no_other_object(self, store: Any, other: Any, background: ThreadPoolExecutor) -> None:
        wait = background.submit(store.get, "k")
        for n in range(20):
            other.set("other", str(n))
        assert not wait.done()
        other.set("k", "v")
        assert wait.result(60) == b"v"


class TestObject:
    def test_timeout(self, store: Any) -> None:
        store.set_timeout(timedelta(seconds=7.5))
        assert store.timeout == timedelta(seconds=7.5)

    def test_clone(self, store: Any, kind: str) -> None:
        clone = store.clone()
        assert (clone is store) == (kind == "torch HashStore")
        assert type(clone) is type(store)
        assert clone.timeout == store.timeout
        clone.set("k", "v")
        assert store.get("k") == b"v"
        clone.set_timeout(timedelta(seconds=7.5))
        assert clone.timeout == timedelta(seconds=7.5)

    def test_num_keys(self, store: Any, other: Any) -> None:
        assert store.num_keys() == 0
        store.set("a", "1")
        other.add("b", 1)
        store.append("c", "")
        store.set("a", "2")
        assert store.num_keys() == 3
        other.delete_key("a")
        assert store.num_keys() == 2

    @queues
    def test_list_keys(self, store: Any, other: Any) -> None:
        for key in KEYS:
            store.set(key, "1")
        store.queue_push("q", "1")
        assert sorted(other.list_keys()) == sorted(KEYS)

    @pytest.mark.parametrize(
        "call",
        [
            lambda s: s.set(1, "v"),
            lambda s: s.set("k", 1),
            lambda s: s.set("k", None),
            lambda s: s.set("k", ["v"]),
            lambda s: s.get(None),
            lambda s: s.add(1, 1),
            lambda s: s.compare_set("k", None, "v"),
            lambda s: s.append("k", 1),
            lambda s: s.delete_key(1),
            lambda s: s.check("k"),
            lambda s: s.check([1]),
            lambda s: s.wait("k"),
            lambda s: s.wait([None]),
            lambda s: s.multi_get("k"),
            lambda s: s.multi_set(["k"], "v"),
            lambda s: s.multi_set(["k"], [1]),
            lambda s: s.queue_push("k", 1),
            lambda s: s.queue_pop(1),
        ],
    )
    def test_wrong_types(self, store: Any, call: Callable[[Any], object]) -> None:
        with pytest.raises(TypeError):
            call(store)
        assert not store.check(["k"])


class TestBarrier:
    def test_all_meet(self, pair: Pair, background: ThreadPoolExecutor) -> None:
        stores = [pair.store.clone() for _ in range(4)]
        arrived: list[int] = []
        lock = threading.Lock()

        def arrive(rank: int) -> int:
            with lock:
                arrived.append(rank)
            stores[rank].barrier("b", 4, LONG)
            return len(arrived)

        first = [background.submit(arrive, rank) for rank in range(3)]
        assert not any(each.done() for each in first)
        assert [each.result(60) for each in (*first, background.submit(arrive, 3))] == [4] * 4
        pair.other.barrier("b", 4, LONG)  # who comes late does not wait

    def test_runs_out(self, store: Any) -> None:
        runs_out(lambda: store.barrier("b", 2, SHORT))
        store.barrier("b", 2, SHORT)  # who gave up has been counted

    def test_alone(self, store: Any) -> None:
        store.barrier("b", 1)


@queues
class TestQueue:
    def test_first_in_first_out(self, store: Any, other: Any) -> None:
        assert store.queue_len("q") == 0
        for value in ("1", b"\xff", "", "1"):
            store.queue_push("q", value)
        store.queue_push("another", "x")
        assert other.queue_len("q") == 4
        assert [other.queue_pop("q"), store.queue_pop("q", block=False), other.queue_pop("q", True)] == [b"1", b"\xff", b""]
        assert store.queue_len("q") == 1
        assert other.queue_pop("q") == b"1"
        assert store.queue_len("q") == 0

    def test_empty(self, store: Any, other: Any) -> None:
        with pytest.raises(dist.QueueEmptyError):
            store.queue_pop("q", False)
        other.queue_push("q", "1")
        store.queue_pop("q")
        with pytest.raises(dist.QueueEmptyError):
            store.queue_pop("q", block=False)
        store.set_timeout(SHORT)
        runs_out(lambda: store.queue_pop("q"))

    def test_pop_waits_for_an_element(self, store: Any, other: Any, kind: str, background: ThreadPoolExecutor) -> None:
        popped = background.submit(store.queue_pop, "q")
        if kind not in TORCH:  # whose waits also end with this, and if they see it before the element, say that the queue is empty
            other.set("q", "not the queue")
        other.queue_push("q", "1")
        assert popped.result(60) == b"1"

    def test_a_queue_is_no_value_but_is_there(self, store: Any, other: Any) -> None:
        store.queue_push("q", "1")
        assert other.check(["q"])
        other.wait(["q"], LONG)
        assert not other.delete_key("q")
        assert other.queue_len("q") == 1
        other.set("q", "value")
        assert other.get("q") == b"value"
        assert other.delete_key("q")
        assert store.queue_pop("q") == b"1"
        assert not store.check(["q"])

    def test_wait_for_a_queue(self, store: Any, other: Any, background: ThreadPoolExecutor) -> None:
        wait = background.submit(store.wait, ["q"], LONG)
        other.queue_push("q", "1")
        wait.result(60)

    def test_each_element_once(self, pair: Pair, kind: str, background: ThreadPoolExecutor) -> None:
        if kind == "torch TCPStore":
            pytest.skip("of several that wait for an element it gives it to one, and tells the others at once that the queue is empty")

        def produce(producer: int) -> None:
            own = pair.store.clone()
            for n in range(10):
                own.queue_push("q", f"{producer} {n}")

        def consume(_: int) -> list[tuple[int, int]]:
            own = pair.other.clone()
            popped = (own.queue_pop("q").decode().split() for _ in range(10))
            return [(int(producer), int(n)) for producer, n in popped]

        consumers = [background.submit(consume, n) for n in range(4)]
        list(background.map(produce, range(4)))
        taken = [each.result(60) for each in consumers]
        assert sorted(chain(*taken)) == [(producer, n) for producer in range(4) for n in range(10)]
        for mine in taken:  # of one producer's elements nobody gets a later one first
            assert all([n for p, n in mine if p == producer] == sorted(n for p, n in mine if p == producer) for producer in range(4))
