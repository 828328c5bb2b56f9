"""What agents keep of their transfers, and what their state files show of them."""

from __future__ import annotations

import os
import signal
from typing import Any

import pytest
import torch

from etha_ray.errors import TransferTimeoutError
from etha_ray.report import Span, TransferReport
from etha_ray.tensor_bus import inspection
from etha_ray.tensor_bus.agent import TensorBusAgent
from etha_ray.tensor_bus.history import KEPT, Flow, History, PastTransfer, flow_key
from etha_ray.tensor_bus.inspection import (
    SeenAgent,
    agents_here,
    decode_seen,
    encode_seen,
    inspect_agent,
    namespaces_here,
)
from etha_ray.tensor_bus.snapshot import waited_for
from etha_ray.testing import eventually
from tests.tensor_bus.cluster import LONG, LocalCluster, local_cluster, process_cluster


def past(number: int, *, failed: bool = False, flows: int = 1) -> PastTransfer:
    report = None if failed else TransferReport("batch", "recv", 10, 0.5, 0.25, (Span("move", 0.25, 0.25),), {"a[0]": 10})
    return PastTransfer(
        batch_id=f"batch {number}",
        direction="recv",
        client_id="12-ab",
        began=float(number),
        seconds=0.5,
        report=report,
        kind="PeerLostError" if failed else "",
        flows=tuple(Flow(flow_key("s", "t", each), "a[0]", 10) for each in range(flows)),
    )


