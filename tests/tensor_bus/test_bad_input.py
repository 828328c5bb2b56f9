"""Bad input: its own error at once on every side that is there, naming the tensor, both layouts and the remedy; usable afterwards."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
from torch.distributed.tensor import Replicate, Shard

from etha_ray.errors import (
    LayoutError,
    PairMismatchError,
    TensorMismatchError,
)
from etha_ray.layout import MeshSpec
from etha_ray.tensor_bus.client import TensorBusClient
from etha_ray.tensor_bus.tensors import Piece, Registrable
from etha_ray.testing import eventually, succeed, together
from tests.tensor_bus.cluster import LONG, local_cluster

PROMPT = LONG / 2
"""Seconds that an error may take on a loaded machine and still has not waited for the timeout."""

Tensors = list[tuple[Registrable, str]]


def register_both(one: TensorBusClient, two: TensorBusClient, mine: Tensors, theirs: Tensors) -> list[Any]:
    return together(lambda: one.register_tensors("batch", mine, timeout=LONG), lambda: two.register_tensors("batch", theirs, timeout=LONG))


def works(one: TensorBusClient, two: TensorBusClient, source: torch.Tensor, target: torch.Tensor, pair: str = "pair") -> None:
    """The pair and the batch id can be used."""
    handlers = register_both(one, two, [(source, pair)], [(target, pair)])
    for handler in handlers:
        if isinstance(handler, BaseException):
            raise handler
    handlers[0].transfer("send")
    handlers[1].transfer("recv").result(LONG)
    assert torch.equal(source, target)
    for handler in handlers:
        handler.close()


class TestBothSidesAreTold:
    @pytest.mark.parametrize(
        ("mine", "theirs", "error", "words"),
        [
            ([torch.zeros(2, 3)], [torch.zeros(3, 2)], TensorMismatchError, ["tensor 0", "[2, 3]", "[3, 2]"]),
            ([torch.zeros(2), torch.zeros(3)], [torch.zeros(2)], TensorMismatchError, ["registered", "2", "1"]),
        ],
        ids=["shape", "count"],
    )
    def test_without_mesh(self, mine: list[torch.Tensor], theirs: list[torch.Tensor], error: type[Exception], words: list[str]) -> None:
        with local_cluster() as cluster:
            one, two = cluster.pair()
            for _ in range(3):
                start = time.monotonic()
                raised = register_both(one, two, [(tensor, "pair") for tensor in mine], [(tensor, "pair") for tensor in theirs])
                assert time.monotonic() - start < PROMPT
                for found in raised:
                    assert type(found) is error, found
                    assert isinstance(found, ValueError)
                    for word in [*words, "batch 'batch'", "pair 'pair'", "same order"]:
                        assert word in str(found)
                works(one, two, torch.ones(5), torch.zeros(5))

    def test_both_layouts_are_named(self) -> None:
        with local_cluster() as cluster:
            sides = [
                *cluster.side("a", "b", [0, 1], (2,), [Shard(0)]),
                *cluster.side("b", "a", [0, 1], (2,), [Shard(1)]),
            ]
            succeed(*[side.join for side in sides])
            whole, wrong = torch.arange(24.0).reshape(4, 6), torch.zeros(4, 8)
            for _ in range(2):
                raised = together(
                    *[
                        lambda side=side, t=t: side.client.register_tensors("x", [(side.cut(t), "pair")], timeout=LONG)
                        for side, t in zip(sides, [whole, whole, wrong, wrong], strict=True)
                    ]
                )
                for found in raised:
                    assert type(found) is TensorMismatchError, found
                    for word in ("tensor 0", "2: S0", "2: S1", "[4, 6]", "[4, 8]", "register the same"):
                        assert word in str(found)
            good = succeed(
                *[lambda side=side: side.client.register_tensors("x", [(side.cut(whole), "pair")], timeout=LONG) for side in sides]
            )
            succeed(*[lambda h=h, d=d: h.transfer(d, True, LONG) for h, d in zip(good, ["send", "send", "recv", "recv"], strict=True)])

    def test_local_shape_that_does_not_fit_the_layout(self) -> None:
        with local_cluster() as cluster:
            sides = [*cluster.side("a", "b", [0, 1], (2,), [Shard(0)]), *cluster.side("b", "a", [0], (1,), [Replicate()])]
            succeed(*[side.join for side in sides])
            shapes = [(2, 3), (3, 3), (5, 3)]  # torch.chunk gives the first the larger part
            raised = together(
                *[
                    lambda side=side, shape=shape: side.client.register_tensors("x", [(torch.zeros(shape), "pair")], timeout=LONG)
                    for side, shape in zip(sides, shapes, strict=True)
                ]
            )
            for found in raised:
                assert type(found) is LayoutError, found
                for word in ("tensor 0", "'a'", "2: S0", "(2, 3)", "torch.chunk"):
                    assert word in str(found)

    def test_three_members_are_told_also_of_another_pair(self) -> None:
        with local_cluster() as cluster:
            one, two, three = cluster.client(0), cluster.client(1), cluster.client(1)
            succeed(
                lambda: (one.init_pair("p", "a", "b", 1), one.init_pair("q", "a", "c", 1)),
                lambda: two.init_pair("p", "b", "a", 1),
                lambda: three.init_pair("q", "c", "a", 1),
            )
            handlers = [
                one.register_tensors("x", [(torch.zeros(2), "p"), (torch.zeros(2), "q")], blocking=False),
                three.register_tensors("x", [(torch.zeros(2), "q")], blocking=False),
            ]
            # Both know of one another: the one lacks nobody but 'b', and the other has agreed to their pair.
            first, third = (cluster.agents[rank]._service._batches for rank in (0, 1))
            alone = ["'b' lacks index [0] of 1 (pair 'p')"]
            eventually(lambda: [each.job.cancellation.waits_for for each in first.all() if each.job] == alone)
            eventually(lambda: [each.work.has_agreed for each in third.all()] == [True])
            raised = together(
                lambda: two.register_tensors("x", [(torch.zeros(3), "p")], timeout=LONG),
                *[lambda handler=handler: handler.wait_ready(LONG) for handler in handlers],
            )
            assert [type(found) for found in raised] == [TensorMismatchError] * 3

    @pytest.mark.parametrize(
        ("mine", "theirs", "words"),
        [
            (("a", "b", 1, None, None), ("b", "c", 1, None, None), ["expects 'c'", "remote_name"]),
            (("a", "b", 2, None, None), ("b", "a", 3, None, None), ["2", "3", "device_mesh"]),
            (("a", "b", 2, None, None), ("b", "a", 1, MeshSpec((1,), (0,)), [Replicate()]), ["no mesh", "1: R", "device_mesh"]),
        ],
        ids=["names", "unequal", "bare"],
    )
    def test_pair(self, mine: tuple[Any, ...], theirs: tuple[Any, ...], words: list[str]) -> None:
        with local_cluster() as cluster:
            one, two = cluster.client(0), cluster.client(1)
            start = time.monotonic()
            raised = together(lambda: one.init_pair("pair", *mine, timeout=LONG), lambda: two.init_pair("pair", *theirs, timeout=LONG))
            assert time.monotonic() - start < PROMPT
            for found in raised:
                assert type(found) is PairMismatchError, found
                for word in [*words, "pair 'pair'"]:
                    assert word in str(found)
            succeed(lambda: one.init_pair("pair", "a", "b", 1, timeout=LONG), lambda: two.init_pair("pair", "b", "a", 1, timeout=LONG))
            works(one, two, torch.ones(3), torch.zeros(3))

    def test_workers_of_one_side_disagree(self) -> None:
        with local_cluster() as cluster:
            clients = [cluster.client(0) for _ in range(3)]
            raised = together(
                lambda: clients[0].init_pair("p", "a", "b", 2, MeshSpec((2,), (0,)), [Shard(0)], timeout=LONG),
                lambda: clients[1].init_pair("p", "a", "b", 2, MeshSpec((2,), (1,)), [Shard(1)], timeout=LONG),
            )
            for found in raised:
                assert type(found) is PairMismatchError, found
                assert "2: S0" in str(found)
                assert "2: S1" in str(found)
            succeed(
                lambda: clients[0].init_pair("p", "a", "b", 2, MeshSpec((2,), (0,)), [Shard(0)], timeout=LONG),
                lambda: clients[1].init_pair("p", "a", "b", 2, MeshSpec((2,), (1,)), [Shard(0)], timeout=LONG),
                lambda: clients[2].init_pair("p", "b", "a", 1, timeout=LONG),
            )


class TestPieces:
    @pytest.mark.parametrize(
        ("shape", "whole", "offsets", "words"),
        [
            ((2, 3), (4, 3), (3, 0), r"shape \(2, 3\) at offsets \(3, 0\) does not lie inside a tensor of shape \(4, 3\)"),
            ((2, 3), (4, 3), (-1, 0), "does not lie inside"),
            ((2, 3), (4,), (0,), "as many dimensions"),
            ((2,), (4,), (0.5,), r"offsets is \(0.5,\); give one integer"),
            ((2,), 4, (0,), "global_shape is 4"),
        ],
    )
    def test_of_one_worker(self, shape: Any, whole: Any, offsets: Any, words: str) -> None:
        with local_cluster() as cluster:
            one, two = cluster.pair()
            with pytest.raises(LayoutError, match=f"tensor 1 of batch 'batch': .*{words}"):
                one.register_tensors("batch", [(torch.zeros(1), "pair"), (Piece(torch.zeros(shape), whole, offsets), "pair")])
            works(one, two, torch.ones(3), torch.zeros(3))

    @pytest.mark.parametrize(
        ("mine", "theirs", "words"),
        [
            ([((0,), 3), ((5,), 3)], [((0,), 4), ((4,), 3)], [r"'a' to 'b': no source holds [3:4]", "target 0", "offsets"]),
            ([((0,), 5), ((3,), 5)], [((0,), 6), ((4,), 4)], ["'a' to 'b': ranks 0 and 1 hold boxes", "[0:5] and [3:8]", "apart"]),
        ],
        ids=["gap", "overlap"],
    )
    def test_neither_side_can_send(self, mine: Any, theirs: Any, words: list[str]) -> None:
        pieces = [Piece(torch.zeros(size), (8,), at) for at, size in (*mine, *theirs)]
        for found in self.register(pieces):
            assert type(found) is LayoutError, found
            for word in ["batch 'x', pair 'pair', tensor 0", *words]:
                assert word in str(found)

    @pytest.mark.parametrize(
        ("mine", "theirs", "words"),
        [
            ((Piece(torch.zeros(4), (8,), (0,)), torch.zeros(4)), None, ["a[1] holds float32 of local shape [4]", "a[0]", "as a piece"]),
            ((Piece(torch.zeros(4), (8,), (0,)), Piece(torch.zeros(5), (9,), (4,))), None, ["of [9]", "of [8]", "on every rank"]),
            (None, (Piece(torch.zeros(4), (8,), (0,)), Piece(torch.zeros(8), (12,), (4,))), ["[8]", "[12]"]),
            (None, (Piece(torch.zeros(4), (12,), (0,)), Piece(torch.zeros(8), (12,), (4,))), ["shape [8]", "shape [12]", "both sides"]),
        ],
        ids=["one rank", "ranks", "ranks of the other side", "sides"],
    )
    def test_disagreement(self, mine: Any, theirs: Any, words: list[str]) -> None:
        good = Piece(torch.zeros(4), (8,), (0,)), Piece(torch.zeros(4), (8,), (4,))
        for found in self.register([*(mine or good), *(theirs or good)]):
            assert type(found) is TensorMismatchError, found
            for word in ["batch 'x', pair 'pair', tensor 0", *words]:
                assert word in str(found)

    @staticmethod
    def register(things: list[Any]) -> list[Any]:
        with local_cluster() as cluster:
            sides = [*cluster.side("a", "b", [0, 1], (2,), [Shard(0)]), *cluster.side("b", "a", [1, 0], (2,), [Shard(0)])]
            succeed(*[side.join for side in sides])
            start = time.monotonic()
            raised = together(
                *[
                    lambda side=side, thing=thing: side.client.register_tensors("x", [(thing, "pair")], timeout=LONG)
                    for side, thing in zip(sides, things, strict=True)
                ]
            )
            assert time.monotonic() - start < PROMPT
            good = succeed(
                *[lambda side=side: side.client.register_tensors("x", [(torch.zeros(4), "pair")], timeout=LONG) for side in sides]
            )
            succeed(*[lambda h=h, d=d: h.transfer(d, True, LONG) for h, d in zip(good, ["send", "send", "recv", "recv"], strict=True)])
        return raised

    def test_ranks_without_a_mesh_all_give_pieces(self) -> None:
        with local_cluster() as cluster:
            sides = [*cluster.side("a", "b", [0, 1], None, None), *cluster.side("b", "a", [0, 1], None, None)]
            succeed(*[side.join for side in sides])
            piece = Piece(torch.zeros(4), (8,), (0,)), Piece(torch.zeros(4), (8,), (4,))
            things: list[Any] = [*piece, torch.zeros(4), torch.zeros(4)]
            raised = together(
                *[
                    lambda side=side, thing=thing: side.client.register_tensors("x", [(thing, "pair")], timeout=LONG)
                    for side, thing in zip(sides, things, strict=True)
                ]
            )
            for found in raised:
                assert type(found) is LayoutError, found
                assert "tensor 0 on 'b': 2 ranks without a device_mesh in a batch with explicit pieces" in str(found)


def test_allow_lossy_is_said_on_all_ranks() -> None:
    with local_cluster() as cluster:
        sides = [*cluster.side("a", "b", [0, 1], (2,), [Shard(0)]), *cluster.side("b", "a", [0], None, None)]
        succeed(*[side.join for side in sides])
        raised = together(
            *[
                lambda side=side, lossy=lossy: side.client.register_tensors(
                    "x", [(side.cut(torch.zeros(4)), "pair")], timeout=LONG, allow_lossy=lossy
                )
                for side, lossy in zip(sides, [False, True, False], strict=True)
            ]
        )
        for found in raised:
            assert type(found) is TensorMismatchError, found
            assert "tensor 0: a[1] and a[0] differ in allow_lossy" in str(found)
