"""What arrives: every layout to every other, bit for bit, over agents in this process and in processes of their own."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from etha_ray.errors import BatchTornError, TransferTimeoutError
from etha_ray.layout import MeshSpec
from etha_ray.testing import eventually, succeed
from etha_ray.transport import Copy, CopyProgram, MappedTransport
from tests.tensor_bus import cluster as acts
from tests.tensor_bus.cluster import LONG, LocalCluster, Side, fresh, local_cluster, local_part, process_cluster

Places = tuple[list[int], "tuple[int, ...] | None", "list[Any] | None"]


def exchange(cluster: LocalCluster, mine: Places, theirs: Places, wholes: Sequence[torch.Tensor], rounds: int = 2) -> None:
    """Join, register, and transfer changing data there, and back."""
    sources, targets = cluster.side("a", "b", *mine), cluster.side("b", "a", *theirs)
    sides = [*sources, *targets]
    succeed(*[side.join for side in sides])
    held = {side: [side.cut(whole) if side in sources else side.cut(torch.zeros_like(whole)) for whole in wholes] for side in sides}
    handlers = dict(
        zip(
            sides,
            succeed(
                *[lambda side=side: side.client.register_tensors("x", [(t, "pair") for t in held[side]], timeout=LONG) for side in sides]
            ),
            strict=True,
        )
    )

    def run(givers: list[Side], takers: list[Side]) -> None:
        sent = [handlers[side].transfer("send") for side in givers]
        got = [handlers[side].transfer("recv") for side in takers]
        moved = sum(semaphore.result(LONG).bytes for semaphore in got)
        assert moved == sum(semaphore.result(LONG).bytes for semaphore in sent) == sum(t.nbytes for side in takers for t in held[side])

    for step in range(1, rounds + 1):
        now = [whole + step if whole.dtype != torch.bool else whole ^ bool(step % 2) for whole in wholes]
        for givers, takers, values in ((sources, targets, now), (targets, sources, [whole * 1 for whole in wholes])):
            for side in givers:
                for tensor, whole in zip(held[side], values, strict=True):
                    tensor.copy_(side.cut(whole))
            run(givers, takers)
            for side in takers:
                for tensor, whole in zip(held[side], values, strict=True):
                    assert torch.equal(tensor, side.cut(whole)), (side.name, side.spec)


WHOLES = [
    torch.arange(7 * 5.0).reshape(7, 5),
    torch.arange(12).reshape(2, 6),
    torch.arange(4 * 3 * 2, dtype=torch.bfloat16).reshape(4, 3, 2),
]

LAYOUTS: list[Places] = [
    ([0], (1,), [Replicate()]),
    ([0, 1], (2,), [Shard(0)]),
    ([1, 0], (2,), [Shard(1)]),
    ([0, 1, 0], (3,), [Shard(0)]),
    ([0, 1], (2,), [Replicate()]),
    ([0, 1, 0, 1], (2, 2), [Shard(0), Shard(1)]),
    ([0, 0, 1, 1], (2, 2), [Shard(0), Shard(0)]),
    ([0, 1, 1, 0], (2, 2), [Replicate(), Shard(-1)]),
]


class TestLayouts:
    @pytest.mark.parametrize(("mine", "theirs"), list(itertools.combinations(range(len(LAYOUTS)), 2)))
    def test_any_to_any(self, mine: int, theirs: int) -> None:
        with local_cluster() as cluster:
            exchange(cluster, LAYOUTS[mine], LAYOUTS[theirs], WHOLES, rounds=1)

    def test_small_and_empty(self) -> None:
        wholes = [torch.zeros(0, 4), torch.arange(3.0), torch.arange(1.0), torch.ones(4, dtype=torch.bool)]
        with local_cluster() as cluster:
            exchange(cluster, ([0, 1, 0, 1], (4,), [Shard(0)]), ([1, 0], (2,), [Shard(0)]), wholes)

    def test_scalar(self) -> None:
        with local_cluster() as cluster:
            exchange(cluster, ([0, 1], (2,), [Replicate()]), ([1, 0, 1], (3,), [Replicate()]), [torch.tensor(3.5), torch.ones(2)])

    def test_a_side_without_mesh_holds_the_whole(self) -> None:
        with local_cluster() as cluster:
            exchange(cluster, ([0], None, None), ([0, 1], (2,), [Shard(0)]), WHOLES)

    def test_ranks_with_gaps_are_paired_in_order(self) -> None:
        with local_cluster([7, 2, 5, 11]) as cluster:
            # Joined out of order; ordered by agent rank: 2 -> 5 and 7 -> 11.
            sources, targets = cluster.side("a", "b", [7, 2], None, None), cluster.side("b", "a", [11, 5], None, None)
            succeed(*[side.join for side in (*sources, *targets)])
            tensors = {7: torch.full((3,), 7.0), 2: torch.full((2, 2), 2.0), 11: torch.zeros(3), 5: torch.zeros(2, 2)}
            sides = [*sources, *targets]
            handlers = succeed(
                *[lambda s=s: s.client.register_tensors("x", [(tensors[s.client.agent_rank], "pair")], timeout=LONG) for s in sides]
            )
            reports = [handler.transfer(what) for handler, what in zip(handlers, ["send", "send", "recv", "recv"], strict=True)]
            assert reports[2].result(LONG).peers == {"a[1]": 12}
            for report in reports:
                report.result(LONG)
            assert torch.equal(tensors[11], tensors[7])
            assert torch.equal(tensors[5], tensors[2])


class TestMemory:
    def test_views_and_tied_storages(self) -> None:
        with local_cluster() as cluster:
            base, grid = torch.arange(40.0), torch.arange(30).reshape(5, 6)
            mine = [base[::3], grid.t(), base[5:9], grid[1:4, ::2], base]
            room = torch.zeros(200)
            theirs = [room[:14], torch.zeros(5, 6, dtype=torch.int64).t(), room[20:24], torch.zeros(3, 3, dtype=torch.int64)]
            theirs += [room[100:180:2]]
            one, two = cluster.pair()
            handlers = succeed(
                lambda: one.register_tensors("x", [(t, "pair") for t in mine], timeout=LONG),
                lambda: two.register_tensors("x", [(t, "pair") for t in theirs], timeout=LONG),
            )
            for step in range(3):
                base.add_(step)
                grid.mul_(2)
                handlers[0].transfer("send")
                handlers[1].transfer("recv").result(LONG)
                for source, target in zip(mine, theirs, strict=True):
                    assert torch.equal(source, target)
            assert room[181:].count_nonzero() == 0
            assert room[101:181:2].count_nonzero() == 0

    def test_parameters_stay_what_they_are(self) -> None:
        with local_cluster() as cluster:
            model, copy = torch.nn.Linear(4, 3), torch.nn.Linear(4, 3)
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            one, two = cluster.pair()
            handlers = succeed(
                lambda: one.register_tensors("x", [(p, "pair") for p in model.parameters()], timeout=LONG),
                lambda: two.register_tensors("x", [(p, "pair") for p in copy.parameters()], timeout=LONG),
            )
            data = torch.ones(2, 4)
            for _ in range(3):
                model(data).sum().backward()
                optimizer.step()
                handlers[0].transfer("send")
                handlers[1].transfer("recv").result(LONG)
                assert torch.equal(model(data), copy(data))

    def test_handler_closed_tensors_live_on(self) -> None:
        with local_cluster() as cluster:
            first, second, source, target = cluster.batch()
            first.transfer("send")
            second.transfer("recv").result(LONG)
            first.close()
            second.close()
            source.add_(1)
            assert torch.equal(target + 1, source)


class TestTogether:
    @pytest.mark.parametrize("ranks", [(0, 0), (0, 1)])
    def test_both_sides_in_one_process(self, ranks: tuple[int, int]) -> None:
        with local_cluster() as cluster:
            first, second, source, target = cluster.batch(ranks=ranks)
            for _ in range(20):
                source.add_(1)
                sent, got = first.transfer("send"), second.transfer("recv")
                got.result(LONG)
                sent.result(LONG)
                assert torch.equal(source, target)

    def test_one_process_is_worker_of_two_agents(self) -> None:
        with local_cluster() as cluster:
            # Receives on agent 1 and hands on through agent 0.
            first, second, source, middle = cluster.batch(batch_id="in", ranks=(0, 1))
            third, fourth, _, target = cluster.batch(middle, batch_id="out", ranks=(0, 1))
            first.transfer("send")
            second.transfer("recv").result(LONG)
            third.transfer("send")
            fourth.transfer("recv").result(LONG)
            assert torch.equal(source, target)

    def test_several_pairs_in_one_batch(self) -> None:
        with local_cluster() as cluster:
            one, two, three = cluster.client(0), cluster.client(1), cluster.client(0)
            whole = torch.arange(12.0).reshape(4, 3)
            halves = [MeshSpec((2,), (at,)) for at in range(2)]
            succeed(
                lambda: (one.init_pair("p", "a", "b", 1), one.init_pair("q", "c", "d", 1, MeshSpec((1,), (0,)), [Replicate()])),
                lambda: (two.init_pair("p", "b", "a", 1), two.init_pair("q", "d", "c", 2, halves[0], [Shard(0)])),
                lambda: three.init_pair("q", "d", "c", 2, halves[1], [Shard(0)]),
            )
            low, high, other = torch.zeros(2, 3), torch.zeros(2, 3), torch.zeros(5)
            handlers = succeed(
                lambda: one.register_tensors("x", [(whole, "q"), (torch.ones(5), "p")], timeout=LONG),
                lambda: two.register_tensors("x", [(other, "p"), (low, "q")], timeout=LONG),
                lambda: three.register_tensors("x", [(high, "q")], timeout=LONG),
            )
            assert handlers[0].pair_names == ["q", "p"]
            sent = handlers[0].transfer("send")
            handlers[1].transfer("recv").result(LONG)
            assert not sent.done()
            handlers[2].transfer("recv").result(LONG)
            assert sent.result(LONG).peers == {"d[0]+b[0]": 44, "d[1]": 24}
            assert torch.equal(torch.cat([low, high]), whole)
            assert torch.equal(other, torch.ones(5))

    def test_one_waits_and_the_others_go_on(self) -> None:
        with local_cluster() as cluster:
            waiting, partner, source, target = cluster.batch(batch_id="waiting")
            first, second, more, moved = cluster.batch(batch_id="going")
            sent = waiting.transfer("send")
            for step in range(10):
                more.add_(step)
                first.transfer("send")
                second.transfer("recv").result(LONG)
                assert torch.equal(more, moved)
                waiting.client.ping(LONG)
                assert waiting.query_transfer_signal()
                assert not sent.done()
            partner.transfer("recv").result(LONG)
            sent.result(LONG)
            assert torch.equal(source, target)


class Gate(CopyProgram):
    """A program that waits to be let through, halfway."""

    def __init__(self, transport: GatedTransport, program: CopyProgram) -> None:
        self._transport, self._program = transport, program

    @property
    def nbytes(self) -> int:
        return self._program.nbytes

    def run(self) -> int:
        self._transport.inside.set()
        assert self._transport.open.wait(LONG)
        if self._transport.error is not None:
            raise self._transport.error
        return self._program.run()


class GatedTransport(MappedTransport):
    def __init__(self) -> None:
        super().__init__(1)
        self.inside, self.open = threading.Event(), threading.Event()
        self.error: Exception | None = None

    def prepare(self, copies: Sequence[Copy]) -> Any:
        return Gate(self, super().prepare(copies))


class TestLateReceivers:
    """A send that is over before its data was taken makes no receive a success."""

    def test_sender_gives_up_while_its_data_is_read(self) -> None:
        transport = GatedTransport()
        with local_cluster(mapped=transport) as cluster:
            first, second, source, target = cluster.batch(ranks=(0, 1))
            got = second.transfer("recv")
            with pytest.raises(TransferTimeoutError, match=r"b\[0\] did not receive"):
                first.transfer("send", blocking=True, timeout=0.2)
            assert transport.inside.is_set()
            source.fill_(-1)  # it may: its send is over
            assert not got.done()
            transport.open.set()
            with pytest.raises(BatchTornError, match=r"a\[0\] gave up.*receive again"):
                got.result(LONG)
            first.transfer("send")
            second.transfer("recv").result(LONG)
            assert torch.equal(source, target)

    @pytest.mark.parametrize("ranks", [(0, 1), (0, 0)])
    def test_sender_closes_while_its_data_is_read(self, ranks: tuple[int, int]) -> None:
        transport = GatedTransport()
        with local_cluster(mapped=transport) as cluster:
            first, second, _, _ = cluster.batch(ranks=ranks)
            got, _ = second.transfer("recv"), first.transfer("send")
            assert transport.inside.wait(LONG)
            first.close()
            transport.open.set()
            with pytest.raises(BatchTornError, match="receive again"):
                got.result(LONG)

    def test_receiver_closes_while_it_reads(self) -> None:
        transport = GatedTransport()
        with local_cluster(mapped=transport) as cluster:
            first, second, _, target = cluster.batch()
            got, _ = second.transfer("recv"), first.transfer("send")
            assert transport.inside.wait(LONG)
            closing = threading.Thread(target=second.close)
            closing.start()
            time.sleep(0.05)
            assert closing.is_alive()  # the copy writes to the tensors: close says when it no longer does
            transport.open.set()
            closing.join(LONG)
            assert not closing.is_alive()
            target.fill_(1)
            assert got.done()

    def test_copy_that_fails(self) -> None:
        transport = GatedTransport()
        with local_cluster(mapped=transport) as cluster:
            first, second, source, target = cluster.batch()
            transport.error = OSError("the memory is broken")
            transport.open.set()
            sent = first.transfer("send")
            with pytest.raises(BatchTornError, match="memory is broken"):
                second.transfer("recv", blocking=True, timeout=LONG)
            transport.error = None
            assert not sent.done()
            second.transfer("recv", blocking=True, timeout=LONG)
            sent.result(LONG)
            assert torch.equal(source, target)

    def test_agent_answers_while_it_copies_and_stops_when_it_is_done(self) -> None:
        transport = GatedTransport()
        with local_cluster(mapped=transport) as cluster:
            first, second, _, _ = cluster.batch()
            got, _ = second.transfer("recv"), first.transfer("send")
            assert transport.inside.wait(LONG)
            second.client.ping(LONG)
            assert second.query_transfer_signal()
            with pytest.raises(TimeoutError, match="copy is still under way"):
                cluster.agents[1].stop(0.1)
            transport.open.set()
            cluster.agents[1].stop()
            assert got.done()


def gloo_side(state: dict[str, Any], rank: int, port: int) -> None:
    store = dist.TCPStore("127.0.0.1", port, 2, rank == 0)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
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
                port = acts.free_port()
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