class TestHistory:
    def test_the_last_are_kept_and_all_are_counted(self) -> None:
        history = History(observed=False)
        for number in range(KEPT + 10):
            history.note(past(number, failed=number % 2 == 1))
        assert [each.began for each in history.last()] == list(range(10, KEPT + 10))
        totals = history.totals
        assert (totals.received, totals.failed, totals.bytes_received, totals.sent) == (
            KEPT // 2 + 5,
            KEPT // 2 + 5,
            10 * (KEPT // 2 + 5),
            0,
        )

    def test_only_what_is_new_is_saved_and_the_ring_wraps(self) -> None:
        history = History(observed=False)
        places: dict[int, float] = {}
        for first, count in ((0, 3), (3, 0), (3, KEPT), (3 + KEPT, 2 * KEPT)):
            for number in range(first, first + count):
                history.note(past(number))
            unsaved = history.unsaved()
            assert len(unsaved) == min(count, KEPT)
            places |= {place: each.began for place, each in unsaved.items()}
        assert sorted(places.values()) == list(range(3 + 2 * KEPT, 3 + 3 * KEPT))

    def test_an_observer_takes_each_once(self) -> None:
        history = History(observed=True)
        for number in range(3):
            history.note(past(number))
        history.failed("PeerLostError")
        history.failed("PeerLostError")
        assert [each.began for each in history.take()[0]] == [0, 1, 2]
        history.failed("LayoutError")
        assert history.take() == ([], {"LayoutError": 1})
        assert history.totals.errors == {"PeerLostError": 2, "LayoutError": 1}

    def test_without_an_observer_nothing_waits_for_one(self) -> None:
        history = History(observed=False)
        history.note(past(0))
        history.failed("LayoutError")
        assert history.take() == ([], {})

    def test_what_is_kept_of_one_is_bounded(self) -> None:
        history = History(observed=False)
        history.note(past(0, flows=1000))
        assert len(history.last()[0].flows) == 256


def seen(cluster: LocalCluster, rank: int) -> SeenAgent:
    agent = inspect_agent(rank, cluster.paths[rank])
    assert agent is not None
    return agent


class TestInspection:
    def test_a_transfer_is_seen_from_both_ends(self) -> None:
        with local_cluster() as cluster:
            sender, receiver, *_ = cluster.batch(torch.ones(1000))
            sent = sender.transfer("send")
            report = receiver.transfer("recv").result(LONG)
            sent.result(LONG)
            eventually(lambda: all(seen(cluster, rank).past for rank in (0, 1)))
            (given,), (taken,) = seen(cluster, 0).past, seen(cluster, 1).past
            assert (given.direction, taken.direction, given.pid, taken.pid) == ("send", "recv", os.getpid(), os.getpid())
            assert taken.report == report
            assert [span.name for span in report.spans] == ["wait for senders", "move"]
            assert given.report is not None
            assert [span.name for span in given.report.spans] == ["wait for receivers", "read by receivers"]
            assert given.report.move_seconds == report.move_seconds > 0
            assert [(flow.key, flow.bytes) for flow in given.flows] == [(flow.key, flow.bytes) for flow in taken.flows]
            assert [flow.peer for flow in (*given.flows, *taken.flows)] == ["b[0]", "a[0]"]
            eventually(lambda: (status := seen(cluster, 0).status) is not None and status.totals.sent == 1)
            assert decode_seen(encode_seen(seen(cluster, 0))).past == (given,)

    def test_what_is_under_way_says_whom_it_waits_for(self) -> None:
        with local_cluster() as cluster:
            one = cluster.client(0)
            one.init_pair("pair of x", "a", "b", 1, blocking=False)

            def waits(what: str, name: str, text: str, client_id: str = one.client_id, rank: int = 0) -> bool:
                status = seen(cluster, rank).status
                return status is not None and text in waited_for(status, client_id, what, name)

            eventually(lambda: waits("init_pair", "pair of x", "nobody of 'b' has come"))
            tensor = torch.ones(4)
            one.register_tensors("x", [(tensor, "pair of x")], blocking=False)
            eventually(lambda: waits("transfer", "x", "'b' has not come"))
            two = cluster.client(1)
            two.init_pair("pair of x", "b", "a", 1)
            eventually(lambda: waits("register_tensors", "x", "'b' lacks index [0] of 1"))
            handler = two.register_tensors("x", [(torch.zeros(4), "pair of x")])
            receiving = handler.transfer("recv")
            eventually(lambda: waits("transfer", "x", "a[0] did not send", two.client_id, 1))
            status = seen(cluster, 1).status
            assert status is not None
            assert [(batch.batch_id, batch.state, batch.transfers) for batch in status.batches] == [("x", "ready", 0)]
            assert [(pair.name, pair.state, pair.local, pair.remote) for pair in status.pairs] == [("pair of x", "matched", "b", "a")]
            one.transfer("x", "send", blocking=True)
            receiving.result(LONG)

    def test_errors_are_counted_by_kind(self) -> None:
        with local_cluster() as cluster:
            sender, *_ = cluster.batch()
            with pytest.raises(TransferTimeoutError):
                sender.transfer("send", blocking=True, timeout=0.05)
            eventually(lambda: bool(seen(cluster, 0).past))
            failed = seen(cluster, 0).past[0]
            assert (failed.report, failed.kind) == (None, "TransferTimeoutError")
            assert "b[0] did not receive" in failed.message
            status = seen(cluster, 0).status
            assert status is not None
            assert status.totals.errors == {"TransferTimeoutError": 1}

    def test_an_observer_hears_of_transfers_errors_and_counts(self) -> None:
        calls: list[tuple[Any, Any, Any]] = []
        with local_cluster() as cluster:
            cluster.agents[0].stop()
            cluster.agents[0] = TensorBusAgent(
                0, cluster.store, paths=cluster.paths[0], threads=1, observer=lambda *told: calls.append(told)
            )
            cluster.agents[0].start()
            sender, receiver, *_ = cluster.batch()
            sent = sender.transfer("send")
            receiver.transfer("recv").result(LONG)
            sent.result(LONG)
            eventually(lambda: any(transfers for transfers, _, _ in calls))
        assert [each.batch_id for transfers, _, _ in calls for each in transfers] == ["batch"]
        assert {"workers": 1, "pairs": 1, "batches": 1} in [counts for *_, counts in calls]


def test_agents_of_a_pool_are_found_stopped_ones_and_killed_ones_told_apart() -> None:
    with process_cluster(2) as cluster:
        pair = [cluster.client(rank) for rank in (0, 1)]
        assert cluster.namespace in namespaces_here()
        assert [(agent.rank, agent.life) for agent in agents_here(cluster.namespace)] == [(0, "running"), (1, "running")]
        for client in pair:
            client.close()
        cluster.pause(cluster.pids[0])
        cluster.kill(cluster.pids[1])
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(inspection, "FAILURE_TIMEOUT", 1.0)  # it is stuck for as long as this is looked at
            eventually(lambda: agents_here(cluster.namespace)[0].life == "stuck")
            assert agents_here(cluster.namespace)[1].life == "dead"
        os.kill(cluster.pids[0], signal.SIGCONT)
        eventually(lambda: agents_here(cluster.namespace)[0].life == "running")
    assert agents_here(cluster.namespace) == []
