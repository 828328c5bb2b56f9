"""What only one side can send, and plans that do not prove right."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from torch.distributed.tensor import Partial, Replicate, Shard

from etha_ray.errors import EthaRayError, LayoutError, TensorMismatchError
from etha_ray.plan import Route, routes_into
from etha_ray.tensor_bus import executor
from etha_ray.tensor_bus.tensors import Piece
from etha_ray.testing import succeed, together
from tests.tensor_bus import cluster as acts
from tests.tensor_bus.cluster import LONG, LocalCluster, Side, local_cluster, process_cluster
from tests.tensor_bus.groups import Group, Groups, finish


def registered(sides: Sequence[Side], things: Sequence[Any], **more: Any) -> list[Any]:
    succeed(*[side.join for side in sides])
    return succeed(
        *[
            lambda side=side, thing=thing: side.client.register_tensors("x", [(thing, "pair")], timeout=LONG, **more)
            for side, thing in zip(sides, things, strict=True)
        ]
    )


def refused(givers: Sequence[Any], takers: Sequence[Any], error: type[EthaRayError], *words: str) -> None:
    """Everyone is told at once, whether it waits in the call or later; before a byte moves."""
    for blocking in (True, False):
        calls = [(giver, "send") for giver in givers] + [(taker, "recv") for taker in takers]
        for handler, what in calls:
            with pytest.raises(error) as caught:
                handler.transfer(what, blocking=blocking, timeout=LONG).result(LONG)
            assert type(caught.value) is error
            for word in ("batch 'x', pair 'pair', tensor 0", *words):
                assert word in str(caught.value)


def sent(givers: Sequence[Any], takers: Sequence[Any]) -> None:
    calls = [(giver, "send") for giver in givers] + [(taker, "recv") for taker in takers]
    for semaphore in [handler.transfer(what) for handler, what in calls]:
        semaphore.result(LONG)


@pytest.fixture
def cluster() -> Iterator[LocalCluster]:
    with local_cluster() as cluster:
        yield cluster


def test_a_partial_cannot_be_received(cluster: LocalCluster) -> None:
    sides = [*cluster.side("a", "b", [0, 1], (2,), [Partial()]), *cluster.side("b", "a", [1, 0], (2,), [Shard(0)])]
    tensors = [torch.ones(4), torch.ones(4), torch.zeros(2), torch.zeros(2)]
    handlers = registered(sides, tensors)
    refused(handlers[2:], handlers[:2], LayoutError, "'b' to 'a'", "target layout 2: P(sum) has a Partial", "Replicate()")
    assert tensors[0].tolist() == [1.0] * 4
    sent(handlers[:2], handlers[2:])
    assert torch.cat(tensors[2:]).tolist() == [2.0] * 4


@pytest.mark.parametrize(
    ("float_dtype", "int_dtype", "words"),
    [
        (torch.float32, torch.int32, "integers cannot keep real numbers"),
        (torch.int64, torch.int32, "does not fit wraps around"),
        (torch.complex64, torch.float32, "real numbers cannot keep complex numbers"),
        (torch.float16, torch.bool, "truth values cannot keep real numbers"),
    ],
    ids=str,
)
def test_a_lossy_cast_is_refused_one_way(cluster: LocalCluster, float_dtype: torch.dtype, int_dtype: torch.dtype, words: str) -> None:
    sides = [*cluster.side("a", "b", [0, 1], (2,), [Shard(0)]), *cluster.side("b", "a", [1], None, None)]
    lossless, lossy = torch.tensor([1, 0, 1]).to(int_dtype), [torch.zeros(2).to(float_dtype), torch.zeros(1).to(float_dtype)]
    handlers = registered(sides, [*lossy, lossless])
    refused(handlers[:2], handlers[2:], TensorMismatchError, "'a' to 'b'", words, "allow_lossy=True")
    sent(handlers[2:], handlers[:2])
    assert torch.cat(lossy).real.tolist() == [1, 0, 1]


def test_whoever_receives_allows_it(cluster: LocalCluster) -> None:
    one, two = cluster.side("a", "b", [0], None, None)[0], cluster.side("b", "a", [1], None, None)[0]
    succeed(one.join, two.join)
    floats, integers = torch.tensor([1.5, -2.5]), torch.zeros(2, dtype=torch.int64)
    for allowed in ((True, False), (False, True)):
        handlers = succeed(
            *[
                lambda side=side, tensor=tensor, allow=allow: side.client.register_tensors(
                    "x", [(tensor, "pair")], timeout=LONG, allow_lossy=allow
                )
                for side, tensor, allow in zip((one, two), (floats, integers), allowed, strict=True)
            ]
        )
        if allowed[1]:
            sent(handlers[:1], handlers[1:])
            assert integers.tolist() == [1, -2]
        else:
            refused(handlers[:1], handlers[1:], TensorMismatchError, "the side that receives")
        for handler in handlers:
            handler.close()


def test_pieces_with_a_gap_can_only_be_received(cluster: LocalCluster) -> None:
    sides = [*cluster.side("a", "b", [0, 1], (2,), [Shard(0)]), *cluster.side("b", "a", [1], (1,), [Replicate()])]
    tensors = [torch.zeros(3), torch.zeros(2), torch.arange(8.0)]
    handlers = registered(sides, [Piece(tensors[0], (8,), (0,)), Piece(tensors[1], (8,), (6,)), tensors[2]])
    refused(handlers[:2], handlers[2:], LayoutError, "'a' to 'b'", "no source holds [3:6]", "target 0", "offsets and sizes")
    sent(handlers[2:], handlers[:2])
    assert torch.cat(tensors[:2]).tolist() == [0, 1, 2, 6, 7]


def test_through_agents_in_processes() -> None:
    with process_cluster(2) as cluster:
        groups = Groups(cluster)
        source, target = Group([0, 1], (2,), [Partial()]), Group([1, 0], (2,), [Shard(0)])
        sides = groups.workers(source, target)
        for group, workers, (name, other) in zip((source, target), sides, (("a", "b"), ("b", "a")), strict=True):
            for index, worker in enumerate(workers):
                worker.start(acts.join_pair, "p", name, other, 2, group.spec(index), list(group.placements))
        finish(sides)
        for group, workers in zip((source, target), sides, strict=True):
            for index, worker in enumerate(workers):
                worker.start(acts.register, "x", [(group.part(torch.ones(4), 0, index), "p")])
        finish(sides)
        for workers, what in zip(sides, ("recv", "send"), strict=True):
            for worker in workers:
                with pytest.raises(LayoutError, match="has a Partial"):
                    worker.call(acts.transfer, "x", what)
        for workers, what in zip(sides, ("send", "recv"), strict=True):
            for worker in workers:
                worker.start(acts.transfer, "x", what)
        finish(sides)
        assert [worker.call(acts.read, "x")[0].tolist() for worker in sides[1]] == [[2.0, 2.0]] * 2


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda routes: routes[1:], r"writes 6 elements into target \d, which holds 12"),
        (lambda routes: (routes[0], dataclasses.replace(routes[1], boxes=routes[0].boxes)), r"reads .* and writes .* of the tensor"),
    ],
    ids=["missing", "twice"],
)
def test_a_plan_is_proved_before_it_is_used(cluster: LocalCluster, monkeypatch: pytest.MonkeyPatch, spoil: Any, words: str) -> None:
    def wrong(*arguments: Any) -> tuple[Route, ...]:
        routes: tuple[Route, ...] = spoil(routes_into(*arguments))
        return routes

    sides = [*cluster.side("a", "b", [0, 1], (2,), [Shard(0)]), *cluster.side("b", "a", [1, 0], (2,), [Shard(1)])]
    succeed(*[side.join for side in sides])

    def register(side: Side) -> Any:
        return side.client.register_tensors("x", [(side.cut(torch.ones(4, 6)), "pair")], timeout=LONG)

    monkeypatch.setattr(executor, "routes_into", wrong)
    for found in together(*[lambda side=side: register(side) for side in sides]):
        assert type(found) is LayoutError, found
        assert re.search(rf"batch 'x', pair 'pair', tensor 0: the plan from .*{words}.*report it", str(found)), found
    monkeypatch.undo()
    succeed(*[lambda side=side: register(side) for side in sides])
