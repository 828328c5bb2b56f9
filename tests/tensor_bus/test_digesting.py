"""Digests through agents: both sides have the same after a transfer, however each holds the tensors."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.distributed.tensor import Partial, Replicate, Shard

from etha_ray.errors import BatchClosedError, LayoutError, PeerLostError, TransferTimeoutError
from etha_ray.tensor_bus.batch_handler import BatchHandler
from etha_ray.tensor_bus.tensors import Piece
from etha_ray.testing import succeed, together
from tests.tensor_bus.cluster import LONG, LocalCluster, Side, local_cluster

WHOLES = [torch.arange(7 * 10.0).reshape(7, 10), torch.randn(6, 33).to(torch.bfloat16), torch.zeros(3, 0), torch.ones(9, 2) > 0]


@pytest.fixture
def cluster() -> Iterator[LocalCluster]:
    with local_cluster(3) as cluster:
        yield cluster


def registered(sides: list[Side], wholes: list[torch.Tensor]) -> tuple[list[BatchHandler], list[list[torch.Tensor]]]:
    succeed(*[side.join for side in sides])
    tensors = [[side.cut(whole) for whole in wholes] for side in sides]
    calls = [
        lambda side=side, own=own: side.client.register_tensors("batch", [(tensor, "pair") for tensor in own], timeout=LONG)
        for side, own in zip(sides, tensors, strict=True)
    ]
    return succeed(*calls), tensors


def digests(handlers: list[BatchHandler]) -> list[list[str]]:
    return succeed(*[lambda each=each: each.digest(LONG) for each in handlers])


def test_both_sides_have_the_same_after_a_transfer(cluster: LocalCluster) -> None:
    sources = cluster.side("a", "b", [0, 1, 2, 1], (2, 2), [Shard(0), Replicate()])
    targets = cluster.side("b", "a", [2, 0, 1], (3,), [Shard(1)])
    handlers, tensors = registered([*sources, *targets], WHOLES)
    for tensor in (tensor for own in tensors[4:] for tensor in own):
        tensor.zero_()
    mine, theirs = digests(handlers[:4]), digests(handlers[4:])
    assert mine == [mine[0]] * 4
    assert theirs == [theirs[0]] * 3
    assert [one == two for one, two in zip(mine[0], theirs[0], strict=True)] == [False, False, True, False]
    for step in range(3):
        ways = ["send"] * 4 + ["recv"] * 3
        calls = [lambda each=each, way=way: each.transfer(way, True, LONG) for each, way in zip(handlers, ways, strict=True)]
        succeed(*calls)
        assert digests(handlers[4:]) == [digests(handlers[:4])[0]] * 3
        before = digests(handlers[:4])[0]
        for own in tensors[:4]:
            own[1].add_(1 + step)
        assert [one == two for one, two in zip(before, digests(handlers[:4])[0], strict=True)] == [True, False, True, True]
    tensors[4][0][3, 1] += 1  # one element of one rank
    assert [one == two for one, two in zip(before, digests(handlers[4:])[0], strict=True)] == [False, True, True, True]


def test_without_meshes_each_rank_has_its_own(cluster: LocalCluster) -> None:
    one, two, source, _ = cluster.batch()
    assert one.digest() != two.digest()
    succeed(lambda: one.transfer("send", True, LONG), lambda: two.transfer("recv", True, LONG))
    assert one.digest() == two.digest()
    source.view(-1)[0] = -source.view(-1)[0]  # 0.0 and -0.0
    assert one.digest() != two.digest()


def test_pieces_have_the_same_as_shards(cluster: LocalCluster) -> None:
    whole = torch.randn(10, 4)
    sources, targets = cluster.side("a", "b", [0, 1], (2,), [Replicate()]), cluster.side("b", "a", [2], (1,), [Replicate()])
    succeed(*[side.join for side in (*sources, *targets)])
    parts: list[Any] = [Piece(whole[:7].clone(), (10, 4), (0, 0)), Piece(whole[7:].clone(), (10, 4), (7, 0)), whole.clone()]
    calls = [
        lambda side=side, part=part: side.client.register_tensors("batch", [(part, "pair")], timeout=LONG)
        for side, part in zip((*sources, *targets), parts, strict=True)
    ]
    handlers = succeed(*calls)
    assert digests(handlers[:2]) == [digests(handlers[2:])[0]] * 2


def test_partial_has_none(cluster: LocalCluster) -> None:
    sources, targets = cluster.side("a", "b", [0], (1,), [Replicate()]), cluster.side("b", "a", [1, 2], (2,), [Shard(0)])
    sources[0].placements = [Partial("sum")]
    succeed(*[side.join for side in (*sources, *targets)])
    calls = [
        lambda side=side, rows=rows: side.client.register_tensors("batch", [(torch.ones(rows, 2), "pair")], timeout=LONG)
        for side, rows in zip((*sources, *targets), (4, 2, 2), strict=True)
    ]
    handlers = succeed(*calls)
    with pytest.raises(LayoutError, match="tensor 0 is Partial on this side"):
        handlers[0].digest(LONG)
    digests(handlers[1:])


def test_who_does_not_come_is_named_and_the_next_try_is_right(cluster: LocalCluster) -> None:
    sources = cluster.side("a", "b", [0, 1], (2,), [Shard(0)])
    handlers, tensors = registered([*sources, *cluster.side("b", "a", [2], (1,), [Replicate()])], WHOLES[:1])
    for _ in range(2):
        with pytest.raises(TransferTimeoutError, match=r"a\[1\] did not ask for one"):
            handlers[0].digest(3.0)
        tensors[0][0].add_(1)
    assert together(lambda: handlers[1].digest(0.3))[0].__class__ is TransferTimeoutError  # what was said was taken back
    mine = digests(handlers[:2])
    assert mine[0] == mine[1]
    both = together(lambda: handlers[0].digest(LONG), handlers[1].close)
    assert isinstance(both[0], (BatchClosedError, PeerLostError)), both
