"""What members say of their tensors: how many bytes of it are in the store, and what happens when plans differ."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
import torch
from torch.distributed.tensor import Shard

from etha_ray.errors import StoreError, TensorMismatchError
from etha_ray.kvstore import MemoryStore
from etha_ray.tensor_bus import registration
from etha_ray.tensor_bus.agreement import Agreement, agree
from etha_ray.tensor_bus.manifests import Manifests, needs_saying, said
from etha_ray.tensor_bus.records import BatchRecord, Manifest, PlanInputs, TensorSpec, encode, manifest_key
from etha_ray.testing import succeed, together
from tests.tensor_bus.cluster import LONG, LocalCluster, local_cluster

TENSORS = 120


def stored(ranks: int, sizes: list[int]) -> tuple[int, int]:
    """Register tensors of so many rows on so many ranks: bytes of all descriptions, and of all records, in the store."""
    with local_cluster(1) as cluster:
        sides = [*cluster.side("a", "b", [0] * ranks, (ranks,), [Shard(0)]), *cluster.side("b", "a", [0], None, None)]
        succeed(*[side.join for side in sides])
        rows = torch.arange(max(sizes))
        tensors = [[(side.cut(rows[:size]), "pair") for size in sizes] for side in sides]
        succeed(
            *[lambda side=side, t=t: side.client.register_tensors("x", t, timeout=2 * LONG) for side, t in zip(sides, tensors, strict=True)]
        )
        return bytes_under(cluster, "manifest/"), bytes_under(cluster, "batch/")


def bytes_under(cluster: LocalCluster, prefix: str) -> int:
    return sum(len(key) + len(value) for key, value in cluster.store.list(prefix).items())


def test_metadata_grows_with_ranks_not_with_ranks_times_tensors() -> None:
    """Of tensors whose shards are even, and of tensors of which the shards of some ranks are smaller, or empty."""
    uneven, even = [100 + number for number in range(TENSORS)], [8 * (100 + number) for number in range(TENSORS)]
    one = len(encode(Manifest(tuple(TensorSpec("int64", (size,)) for size in even))))
    for sizes, descriptions in ((even, 2), (uneven, 3)):  # one a side; and what differs, on whichever rank, about once more
        found = {ranks: stored(ranks, sizes) for ranks in (2, 4, 8)}
        for ranks, (described, recorded) in found.items():
            assert described < (descriptions + 0.3) * one
            assert recorded < 400 * (ranks + 1)
        assert abs(found[8][0] - found[2][0]) < 0.5 * one


def record(digest: str) -> BatchRecord:
    return BatchRecord(registration="r", attempt="a", manifest=digest)


def test_a_manifest_is_read_as_it_was_said() -> None:
    store = MemoryStore("manifests")
    first = Manifest(tuple(TensorSpec("float32", (size, 4)) for size in range(50)))
    other = Manifest((*first.tensors[:-1], TensorSpec("float32", None, (99, 4))))
    shorter = Manifest(first.tensors[:3])
    for manifest, whole in ((first, True), (other, False), (shorter, True)):
        mine, theirs = Manifests(store), Manifests(store)
        base = theirs.say(record(theirs.add(first)))
        said_record = record(mine.add(manifest))
        assert needs_saying(said_record, base) == (manifest is not first)
        assert said([base, said_record]) == (manifest is first)
        if manifest is not first:
            said_record = mine.say_differences(said_record, base)
        assert said([base, said_record])
        assert (said_record.differences == "") == whole
        assert Manifests(store).read(said_record) == manifest
        assert theirs.read(said_record) == manifest
    store.close()


def test_what_another_program_wrote_is_refused() -> None:
    store = MemoryStore("manifests")
    mine = Manifests(store)
    first, other = Manifest((TensorSpec("float32", (3,)),)), Manifest((TensorSpec("float32", (4,)),))
    base = mine.say(record(mine.add(first)))
    differing = mine.say_differences(record(mine.add(other)), base)
    for changed in ({"manifest": "0" * 32}, {"differences": ""}):
        with pytest.raises(StoreError, match=r"is not what .* make; another program"):
            Manifests(store).read(msgspec.structs.replace(differing, **changed))
    store.set_bytes(manifest_key(base.manifest), b"garbage")
    with pytest.raises(StoreError, match="does not hold what its name says; another program"):
        Manifests(store).read(base)
    store.delete(manifest_key(base.manifest))
    with pytest.raises(StoreError, match="does not hold"):
        Manifests(store).read(base)
    store.close()


@pytest.mark.parametrize("what", ["tensor", "count", "version"])
def test_plans_that_differ_are_named(monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    """As a member of another version would make them, from the same records."""

    def otherwise(batch_id: str, pair_name: str, match: Any, *manifests: Any) -> Agreement:
        agreement = agree(batch_id, pair_name, match, *manifests)
        if match.local[0].peer != "b":
            return agreement
        inputs = agreement.inputs
        if what == "tensor":
            inputs = PlanInputs(inputs.common, (inputs.tensors[0], inputs.tensors[1].replace("float32", "float31")))
        elif what == "count":
            inputs = PlanInputs(inputs.common, inputs.tensors[:1])
        else:
            inputs = PlanInputs(("another planner", *inputs.common[1:]), inputs.tensors)
        return Agreement(agreement.tensors, inputs, agreement.refused)

    monkeypatch.setattr(registration, "agree", otherwise)
    words = {
        "tensor": ["tensor 1: ", "float32", "float31", "[4]"],
        "count": ["'2 tensors'", "'1 tensors'"],
        "version": ["another planner"],
    }[what]
    with local_cluster() as cluster:
        one, two = cluster.pair()
        for _ in range(2):
            raised = together(
                *[
                    lambda c=c: c.register_tensors("x", [(torch.zeros(3), "pair"), (torch.zeros(4), "pair")], timeout=LONG)
                    for c in (one, two)
                ]
            )
            for found in raised:
                assert type(found) is TensorMismatchError, found
                for word in ["batch 'x', pair 'pair'", "different plans", "same versions", *words]:
                    assert word in str(found)
        monkeypatch.undo()
        for handler in succeed(*[lambda c=c: c.register_tensors("x", [(torch.zeros(3), "pair")], timeout=LONG) for c in (one, two)]):
            handler.close()
