"""What arrives: every layout to every other, bit for bit, over agents in this process; and late receivers."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch.distributed.tensor import Replicate, Shard

from etha_ray.errors import BatchTornError, TransferTimeoutError
from etha_ray.layout import MeshSpec
from etha_ray.testing import succeed, together
from etha_ray.transport import Copy, CopyProgram, MappedTransport
from tests.tensor_bus.cluster import LONG, LocalCluster, Side, local_cluster

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
            gave_up, _ = together(
                lambda: first.transfer("send", blocking=True, timeout=LONG),
                lambda: (transport.inside.wait(LONG), cluster.time_is_up(0)),
            )
            assert isinstance(gave_up, TransferTimeoutError)
            assert "b[0] did not receive" in str(gave_up)
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
