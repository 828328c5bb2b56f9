"""`C10dStore` beside what PyTorch's stores show: its errors, its keys, and what torch's C++ makes of a Python store."""

from __future__ import annotations

import gc
import multiprocessing
import subprocess
import sys
import time
import uuid
import weakref
from collections.abc import Callable, Iterator
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import Any

import pytest
import torch.distributed as dist

from etha_ray.errors import ConfigError, StoreClosedError, StoreError, StoreTimeoutError, StoreUnavailableError, ValueTooLargeError
from etha_ray.kvstore import MemoryStore, TorchTCPStore
from etha_ray.kvstore.c10d import C10dQueueEmptyError, C10dStore, C10dTimeoutError, C10dUnavailableError
from tests.fresh import fresh
from tests.kvstore.c10d.backends import HOST, SHORT


@pytest.fixture
def kv() -> Iterator[MemoryStore]:
    store = MemoryStore(uuid.uuid4().hex)
    yield store
    store.close()


@pytest.fixture
def store(kv: MemoryStore) -> C10dStore:
    return C10dStore(kv, timeout=SHORT)


# --- errors --------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "names"),
    [
        (lambda s: s.get("there/not"), "'(p/)?there/not'"),
        (lambda s: s.wait(["a", "b", "c"], SHORT), "keys '(p/)?b', '(p/)?c' did not"),
        (lambda s: s.wait(["a", "b"], SHORT), "key '(p/)?b' did not"),
        (lambda s: s.wait([f"k{n}" for n in range(10)], SHORT), "'(p/)?k7' and 2 more"),
        (lambda s: s.multi_get(["a", "b"]), "'(p/)?b'"),
        (lambda s: s.barrier("meet", 2, SHORT), "'(p/)?meet/last_member'"),
    ],
)
@pytest.mark.parametrize("through", ["itself", "PrefixStore"])
def test_timeouts_name_key_and_seconds(store: C10dStore, through: str, call: Callable[[Any], object], names: str) -> None:
    used = store if through == "itself" else dist.PrefixStore("p", store)
    used.set("a", "1")
    with pytest.raises(dist.DistStoreError, match=rf"{names}.* within 0\.15 s in .*MemoryStore") as caught:
        call(used)
    # Through C++ and back it is the same error.
    assert isinstance(caught.value, C10dTimeoutError)
    assert isinstance(caught.value, (StoreTimeoutError, TimeoutError))


def test_queue_errors_name_the_queue(store: C10dStore) -> None:
    with pytest.raises(C10dTimeoutError, match=r"queue 'q' had no element within 0\.15 s"):
        store.queue_pop("q")
    with pytest.raises(C10dQueueEmptyError, match="queue 'q' is empty"):
        store.queue_pop("q", False)
    assert issubclass(C10dQueueEmptyError, (dist.QueueEmptyError, StoreError))


@pytest.mark.parametrize("seconds", [0, -1.5])
def test_no_time_is_one_look(store: C10dStore, seconds: float) -> None:
    for call in (lambda: store.wait(["k"], seconds), lambda: store.wait(["k"], timedelta(seconds=seconds)), lambda: store.get("k")):
        store.set_timeout(timedelta(seconds=seconds))
        with pytest.raises(C10dTimeoutError, match=f"within {seconds:g} s"):
            call()
    store.set("k", "v")
    store.wait(["k"], seconds)
    assert store.get("k") == b"v"


def serve(pipe: Connection) -> None:
    store = TorchTCPStore(HOST, 0, None, True, 60.0)
    pipe.send(store.port)
    time.sleep(600)


@pytest.mark.parametrize("through", ["itself", "PrefixStore"])
def test_a_lost_backend_is_a_network_error(through: str) -> None:
    ours, theirs = multiprocessing.Pipe()
    server = fresh.Process(target=serve, args=(theirs,), daemon=True)
    server.start()
    client = TorchTCPStore(HOST, ours.recv(), None, False, 60.0)
    store: Any = C10dStore(client)
    used = store if through == "itself" else dist.PrefixStore("p", store)
    used.set("k", "v")
    server.kill()
    server.join(60)
    for call in (lambda: used.get("k"), lambda: used.set("k", "v"), lambda: used.add("n", 1), lambda: used.check(["k"])):
        with pytest.raises(dist.DistNetworkError, match=r"cannot be reached|no TorchTCPStore listens") as caught:
            call()
        assert isinstance(caught.value, (C10dUnavailableError, StoreUnavailableError))
    client.close(cleanup=False)


