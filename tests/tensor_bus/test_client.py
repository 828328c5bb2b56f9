"""The client against agents in this process: outcomes, semaphores, queries, threads, finding its agent."""

from __future__ import annotations

import os
import threading
import time
from functools import partial

import posix_ipc
import pytest
import torch

from etha_ray.config import FAILURE_TIMEOUT
from etha_ray.errors import BatchUnmatchedError, ConfigError, TensorMismatchError, TransferTimeoutError, UnknownBatchError
from etha_ray.report import TransferReport
from etha_ray.tensor_bus import client as client_module
from etha_ray.tensor_bus import reply as reply_module
from etha_ray.tensor_bus.client import TensorBusClient, generate_semaphore_name
from etha_ray.tensor_bus.commands import Ping
from etha_ray.tensor_bus.own_batches import OwnBatches
from etha_ray.tensor_bus.reply import OutcomeSemaphore
from etha_ray.tensor_bus.semaphores import open_semaphore
from etha_ray.testing import eventually, succeed, together
from tests.tensor_bus.cluster import LONG, SHM, local_cluster


def own_semaphores() -> list[str]:
    return [name for name in os.listdir(SHM) if name.startswith("sem.command_") and f"_{os.getpid()}_" in name]


class TestOutcomes:
    def test_transfer_returns_a_semaphore_that_knows_the_outcome(self) -> None:
        with local_cluster() as cluster:
            first, second, source, target = cluster.batch()
            sent = first.transfer("send")
            assert isinstance(sent, posix_ipc.Semaphore)
            assert isinstance(sent, OutcomeSemaphore)
            assert not sent.done()
            with pytest.raises(posix_ipc.BusyError):
                sent.acquire(0.01)
            with pytest.raises(TimeoutError, match="not over"):
                sent.result(0.01)
            received = second.transfer("recv")
            received.acquire(LONG)
            assert torch.equal(target, source)
            with sent:
                assert sent.done()
            report = sent.result()
            assert isinstance(report, TransferReport)
            assert report == sent.result(0)
            assert (report.direction, report.bytes, report.peers) == ("send", source.nbytes, {"b[0]": source.nbytes})
            assert received.result(LONG).peers == {"a[0]": source.nbytes}

    def test_a_users_own_use_of_the_semaphore_confuses_nobody(self) -> None:
        with local_cluster() as cluster:
            first, second, _, _ = cluster.batch()
            for _ in range(3):
                sent = first.transfer("send")
                sent.release()
                assert not sent.done()
                sent.unlink()
                received = second.transfer("recv")
                assert received.result(LONG).direction == "recv"
                assert sent.result(LONG).direction == "send"
                sent.release()
                sent.close()
                assert sent.result(LONG).direction == "send"
                for _ in range(3):
                    first.client.ping(LONG)

    def test_blocking_transfer(self) -> None:
        with local_cluster() as cluster:
            first, second, source, target = cluster.batch()
            sent, received = succeed(
                lambda: first.transfer("send", blocking=True, timeout=LONG), lambda: second.transfer("recv", blocking=True, timeout=LONG)
            )
            assert sent.result(0).bytes == received.result(0).bytes == source.nbytes
            assert torch.equal(target, source)

    def test_dropped_semaphores_leave_nothing_in_the_client_nor_the_agent(self) -> None:
        with local_cluster() as cluster:
            first, second, _, _ = cluster.batch()
            for _ in range(300):
                first.transfer("send")
                second.transfer("recv").result(LONG)
                eventually(lambda: not first.query_transfer_signal())
            outcomes = cluster.agents[0]._service._outcomes
            assert all(len(kept) < 140 for kept in outcomes._semaphores.values())
            assert len(own_semaphores()) < 20

    def test_clients_that_are_not_known_are_answered_and_leave_nothing_in_the_agent(self) -> None:
        with local_cluster(1) as cluster:
            client = cluster.client()
            queue, outcomes = client._connection.queue, cluster.agents[0]._service._outcomes
            for number in range(200):
                semaphore = open_semaphore(generate_semaphore_name("ping", "stranger"), create=True)
                queue.enqueue(Ping(client_id=f"stranger {number}", semaphore_name=semaphore.name))
                semaphore.acquire(LONG)
                semaphore.unlink()
                semaphore.close()
            assert set(outcomes._semaphores) == {None, client.client_id}
            assert len(outcomes._semaphores[None]) < 140

    def test_a_late_answer_to_an_abandoned_command_reaches_no_other(self) -> None:
        with local_cluster() as cluster:
            first, second, _, _ = cluster.batch()
            for _ in range(20):
                sent = first.transfer("send")
                del sent  # its answer comes while the pings below wait
                done = second.transfer("recv")
                for _ in range(5):
                    first.client.ping(LONG)
                done.result(LONG)
                eventually(lambda: not first.query_transfer_signal())

    def test_an_answer_is_a_sign_of_life_before_the_next_beat(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Of an agent that stood still and goes on: its client has looked in vain for as long as it takes to be dead."""
        with local_cluster(1) as cluster:
            client = cluster.client(0)
            watch = client._connection.watch
            monkeypatch.setattr(reply_module, "_SLICE", LONG)  # nobody looks whether it lives before it has answered
            monkeypatch.setattr(watch._state, "heartbeat", lambda: watch._beat)
            watch._beat_seen = time.monotonic() - 2 * FAILURE_TIMEOUT
            client.ping(LONG)
            assert watch.silence < FAILURE_TIMEOUT

    def test_semaphore_names_are_unique_and_short(self) -> None:
        names = {generate_semaphore_name("transfer", "x/" * 200) for _ in range(100)}
        assert len(names) == 100
        assert all(len(name) <= 251 and name.count("/") == 1 for name in names)
        assert generate_semaphore_name is client_module.generate_semaphore_name


class TestSignal:
    def test_truth_table(self) -> None:
        with local_cluster() as cluster:
            first, second, _, _ = cluster.batch()

            def signals() -> tuple[bool, bool]:
                return first.query_transfer_signal(), second.query_transfer_signal(timeout=LONG)

            for _ in range(2):
                assert signals() == (False, False)
                sent = first.transfer("send")
                eventually(lambda: signals() == (True, True))
                assert first.query_transfer_signal(blocking=False) in (True, False)
                second.transfer("recv").result(LONG)
                sent.result(LONG)
                assert signals() == (False, False)
            received = second.transfer("recv")
            assert signals() == (False, False)
            first.transfer("send").result(LONG)
            received.result(LONG)

    def test_a_send_that_timed_out_is_no_signal(self) -> None:
        with local_cluster() as cluster:
            first, second, source, target = cluster.batch()
            with pytest.raises(TransferTimeoutError, match=r"b\[0\] did not receive"):
                first.transfer("send", blocking=True, timeout=0.05)
            eventually(lambda: not second.query_transfer_signal())
            with pytest.raises(TransferTimeoutError, match=r"a\[0\] did not send"):
                second.transfer("recv", blocking=True, timeout=0.05)
            assert not torch.equal(source, target)
            sent = first.transfer("send")
            second.transfer("recv", blocking=True, timeout=LONG)
            assert sent.result(LONG).bytes == source.nbytes
            assert torch.equal(source, target)


class TestOneThread:
    def test_both_sides(self) -> None:
        with local_cluster() as cluster:
            one, two = cluster.client(0), cluster.client(1)
            one.init_pair("p", "a", "b", 1, blocking=False)
            two.init_pair("p", "b", "a", 1)
            source, target = torch.arange(5), torch.zeros(5, dtype=torch.int64)
            first = one.register_tensors("x", [(source, "p")], blocking=False)
            with pytest.raises(BatchUnmatchedError, match="goes on waiting"):
                first.wait_ready(0.01)
            sent = first.transfer("send")  # before the other side has registered
            second = two.register_tensors("x", [(target, "p")], blocking=False)
            first.wait_ready()
            second.wait_ready()
            second.wait_ready()
            second.transfer("recv").result(LONG)
            sent.result(LONG)
            assert torch.equal(source, target)

    def test_errors_of_the_match_are_raised_by_wait_ready_and_transfer(self) -> None:
        with local_cluster() as cluster:
            one, two = cluster.pair("p")
            for ask in ("wait", "transfer"):
                first = one.register_tensors("x", [(torch.zeros(2), "p")], blocking=False)
                sent = first.transfer("send")  # before anything can be known of the other side, or it would raise
                second = two.register_tensors("x", [(torch.zeros(3), "p")], blocking=False)
                for handler in (first, second) if ask == "wait" else (second,):
                    call = handler.wait_ready if ask == "wait" else partial(handler.transfer, "send", blocking=True)
                    with pytest.raises(ValueError, match=r"tensor 0.*\[2\].*\[3\]|tensor 0.*\[3\].*\[2\]"):
                        call(timeout=LONG)
                with pytest.raises(ValueError, match="tensor 0"):
                    sent.result(LONG)
                first.close()

    def test_a_transfer_asked_for_before_its_client_reads_why_the_registration_failed(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """The agent had forgotten the batch by then, and said that there is none."""
        with local_cluster() as cluster:
            one, two = cluster.pair("p")
            for direction in ("send", "recv"):
                handlers = [
                    client.register_tensors("x", [(torch.zeros(size), "p")], blocking=False) for client, size in ((one, 2), (two, 3))
                ]
                for handler in handlers:
                    eventually(lambda handler=handler: handler.client._batches.known("x").registration.wait(0))
                with monkeypatch.context() as patched:
                    patched.setattr(OwnBatches, "raise_if_failed", lambda *_: None)
                    with pytest.raises(TensorMismatchError, match="tensor 0"):
                        handlers[0].transfer(direction, blocking=True, timeout=LONG)
                    with pytest.raises(TensorMismatchError, match="tensor 0"):
                        handlers[1].transfer(direction).result(LONG)
                with pytest.raises(TensorMismatchError, match="tensor 0"):
                    handlers[0].digest(LONG)
                for handler in handlers:
                    with pytest.raises(TensorMismatchError, match="tensor 0"):
                        handler.wait_ready(LONG)  # which reads it
                    with pytest.raises(UnknownBatchError, match="not registered here"):
                        handler.transfer(direction)
            one.ping(LONG), two.ping(LONG)
            assert not any(worker.failed for agent in cluster.agents.values() for worker in agent._service._workers.all())

    def test_closing_while_registering(self) -> None:
        with local_cluster() as cluster:
            one, two = cluster.pair("p")
            source = torch.ones(4)
            for _ in range(30):
                one.register_tensors("x", [(source, "p")], blocking=False).close(blocking=False)
            results = succeed(
                lambda: one.register_tensors("x", [(source, "p")], timeout=LONG),
                lambda: two.register_tensors("x", [(torch.zeros(4), "p")], timeout=LONG),
            )
            results[0].transfer("send")
            results[1].transfer("recv").result(LONG)


class TestThreads:
    def test_eight_threads_of_one_client(self) -> None:
        with local_cluster() as cluster:
            one, two = cluster.pair("p")
            tensors = [(torch.full((100,), float(n)), torch.zeros(100)) for n in range(8)]
            handlers = succeed(
                *[lambda n=n: one.register_tensors(f"x{n}", [(tensors[n][0], "p")], timeout=LONG) for n in range(8)],
                *[lambda n=n: two.register_tensors(f"x{n}", [(tensors[n][1], "p")], timeout=LONG) for n in range(8)],
            )

            def send(n: int) -> None:
                for _ in range(20):
                    one.ping(LONG)
                    tensors[n][0].add_(1)
                    handlers[n].transfer("send", blocking=True, timeout=LONG)

            def receive(n: int) -> None:
                for step in range(1, 21):
                    handlers[8 + n].transfer("recv", blocking=True, timeout=LONG)
                    assert torch.equal(tensors[n][1], torch.full((100,), float(n + step)))
                    two.ping(LONG)

            succeed(*[lambda n=n: send(n) for n in range(8)], *[lambda n=n: receive(n) for n in range(8)])

    def test_pings_never_keep_results_waiting(self) -> None:
        with local_cluster() as cluster:
            stop = threading.Event()

            def flood(client: TensorBusClient) -> None:
                while not stop.is_set():
                    client.ping(LONG)

            threads = [threading.Thread(target=flood, args=(cluster.client(0),)) for _ in range(6)]
            for thread in threads:
                thread.start()
            try:
                first, second, source, target = cluster.batch()
                first.transfer("send")
                second.transfer("recv").result(LONG)
                assert torch.equal(source, target)
            finally:
                stop.set()
                for thread in threads:
                    thread.join()


class TestFinding:
    def test_no_agent(self, tmp_path: object) -> None:
        start = time.monotonic()
        with pytest.raises(ConnectionError, match=rf"no agent 3 .*{tmp_path}/s\.lmdb.*no state file.*Start one") as caught:
            TensorBusClient(3, f"{tmp_path}/c.lmdb", f"{tmp_path}/s.lmdb", connection_timeout=0.3)
        assert 0.3 <= time.monotonic() - start < LONG / 2
        assert type(caught.value).__name__ == "AgentNotFoundError"
        assert os.listdir(str(tmp_path)) == []

    def test_another_agent_at_these_paths(self) -> None:
        with local_cluster() as cluster:
            with pytest.raises(ConnectionError, match="agent 1 serves there"):
                TensorBusClient(0, cluster.paths[1].command_queue, cluster.paths[1].state, 0.05)
            with pytest.raises(ConnectionError, match="that agent's queue is"):
                TensorBusClient(0, cluster.paths[1].command_queue, cluster.paths[0].state, 0.05)

    def test_waits_for_an_agent_that_starts_later(self) -> None:
        with local_cluster() as cluster:
            paths = cluster.paths[0]
            cluster.agents[0].stop()
            results = together(
                lambda: TensorBusClient(0, paths.command_queue, paths.state, None),  # type: ignore[arg-type]
                lambda: (time.sleep(0.1), cluster.agents.update({0: cluster.start_agent(0)})),
            )
            client = results[0]
            assert client.agent_rank == 0
            assert client.agent_state_lmdb_path == paths.state
            assert client.state_env.path() == paths.state
            assert client.state_db is not None
            assert client.command_queue.size() == 0
            client.close()

    @pytest.mark.parametrize("timeout", [-1, float("nan"), 1e9, "5", True])
    def test_absurd_timeouts(self, timeout: object) -> None:
        with local_cluster() as cluster:
            first, second, source, target = cluster.batch()
            client, bad = first.client, {"timeout": timeout}
            for call in (
                lambda: first.transfer("send", **bad),
                lambda: first.query_transfer_signal(**bad),
                lambda: first.close(**bad),
                lambda: first.wait_ready(timeout),
                lambda: client.init_pair("q", "a", "b", 1, **bad),
                lambda: client.register_tensors("y", [(source, "pair of batch")], **bad),
                lambda: TensorBusClient(0, *cluster.paths[0].__dict__.values(), connection_timeout=timeout),
            ):
                with pytest.raises(ConfigError, match="timeout"):
                    call()
            sent = first.transfer("send")
            with pytest.raises(ValueError, match="timeout"):
                sent.result(timeout)
            second.transfer("recv").result(LONG)
            assert torch.equal(source, target)

    def test_no_limit(self) -> None:
        with local_cluster() as cluster:
            first, second, source, target = cluster.batch()
            none: dict[str, float] = {"timeout": None}  # type: ignore[dict-item]
            assert first.query_transfer_signal(**none) is False
            succeed(lambda: first.transfer("send", blocking=True, **none), lambda: second.transfer("recv", blocking=True, **none))
            assert torch.equal(source, target)
            first.close(**none)
