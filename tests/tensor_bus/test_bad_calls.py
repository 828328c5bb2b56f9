"""Bad calls of one side: its own error at once, with the remedy; pairs, batches and agents are usable afterwards."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.distributed.tensor import Partial, Replicate, Shard

from etha_ray.errors import (
    BatchClosedError,
    BatchExistsError,
    BatchUnmatchedError,
    ConfigError,
    CoordinateTakenError,
    LayoutError,
    NotShareableError,
    PairMismatchError,
    PairTimeoutError,
    TransferInProgressError,
    TransferTimeoutError,
    UnknownBatchError,
    UnknownPairError,
    WrongDeviceError,
)
from etha_ray.layout import MeshSpec
from etha_ray.testing import eventually, succeed, together
from tests.tensor_bus.cluster import LONG, LocalCluster, local_cluster
from tests.tensor_bus.test_bad_input import register_both, works


class TestOneSide:
    def test_placements(self) -> None:
        with local_cluster(1) as cluster:
            client = cluster.client()
            mesh = MeshSpec((2, 1), (0, 0))
            bad: list[tuple[Any, Any, str]] = [
                (mesh, [Shard(0)], "1 placements .S0. do not fit the mesh .2, 1. of 2 dimensions: give one"),
                (mesh, None, "without placements"),
                (None, [Shard(0)], "without a device_mesh"),
                (mesh, [Shard(0), "P(norm)"], "not supported"),
                (mesh, [Partial("sum"), Partial("max")], r"mix Partial\(sum\) and Partial\(max\)"),
                (MeshSpec((3,), (0,)), [Shard(0)], "3 coordinates and expected_world_size is 2"),
                ("mesh", [Shard(0)], "DeviceMesh or an etha_ray.MeshSpec"),
            ]
            for device_mesh, placements, words in bad:
                with pytest.raises(LayoutError, match=f"pair 'p'.*{words}"):
                    client.init_pair("p", "a", "b", 2, device_mesh, placements)
            with pytest.raises(UnknownPairError, match="call init_pair"):
                client.register_tensors("x", [(torch.zeros(1), "p")])

    def test_names_and_sizes(self) -> None:
        with local_cluster(1) as cluster:
            client = cluster.client()
            calls: list[tuple[Callable[[], Any], str]] = [
                (lambda: client.init_pair("p", "a", "a", 1), "name of its own"),
                (lambda: client.init_pair("", "a", "b", 1), "pair name ''"),
                (lambda: client.init_pair("p", "a", "b" * 600, 1), "remote name"),
                (lambda: client.init_pair("p", "a\udc80", "b", 1), "local name"),
                (lambda: client.init_pair("p", "a", "b", 0), "expected_world_size 0"),
                (lambda: client.init_pair("p", "a", "b", True), "expected_world_size True"),
                (lambda: client.register_tensors(7, [(torch.zeros(1), "p")]), "batch id 7"),  # type: ignore[arg-type]
                (lambda: client.register_tensors("x", []), "is empty"),
                (lambda: client.register_tensors("x", [torch.zeros(2, 2)]), r"entry 0 .*\(tensor or Piece, pair name\)"),  # type: ignore[list-item]
                (lambda: client.register_tensors("x", [(torch.zeros(1), "p")], bucket_size=0), "bucket_size 0"),
            ]
            for call, words in calls:
                with pytest.raises(ConfigError, match=words):
                    call()

    def test_unknown_pair(self) -> None:
        with local_cluster() as cluster:
            one, two = cluster.pair()
            with pytest.raises(UnknownPairError, match=r"tensor 1 of batch 'batch': pair 'nobody' .*init_pair.*Known pairs: \['pair'\]"):
                one.register_tensors("batch", [(torch.zeros(1), "pair"), (torch.zeros(1), "nobody")])
            works(one, two, torch.ones(3), torch.zeros(3))

    def test_batch_on_one_side_only(self) -> None:
        with local_cluster() as cluster:
            one, two = cluster.pair()
            with pytest.raises(BatchUnmatchedError, match=r"'batch'.*within 0.2 s.*'b' lacks index \[0\] of 1.*register_tensors") as caught:
                one.register_tensors("batch", [(torch.ones(3), "pair")], timeout=0.2)
            assert isinstance(caught.value, TimeoutError)
            works(one, two, torch.ones(3), torch.zeros(3))

    def test_pair_on_one_side_only(self) -> None:
        with local_cluster() as cluster:
            one, two = cluster.client(0), cluster.client(1)
            with pytest.raises(PairTimeoutError, match=r"within 0.2 s: nobody of 'b' has come; 'a' lacks 1 of 2|'a' lacks 1 of 2; nobody"):
                one.init_pair("pair", "a", "b", 2, timeout=0.2)
            with pytest.raises(TimeoutError, match=r"'a' lacks index \[0, 2\] of 3"):
                one.init_pair("pair", "a", "b", 3, MeshSpec((3,), (1,)), [Shard(0)], timeout=0.2)
            succeed(lambda: one.init_pair("pair", "a", "b", 1, timeout=LONG), lambda: two.init_pair("pair", "b", "a", 1, timeout=LONG))
            works(one, two, torch.ones(3), torch.zeros(3))

    def test_coordinate_taken(self) -> None:
        with local_cluster() as cluster:
            first, second = cluster.client(0), cluster.client(1)
            mesh = MeshSpec((2,), (1,))
            first.init_pair("pair", "a", "b", 2, mesh, [Shard(0)], blocking=False)
            eventually(lambda: bool(cluster.store.list("pair/")))
            with pytest.raises(CoordinateTakenError, match=r"index 1 of 'a' is held by pid \d+ on agent 0.*own coordinate"):
                second.init_pair("pair", "a", "b", 2, mesh, [Shard(0)], timeout=LONG)
            first.close()  # frees its place at once
            second.init_pair("pair", "a", "b", 2, mesh, [Shard(0)], blocking=False)
            third, other = cluster.client(0), cluster.client(1)
            succeed(
                lambda: third.init_pair("pair", "a", "b", 2, MeshSpec((2,), (0,)), [Shard(0)], timeout=LONG),
                lambda: other.init_pair("pair", "b", "a", 1, timeout=LONG),
            )

    def test_two_clients_race_for_a_coordinate(self) -> None:
        with local_cluster() as cluster:
            clients = [cluster.client(index % 2) for index in range(4)]
            other = cluster.client(0)
            mesh = MeshSpec((1,), (0,))
            results = together(
                *[lambda c=c: c.init_pair("pair", "a", "b", 1, mesh, [Replicate()], timeout=LONG) for c in clients],
                lambda: other.init_pair("pair", "b", "a", 1, timeout=LONG),
            )
            assert results[4] is None
            assert sorted(type(result).__name__ for result in results[:4]) == ["CoordinateTakenError"] * 3 + ["NoneType"]

    def test_an_intruder_disturbs_no_matched_pair(self) -> None:
        with local_cluster() as cluster:
            one, two = cluster.pair()
            for name, other in (("a", "b"), ("b", "a")):
                with pytest.raises(PairMismatchError, match="2 workers call themselves"):
                    cluster.client(1).init_pair("pair", name, other, 1, timeout=LONG)
            one.init_pair("pair", "a", "b", 1, timeout=LONG)
            two.init_pair("pair", "b", "a", 1, timeout=LONG)
            works(one, two, torch.ones(3), torch.zeros(3))

    def test_one_client_on_both_sides(self) -> None:
        with local_cluster() as cluster:
            one, two = cluster.pair()
            with pytest.raises(PairMismatchError, match="second client for the other side"):
                one.init_pair("pair", "b", "a", 1)
            with pytest.raises(PairMismatchError, match="world_size 1, now with 2"):
                one.init_pair("pair", "a", "b", 2)
            works(one, two, torch.ones(3), torch.zeros(3))

    def test_batch_id_in_use(self) -> None:
        with local_cluster() as cluster:
            first, second, source, target = cluster.batch()
            with pytest.raises(BatchExistsError, match="close its handler first"):
                first.client.register_tensors("batch", [(source, "pair of batch")])
            first.transfer("send")
            second.transfer("recv").result(LONG)
            assert torch.equal(source, target)

    @pytest.mark.parametrize(
        ("make", "error", "words"),
        [
            (lambda: torch.zeros(3, device="meta"), NotShareableError, "meta"),
            (lambda: torch.eye(3).to_sparse(), NotShareableError, "sparse"),
            (lambda: torch.ones(3).expand(4, 3), NotShareableError, "share memory"),
            (lambda: torch.zeros(3, device="cuda"), WrongDeviceError, "cuda"),
        ],
        ids=["meta", "sparse", "expanded", "device"],
    )
    def test_memory_that_cannot_be_shared(self, make: Callable[[], Any], error: type[Exception], words: str) -> None:
        with local_cluster() as cluster:
            one, two = cluster.pair()
            if error is WrongDeviceError and not torch.cuda.is_available():
                pytest.skip("needs a second device")
            tensor = make()
            with pytest.raises(error, match=rf"tensor 1 of batch 'batch'.*{words}"):
                one.register_tensors("batch", [(torch.zeros(1), "pair"), (tensor, "pair")])
            works(one, two, torch.ones(3), torch.zeros(3))


class TestTransfers:
    def test_twice_at_once(self) -> None:
        with local_cluster() as cluster:
            first, second, source, target = cluster.batch()
            sent = first.transfer("send")
            for direction in ("send", "recv"):
                with pytest.raises(TransferInProgressError, match=f"a send is under way; wait for it before the next {direction}"):
                    first.transfer(direction, blocking=True, timeout=LONG)  # type: ignore[arg-type]
            second.transfer("recv").result(LONG)
            sent.result(LONG)
            assert torch.equal(source, target)

    def test_after_close(self) -> None:
        with local_cluster() as cluster:
            first, second, source, target = cluster.batch()
            first.close()
            for call in (lambda: first.transfer("send"), first.query_transfer_signal):
                with pytest.raises(UnknownBatchError, match=r"'batch' is not registered here.*has been closed"):
                    call()
            for _ in range(3):
                with pytest.raises(BatchClosedError, match=r"a\[0\] is gone .*close this batch, and register it again"):
                    second.transfer("recv", blocking=True, timeout=LONG)
            second.close()
            works(first.client, second.client, source, target, "pair of batch")

    def test_unknown_direction_and_batch(self) -> None:
        with local_cluster() as cluster:
            first, _, _, _ = cluster.batch()
            with pytest.raises(ConfigError, match='give "send" or "recv"'):
                first.transfer("both")  # type: ignore[arg-type]
            with pytest.raises(UnknownBatchError, match=r"'other' is not registered.*\['batch'\]"):
                first.client.transfer("other", "send")

    def test_both_send(self) -> None:
        with local_cluster() as cluster:
            first, second, source, target = cluster.batch()
            raised = together(*[lambda h=h: h.transfer("send", blocking=True, timeout=0.2) for h in (first, second)])
            assert [type(found) for found in raised] == [TransferTimeoutError] * 2
            first.transfer("send")
            second.transfer("recv", blocking=True, timeout=LONG)
            assert torch.equal(source, target)

    def test_zero_time(self) -> None:
        with local_cluster() as cluster:
            first, second, _, _ = cluster.batch()
            with pytest.raises(TransferTimeoutError, match="after 0 s"):
                second.transfer("recv", blocking=True, timeout=0)
            with pytest.raises(TimeoutError):
                first.transfer("send").result(0)


def test_agents_without_shared_memory_are_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    with local_cluster() as cluster:
        monkeypatch.setattr("etha_ray.tensor_bus.ways.shares_memory", lambda agent: False)
        one, two = cluster.pair()
        for found in register_both(one, two, [(torch.ones(1), "pair")], [(torch.ones(1), "pair")]):
            assert type(found).__name__ == "NoTransportError", found
            assert isinstance(found, ConnectionError)
            assert "--ipc=host" in str(found)
        monkeypatch.undo()
        works(one, two, torch.ones(3), torch.zeros(3))


def test_local_cluster_checks_for_leaks() -> None:
    """The check itself works."""
    cluster = LocalCluster(1)
    client = cluster.client()
    cluster.clients.clear()
    with pytest.raises(AssertionError, match=r"sem\.command_hello"):
        cluster.close()
    client.close()
