"""The end of a client, a batch, a process or an agent: closing, dropping, forking, shutting down."""

from __future__ import annotations

import gc
import os
import shutil
import subprocess
import sys
import threading
import time
from typing import Any

import pytest
import torch
from torch.distributed.tensor import Shard

from etha_ray.errors import AgentDiedError, AgentNotFoundError, BatchClosedError, QueueClosedError
from etha_ray.tensor_bus import connection, pairing
from etha_ray.tensor_bus.client import BatchHandler, TensorBusClient
from etha_ray.tensor_bus.command_queue import CommandQueue
from etha_ray.tensor_bus.commands import QueryStatus
from etha_ray.testing import eventually, succeed, together
from tests.tensor_bus.cluster import LONG, SHM, local_cluster
from tests.tensor_bus.test_client import own_semaphores


class TestLifetime:
    def test_handler_outliving_its_client(self) -> None:
        with local_cluster() as cluster:
            first, second, _source, _target = cluster.batch()
            assert "agent 0" in repr(first)
            cluster.clients.remove(first.client)
            gc.collect()
            with pytest.raises(RuntimeError, match="garbage collected"):
                first.transfer("send")
            with pytest.raises(RuntimeError, match="keep a reference"):
                first.close()
            assert "client gone" in repr(first)
            # It left: the other side learns of it, and its place in the pair is free.
            with pytest.raises(BatchClosedError, match="client was closed"):
                second.transfer("recv", blocking=True, timeout=LONG)
            cluster.client(0).init_pair("pair of batch", "a", "b", 1, timeout=LONG)

    def test_handler_made_by_hand(self) -> None:
        with local_cluster() as cluster:
            first, second, source, target = cluster.batch()
            handler = BatchHandler(first.client, "batch", ["pair of batch"])
            handler.transfer("send")
            second.transfer("recv").result(LONG)
            assert torch.equal(source, target)

    def test_closing_twice(self) -> None:
        with local_cluster() as cluster:
            first, second, _, _ = cluster.batch()
            first.close()
            first.close()
            second.close(blocking=False)
            second.close()
            first.client.close()
            first.client.close()
            first.close()
            assert "closed" in repr(first.client)

    def test_closed_client_refuses(self) -> None:
        with local_cluster() as cluster:
            first, _, source, _ = cluster.batch()
            client = first.client
            client.close()
            for call in (
                client.ping,
                lambda: first.transfer("send"),
                first.query_transfer_signal,
                lambda: client.init_pair("p", "a", "b", 1),
                lambda: client.register_tensors("c", [(source, "pair of batch")]),
            ):
                with pytest.raises(BatchClosedError, match="closed"):
                    call()

    @pytest.mark.parametrize("what", ["batch", "client"])
    def test_closing_during_a_transfer(self, what: str) -> None:
        with local_cluster() as cluster:
            first, second, _, _ = cluster.batch()
            client = first.client
            errors = together(
                lambda: first.transfer("send", blocking=True, timeout=LONG),
                lambda: (eventually(second.query_transfer_signal), first.close() if what == "batch" else client.close()),
            )
            assert isinstance(errors[0], BatchClosedError)
            with pytest.raises(BatchClosedError, match=r"a\[0\] is gone"):
                second.transfer("recv", blocking=True, timeout=LONG)

    def test_closing_under_many_waiting_threads(self) -> None:
        with local_cluster() as cluster:
            first, _second, _, _ = cluster.batch()
            waiting = first.transfer("send")
            results = together(*[lambda: waiting.result(LONG)] * 4, lambda: (time.sleep(0.05), first.client.close()))
            assert [type(result) for result in results[:4]] == [BatchClosedError] * 4

    def test_a_forked_child_may_not_use_it_and_breaks_nothing(self) -> None:
        with local_cluster() as cluster:
            first, second, source, target = cluster.batch()
            sent = first.transfer("send")
            before = sorted(own_semaphores())
            pid = os.fork()
            if pid == 0:
                code = 1
                try:
                    first.client.ping(1.0)
                except QueueClosedError:
                    client = first.client
                    cluster.clients.clear()
                    client.close()
                    client._finalizer()
                    del client, sent
                    gc.collect()
                    code = 0
                finally:
                    os._exit(code)
            assert os.waitpid(pid, 0)[1] == 0
            assert sorted(own_semaphores()) == before
            second.transfer("recv").result(LONG)
            assert sent.result(LONG).bytes == source.nbytes
            assert torch.equal(source, target)

    @pytest.mark.parametrize("mesh", [None, (1,)], ids=["no mesh", "mesh"])
    def test_the_next_client_takes_the_place_of_one_that_was_dropped(
        self, mesh: tuple[int, ...] | None, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Nobody waits for a client that is dropped to leave, and its place is not free at once."""
        give_back = pairing.give_back

        def slowly(*arguments: Any) -> None:
            time.sleep(0.3)
            give_back(*arguments)

        monkeypatch.setattr(pairing, "give_back", slowly)
        with local_cluster(2) as cluster:
            [one] = cluster.side("a", "b", [0], mesh, mesh and [Shard(0)])
            [two] = cluster.side("b", "a", [1], mesh, mesh and [Shard(0)])
            succeed(one.join, two.join)
            cluster.clients.remove(two.client)
            two.client = TensorBusClient(1, cluster.paths[1].command_queue, cluster.paths[1].state, LONG)
            cluster.clients.append(two.client)
            two.join()

    def test_a_process_that_just_ends_says_nothing_and_leaves_nothing(self) -> None:
        with local_cluster() as cluster:
            paths = cluster.paths[0]
            code = (
                "from etha_ray.tensor_bus.client import TensorBusClient\n"
                "import torch, os\n"
                f"client = TensorBusClient(0, {paths.command_queue!r}, {paths.state!r})\n"
                "client.init_pair('p', 'a', 'b', 1, blocking=False)\n"
                "handler = client.register_tensors('b', [(torch.ones(3), 'p')], blocking=False)\n"
                "semaphore = handler.transfer('send')\n"
                "client.ping()\n"
                "print(os.getpid())\n"
            )
            done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=2 * LONG, check=True)
            assert done.stderr == ""
            mark = f"_{done.stdout.strip()}_"
            eventually(lambda: cluster.agents[0].describe()["workers"] == 0)
            eventually(lambda: not [name for name in os.listdir(SHM) if name.startswith("sem.command") and mark in name])

    def test_a_worker_in_another_pid_namespace_is_refused(self) -> None:
        """Else its death would never be noticed. It leaves nothing, and the agent serves the others."""
        alone = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc"]
        if shutil.which("unshare") is None or subprocess.run([*alone, "true"], capture_output=True).returncode != 0:
            pytest.skip("no pid namespace can be made here")
        with local_cluster(1) as cluster:
            paths = cluster.paths[0]
            code = (
                "from etha_ray.tensor_bus.client import TensorBusClient\n"
                "try:\n"
                f"    TensorBusClient(0, {paths.command_queue!r}, {paths.state!r})\n"
                "except ValueError as error:\n"
                "    print(type(error).__name__, error)\n"
            )
            done = subprocess.run([*alone, sys.executable, "-c", code], capture_output=True, text=True, timeout=2 * LONG, check=True)
            assert done.stdout.startswith("ConfigError agent 0 and this worker (pid 1 where it runs) are in different pid namespaces")
            assert "shareProcessNamespace" in done.stdout
            assert cluster.agents[0].describe()["workers"] == 0
            cluster.client(0).ping(LONG)

    def test_shutdown_of_the_agent_ends_what_waits(self) -> None:
        with local_cluster() as cluster:
            first, second, _, _ = cluster.batch()
            lonely = cluster.client(0)
            sent, results = first.transfer("send"), []
            thread = threading.Thread(target=lambda: results.extend(together(lambda: lonely.init_pair("q", "a", "b", 1, timeout=LONG))))
            thread.start()
            eventually(lambda: cluster.agents[0].describe()["pairs"] == 2)
            cluster.agents[0].stop()
            thread.join(LONG)
            assert "shut down" in str(results[0])
            with pytest.raises(Exception, match=r"agent 0.*shut down"):
                sent.result(LONG)
            with pytest.raises(AgentDiedError, match="shut down"):
                first.client.ping()
            with pytest.raises(ConnectionError, match="shut down"):
                second.transfer("recv", blocking=True, timeout=LONG)
            first.close()
            cluster.agents[0].stop()


class TestAgentsThatLeave:
    @pytest.mark.parametrize("folder_too", [False, True])
    def test_whoever_finds_one_that_is_just_leaving_makes_no_queue_for_it(self, folder_too: bool, monkeypatch: pytest.MonkeyPatch) -> None:
        with local_cluster(1 if folder_too else 2) as cluster:

            def gone(*arguments: Any, **more: Any) -> CommandQueue:
                cluster.agents[0].stop()
                return CommandQueue(*arguments, **more)

            monkeypatch.setattr(connection, "CommandQueue", gone)
            with pytest.raises(AgentNotFoundError, match=r"agent 0 \(pid \d+\) is just being shut down"):
                cluster.client(0)

    def test_a_command_behind_the_goodbye_of_another_thread(self) -> None:
        with local_cluster(1) as cluster:
            client = cluster.client(0)
            line = client._connection
            command = QueryStatus(batch_id="x", state_name="transfer_signal")
            late = line.prepare(command, "query", "x", LONG)
            line.say_goodbye()
            line.send(late, command, LONG)
            assert late.wait(LONG)
            with pytest.raises(BatchClosedError, match="the client of agent 0 is closed"):
                late.value()

    def test_no_record_of_what_its_workers_received_is_left_in_the_store(self) -> None:
        """Of several batches whose ends come in while the first of them is written."""
        with local_cluster(1) as cluster:
            for batch_id in ("one", "two", "three"):
                first, second, _, _ = cluster.batch(batch_id=batch_id, ranks=(0, 0))
                sent = first.transfer("send")
                second.transfer("recv").result(LONG)
                sent.result(LONG)
                eventually(lambda pair=f"pair of {batch_id}": cluster.clients[0].ready_replicas(pair, 1))
            cluster.agents[0].stop()
            assert not [key for key in cluster.store.list() if key.startswith("replica/")]
