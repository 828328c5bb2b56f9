"""What arrives between processes: of DTensors with process groups of their own, and over several agents."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from etha_ray.layout import MeshSpec
from etha_ray.testing import eventually, succeed
from tests.fresh import fresh
from tests.tensor_bus import cluster as acts
from tests.tensor_bus.cluster import LONG, local_cluster, local_part, process_cluster


def gloo_side(state: dict[str, Any], rank: int, port: int) -> None:
    acts.process_group(state, rank, 2, port)
    state["mesh"] = init_device_mesh("cpu", (2,))


def gloo_register(state: dict[str, Any], pair: str, name: str, other: str, placement: Any, whole: torch.Tensor) -> None:
    state["dtensor"] = distribute_tensor(whole, state["mesh"], [placement])
    state["client"].init_pair(pair, name, other, 2, state["mesh"], [placement], timeout=LONG)
    state["handlers"]["x"] = state["client"].register_tensors("x", [(state["dtensor"], pair)], timeout=LONG)


def gloo_local(state: dict[str, Any]) -> torch.Tensor:
    tensor: DTensor = state["dtensor"]
    return tensor.to_local().clone()


def gloo_wrong(state: dict[str, Any], pair: str) -> str:
    wrong = distribute_tensor(torch.zeros(7, 6), state["mesh"], [Replicate()])
    try:
        state["client"].register_tensors("wrong", [(wrong, pair)])
    except ValueError as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


class TestProcesses:
    def test_four_agents_and_their_workers(self) -> None:
        """Four agents started as README says, workers in processes of their own, 2 to 2 and 2 to 3, several batches."""
        wholes = [torch.arange(35.0).reshape(7, 5), (torch.arange(600) % 120).to(torch.bfloat16).reshape(20, 30)]
        with process_cluster(4, as_modules=True) as cluster:
            sides = [("a", "b", Shard(0), 2, [0, 1]), ("b", "a", Shard(1), 3, [2, 3, 2])]
            workers: list[tuple[acts.Worker, str, MeshSpec, Any]] = []
            for name, other, placement, size, ranks in sides:
                for index, rank in enumerate(ranks):
                    worker, spec = cluster.worker(), MeshSpec((size,), (index,))
                    worker.call(acts.connect, rank, cluster.paths[rank])
                    worker.start(acts.join_pair, "p", name, other, size, spec, [placement])
                    workers.append((worker, name, spec, placement))
            for worker, *_ in workers:
                worker.result()
            for batch_id, whole in zip("xy", wholes, strict=True):
                for worker, name, spec, placement in workers:
                    part = local_part(whole, spec, [placement])
                    worker.start(acts.register, batch_id, [(part if name == "a" else torch.zeros_like(part), "p")])
                for worker, *_ in workers:
                    worker.result()
            for step, givers in enumerate("abab", start=1):
                for batch_id in "xy":
                    for worker, name, *_ in workers:
                        if name == givers:
                            worker.call(acts.fill, batch_id, 1)
                        worker.start(acts.transfer, batch_id, "send" if name == givers else "recv")
                    for worker, *_ in workers:
                        assert worker.result().batch_id == batch_id
                for batch_id, whole in zip("xy", wholes, strict=True):
                    for worker, _, spec, placement in workers:
                        (held,) = worker.call(acts.read, batch_id)
                        assert torch.equal(held, local_part(whole + step, spec, [placement]))

    def test_one_agent_serves_both_sides(self) -> None:
        with process_cluster(1) as cluster:
            workers = [cluster.worker(), cluster.worker()]
            for worker, name, other in zip(workers, "ab", "ba", strict=True):
                worker.call(acts.connect, 0, cluster.paths[0])
                worker.start(acts.join_pair, "p", name, other, 1, None, None)
            for worker in workers:
                worker.result()
            for worker, tensor in zip(workers, [torch.arange(9.0), torch.zeros(9)], strict=True):
                worker.start(acts.register, "x", [(tensor, "p")])
            for worker in workers:
                worker.result()
            for worker, what in zip(workers, ["send", "recv"], strict=True):
                worker.start(acts.transfer, "x", what)
            for worker in workers:
                worker.result()
            assert torch.equal(workers[1].call(acts.read, "x")[0], torch.arange(9.0))

    def test_dtensors_of_a_process_group(self) -> None:
        whole = torch.arange(42.0).reshape(7, 6)
        with process_cluster(2) as cluster:
            workers = [cluster.worker() for _ in range(4)]
            for group in (workers[:2], workers[2:]):
                port = group[0].call(acts.serve_group)
                for rank, worker in enumerate(group):
                    worker.call(acts.connect, rank, cluster.paths[rank])
                    worker.start(gloo_side, rank, port)
                for worker in group:
                    worker.result()
            for group, (name, other, placement, value) in zip(
                (workers[:2], workers[2:]), [("a", "b", Shard(0), whole), ("b", "a", Shard(1), whole * 0)], strict=True
            ):
                for worker in group:
                    worker.start(gloo_register, "p", name, other, placement, value)
            for worker in workers:
                worker.result()
            for worker, what in zip(workers, ["send", "send", "recv", "recv"], strict=True):
                worker.start(acts.transfer, "x", what)
            for worker in workers:
                worker.result()
            assert torch.equal(torch.cat([worker.call(gloo_local) for worker in workers[2:]], 1), whole)
            for worker in workers[:2]:
                worker.start(gloo_wrong, "p")
            for worker in workers[:2]:
                words = worker.result()
                for word in ("LayoutError", "tensor 0", "2: R", "2: S0", "redistribute"):
                    assert word in words


def fake_group(end: Any, folder: str) -> None:
    from torch.testing._internal.distributed.fake_pg import FakeStore

    try:
        dist.init_process_group("fake", store=FakeStore(), rank=1, world_size=2)
        mesh = init_device_mesh("cpu", (2,))
        with local_cluster(1) as cluster:
            source = DTensor.from_local(torch.arange(6.0), mesh, [Shard(0)], run_check=False, shape=torch.Size([12]), stride=(1,))
            (one,) = cluster.side("a", "b", [0], None, None)
            two, three = cluster.client(), cluster.client()
            with pytest.raises(ValueError, match=r"on coordinate .1.* of its mesh.*on coordinate \(0,\)"):
                succeed(lambda: _half(two, source))
            succeed(
                one.join,
                lambda: two.init_pair("pair", "b", "a", 2, MeshSpec((2,), (0,)), [Shard(0)]),
                lambda: three.init_pair("pair", "b", "a", 2, mesh, [Shard(0)]),
            )
        end.send("fine")
    except BaseException as error:
        end.send(repr(error))


def _half(client: Any, source: DTensor) -> None:
    client.init_pair("other", "x", "y", 2, MeshSpec((2,), (0,)), [Shard(0)], blocking=False)
    client.register_tensors("b", [(source, "other")])


def test_dtensor_on_another_coordinate() -> None:
    near, far = fresh.Pipe()
    process = fresh.Process(target=fake_group, args=(far, ""))
    process.start()
    assert near.poll(LONG)
    assert near.recv() == "fine"
    process.join(LONG)


def test_signal_waits_for_all_senders() -> None:
    with local_cluster() as cluster:
        sources, targets = cluster.side("a", "b", [0, 1], (2,), [Shard(0)]), cluster.side("b", "a", [0], (1,), [Replicate()])
        sides = [*sources, *targets]
        succeed(*[side.join for side in sides])
        handlers = succeed(*[lambda s=s: s.client.register_tensors("x", [(s.cut(torch.zeros(4)), "pair")], timeout=LONG) for s in sides])
        handlers[0].transfer("send")
        eventually(handlers[0].query_transfer_signal)
        assert not handlers[2].query_transfer_signal()
        handlers[1].transfer("send")
        eventually(handlers[2].query_transfer_signal)
        handlers[2].transfer("recv").result(LONG)
        assert not handlers[2].query_transfer_signal()