def test_other_errors_are_those_of_the_kvstore(kv: MemoryStore, store: C10dStore) -> None:
    kv.max_value_bytes = 10
    for used in (store, dist.PrefixStore("p", store)):
        for call in (lambda used=used: used.set("k", bytes(11)), lambda used=used: used.multi_set(["k"], [bytes(11)])):
            with pytest.raises(ValueTooLargeError, match="at most 10"):
                call()
    with pytest.raises(ConfigError, match="UTF-8"):
        store.get("\ud800")
    kv.close()
    with pytest.raises(StoreClosedError):
        store.get("k")
    with pytest.raises(StoreClosedError):
        dist.PrefixStore("p", store).set("k", "v")


def test_an_element_that_does_not_fit_leaves_nothing(kv: MemoryStore, store: C10dStore) -> None:
    store.queue_push("q", "1")
    store.queue_push("q", "2")
    before = kv.list()
    kv.max_value_bytes = 40  # two ids in the index, and no third
    with pytest.raises(ValueTooLargeError):
        store.queue_push("q", "3")
    with pytest.raises(ValueTooLargeError):
        store.queue_push("q", bytes(41))
    assert kv.list() == before
    assert store.queue_len("q") == 2


@pytest.mark.parametrize(("keys", "values"), [(["a", "b"], ["1"]), (["a"], ["1", "2"])])
def test_multi_set_wants_a_value_for_each_key(store: C10dStore, keys: list[str], values: list[str]) -> None:
    with pytest.raises(ValueError, match="one value for each key"):
        store.multi_set(keys, values)
    assert store.list_keys() == []


@pytest.mark.parametrize("value", ["", "five", "5 ", " 5", "5five", "0x5", str(2**63)])
def test_add_takes_whole_numbers_only(store: C10dStore, value: str) -> None:
    store.set("k", value)
    with pytest.raises(StoreError, match="not a 64-bit decimal number"):
        store.add("k", 1)
    assert store.get("k") == value.encode()


def test_add_does_not_overflow(store: C10dStore) -> None:
    store.set("k", str(2**63 - 1))
    with pytest.raises(StoreError, match="64 bits"):
        store.add("k", 1)
    assert store.add("k", 0) == 2**63 - 1


# --- keys ----------------------------------------------------------------------------------------------------------------------------


def test_a_key_is_that_key_of_the_kvstore(kv: MemoryStore, store: C10dStore) -> None:
    store.set("a/b", "1")
    kv.set("c", "2")
    assert kv.get("a/b") == b"1"
    assert store.get("c") == b"2"
    assert store.list_keys() == ["a/b", "c"]


@pytest.mark.parametrize("prefix", ["p", "p/", "/", "50%", "nul\0", "日本"])
def test_prefix_does_what_prefix_store_does(kv: MemoryStore, store: C10dStore, prefix: str) -> None:
    own, torchs = C10dStore(kv, prefix, SHORT), dist.PrefixStore(prefix, store)
    torchs.set("k", "1")
    assert own.get("k") == b"1"
    assert own.add("k", 1) == torchs.add("k", 0) == 2
    own.queue_push("q", "element")
    assert torchs.check(["k", "q"])
    assert own.list_keys() == ["k"]
    assert own.num_keys() == 1
    assert store.list_keys() == [f"{prefix}/k"]
    assert own.clone().get("k") == b"2"
    assert store.queue_pop(f"{prefix}/q") == b"element"


def test_stores_of_other_prefixes_do_not_meet(kv: MemoryStore) -> None:
    stores = [C10dStore(kv, prefix, SHORT) for prefix in ("a", "a/b", "ab", "a%2Fb", "%", "%queue", "q")]
    for n, store in enumerate(stores):
        store.set("k", str(n))
        store.queue_push("k", str(n))
        store.queue_push("", str(n))
    assert [store.get("k") for store in stores] == [store.queue_pop("k") for store in stores] == [b"%d" % n for n in range(len(stores))]
    assert [store.list_keys() for store in stores[1:]] == [["k"]] * (len(stores) - 1)


