"""Any sequence of calls has the same answers on our store as on torch's HashStore; any key comes back as it went in."""

from __future__ import annotations

import re
import uuid
from typing import Any

import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

from etha_ray.kvstore import MemoryStore
from etha_ray.kvstore.c10d import C10dStore
from etha_ray.kvstore.c10d.names import keys_of, queue_name, stored_name

KEYS = st.sampled_from(["a", "a/b", "%", ""])
VALUES = st.sampled_from(["", "0", "7", "-3", "12"])
CALLS = st.one_of(
    st.tuples(st.sampled_from(["set", "append", "queue_push"]), KEYS, VALUES),
    st.tuples(st.just("compare_set"), KEYS, VALUES, VALUES),
    st.tuples(st.just("add"), KEYS, st.integers(-5, 5)),
    st.tuples(st.sampled_from(["delete_key", "get", "queue_len"]), KEYS),
    st.tuples(st.just("queue_pop"), KEYS, st.just(False)),
    st.tuples(st.just("check"), st.lists(KEYS, max_size=3)),
    st.tuples(st.just("multi_set"), st.just(["a", "%", "a"]), st.lists(VALUES, min_size=3, max_size=3)),
    st.tuples(st.sampled_from(["num_keys", "list_keys"])),
)
NUMBER = re.compile(rb"-?[0-9]{1,17}")


def answer(store: Any, call: tuple[Any, ...]) -> object:
    name, *arguments = call
    if name in ("get", "add") and arguments[0] not in store.list_keys():
        return store.add(*arguments) if name == "add" else "it would wait"
    if name == "add" and not NUMBER.fullmatch(store.get(arguments[0])):
        return "not the same in any two of torch's stores"
    try:
        found = getattr(store, name)(*arguments)
    except dist.QueueEmptyError:
        return "the queue is empty"
    return sorted(found) if name == "list_keys" else found


@settings(max_examples=200, deadline=None)
@given(st.lists(CALLS, max_size=40))
def test_same_answers_as_torch(calls: list[tuple[Any, ...]]) -> None:
    kv = MemoryStore(uuid.uuid4().hex)
    ours, torchs = C10dStore(kv), dist.HashStore()
    for call in calls:
        assert answer(ours, call) == answer(torchs, call), call
    assert {key: ours.get(key) for key in ours.list_keys()} == {key: torchs.get(key) for key in torchs.list_keys()}
    kv.close()


@settings(deadline=None)
@given(st.one_of(st.binary(), st.text(alphabet=st.characters(exclude_categories=["Cs"])), st.text(alphabet="%2Fqueu/\0é")))
def test_names_of_keys(key: str | bytes) -> None:
    name = stored_name(key)
    assert keys_of([name, queue_name(key), f"{queue_name(key)}/ab"]) == [key.encode() if isinstance(key, str) else key]
    assert queue_name(key).startswith(name)
    name.encode()


@settings(deadline=None)
@given(st.text(alphabet="ab/é日\0 ."))
def test_an_ordinary_key_is_its_own_name(key: str) -> None:
    assert stored_name(key) == key