def test_keys_that_are_not_text(store: C10dStore) -> None:
    """As in torch's own stores: any bytes are a key, but a listing of keys is one of texts."""
    keys = [b"\xff", b"%FF", b"\xed\xb3\xbf", b"\xffa", b"", b"a\xc3", "aÃ".encode()]
    hashed = dist.HashStore()
    for used in (store, hashed):
        for n, key in enumerate(keys):
            used.set(key, str(n))
        assert [used.get(key) for key in keys] == [b"%d" % n for n in range(len(keys))]
        assert used.num_keys() == len(keys)
        with pytest.raises(UnicodeDecodeError):
            used.list_keys()
    store.queue_push(b"\xff", "element")
    assert store.queue_pop(b"\xff") == b"element"
    # Torch's C++ hands keys on as str.
    with pytest.raises(UnicodeDecodeError):
        dist.PrefixStore("p", store).set(b"\xff", "1")


# --- what torch's C++ makes of it ----------------------------------------------------------------------------------------------------


def test_the_object_outlives_its_last_name(kv: MemoryStore) -> None:
    through = dist.PrefixStore("p", C10dStore(kv))
    copy = through.clone()
    gc.collect()
    through.set("k", "1")
    assert copy.get("k") == b"1"


def test_a_python_store_that_is_not_kept_is_lost() -> None:
    """Why `C10dStore` keeps its objects. Once this fails, torch does it, and the set of them can go."""

    class Plain(dist.Store):  # type: ignore[misc, name-defined]
        def set(self, key: str, value: bytes) -> None:
            raise AssertionError("found")

    plain = Plain()
    gone = weakref.ref(plain)
    through = dist.PrefixStore("p", plain)
    del plain
    gc.collect()
    assert gone() is None
    with pytest.raises(RuntimeError, match="Not implemented"):
        through.set("k", "v")


def test_cpp_finds_every_method_that_it_asks_for(store: C10dStore) -> None:
    through = dist.PrefixStore("p", store)
    through.set("k", "1")
    assert through.get("k") == b"1"
    assert through.add("k", 1) == 2
    assert through.compare_set("k", "2", b"\xff") == b"\xff"
    assert through.num_keys() == 1
    assert through.delete_key("k")
    assert not through.delete_key("k")
    through.append("k", b"\xfe")
    through.multi_set(["l"], ["m"])
    assert through.multi_get(["k", "l"]) == [b"\xfe", b"m"]
    assert through.check(["k", "l"])
    through.wait(["k"])
    through.wait(["k"], timedelta(seconds=1))
    assert through.has_extended_api()
    through.set_timeout(timedelta(seconds=7))
    assert store.timeout == timedelta(seconds=7)
    assert dist.PrefixStore("q", through).underlying_store is not None


@pytest.mark.parametrize(
    "call", [lambda s: s.queue_push("q", "1"), lambda s: s.queue_pop("q", False), lambda s: s.queue_len("q"), lambda s: s.list_keys()]
)
def test_what_cpp_does_not_ask_python_for(store: C10dStore, call: Callable[[Any], object]) -> None:
    """Said in the docstring, with ``prefix=`` as the remedy. Once this fails, torch asks, and the sentence can go."""
    with pytest.raises(NotImplementedError):
        call(dist.PrefixStore("p", store))


@pytest.mark.parametrize(
    ("module", "unwanted"),
    [("etha_ray.kvstore", ("etha_ray.kvstore.c10d",)), ("etha_ray.kvstore.c10d", ("ray", "grpc", "pyetcd", "etcd3"))],
)
def test_importing_loads_no_more_than_it_needs(module: str, unwanted: tuple[str, ...]) -> None:
    code = f"import sys, {module}; print([name for name in {unwanted} if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert result.stdout.strip() == "[]"


def test_repr(store: C10dStore, kv: MemoryStore) -> None:
    assert kv.namespace in repr(store)
    assert "prefix='p'" in repr(C10dStore(kv, "p"))
