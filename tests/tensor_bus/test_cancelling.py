"""Ctrl-C in a worker, a batch that is closed, agents that are shut down: whatever goes on then ends clean, and soon."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from etha_ray.errors import AgentDiedError, EthaRayError
from etha_ray.tensor_bus.inspection import inspect_agent
from etha_ray.testing import eventually
from tests.tensor_bus import cluster as acts
from tests.tensor_bus.cluster import LONG, ProcessCluster, Worker, process_cluster

PAIR = ("pair", "a", "b", 1, None, None)
OTHER = ("pair", "b", "a", 1, None, None)
TENSORS = [(torch.arange(6.0), "pair")]


@pytest.fixture(scope="module")
def processes() -> Iterator[ProcessCluster]:
    with process_cluster(2) as cluster:
        yield cluster


def pair_of_workers(cluster: ProcessCluster, upto: str) -> list[Worker]:
    """Two workers that have come as far as they must be for ``upto`` to wait."""
    workers = [cluster.worker(), cluster.worker()]
    for rank, worker in enumerate(workers):
        worker.call(acts.connect, rank, cluster.paths[rank])
    if upto != "init_pair":
        in_both(workers, lambda rank: (acts.join_pair, *(PAIR, OTHER)[rank]))
    if upto in ("send", "recv"):
        in_both(workers, lambda _: (acts.register, "batch", TENSORS))
    return workers


def in_both(workers: list[Worker], what: Any) -> None:
    for rank, worker in enumerate(workers):
        worker.start(*what(rank))
    for worker in workers:
        worker.result()


def waiting(state: dict[str, Any], what: str) -> tuple[str, str]:
    """Does what waits for the other side, which does not come; how that ended."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        if what == "init_pair":
            acts.join_pair(state, *PAIR)
        elif what == "register":
            acts.register(state, "batch", TENSORS)
        else:
            acts.transfer(state, "batch", what)
    except (KeyboardInterrupt, EthaRayError) as error:
        return type(error).__name__, str(error)
    return "", ""


CALLS = ["init_pair", "register", "send", "recv"]


@pytest.mark.parametrize("what", CALLS)
def test_ctrl_c_ends_what_waits_and_the_same_call_works_after(processes: ProcessCluster, what: str) -> None:
    one, two = pair_of_workers(processes, what)
    one.start(waiting, what)
    until_it_waits(processes, one, what)
    os.kill(one.pid, signal.SIGINT)
    assert one.result(LONG)[0] == "KeyboardInterrupt"
    if what == "init_pair":
        in_both([one, two], lambda rank: (acts.join_pair, *(PAIR, OTHER)[rank]))
    if what in ("init_pair", "register"):
        in_both([one, two], lambda _: (acts.register, "batch", TENSORS))
    one.call(acts.fill, "batch", 2.0)
    eventually(lambda: not two.call(sent_to))  # the other side has heard that the send was given up: nobody begins to take that
    in_both([one, two], lambda rank: (acts.transfer, "batch", ("send", "recv")[rank]))
    assert torch.equal(two.call(acts.read, "batch")[0], TENSORS[0][0] + 2)
    for worker in (one, two):
        worker.close()


def sent_to(state: dict[str, Any]) -> bool:
    return bool(state["handlers"]["batch"].query_transfer_signal(timeout=LONG))


def until_it_waits(cluster: ProcessCluster, worker: Worker, what: str, rank: int = 0) -> None:
    """Until its agent says that it waits for the other side."""

    def is_own(client_id: str) -> bool:
        return client_id.startswith(f"{worker.pid}-")

    def waits() -> bool:
        seen = inspect_agent(rank, cluster.paths[rank])
        if seen is None or seen.status is None:
            return False
        if what == "init_pair":
            return any(pair.waits_for for pair in seen.status.pairs if is_own(pair.client_id))
        own = (batch for batch in seen.status.batches if is_own(batch.client_id))
        return any(batch.waits_for if what == "register" else batch.transfer is not None for batch in own)

    eventually(waits)


@pytest.mark.parametrize("what", ["send", "recv"])
def test_a_batch_that_is_closed_ends_its_transfer(processes: ProcessCluster, what: str) -> None:
    one, two = pair_of_workers(processes, what)
    name, message = one.call(closed_meanwhile, what)
    assert name == "BatchClosedError", message
    for worker in (one, two):
        worker.close()


@pytest.mark.parametrize("closed", ["batch", "client"])
def test_what_an_agent_that_stands_still_may_write_to_is_said(closed: str) -> None:
    """A receive is not over with what was received into: the memory must stay what it is until the agent has gone on, or died."""
    with process_cluster(2) as processes:
        _, two = pair_of_workers(processes, "recv")
        third = processes.worker()
        third.call(acts.connect, 1, processes.paths[1])
        two.call(acts.start_transfer, "batch", "recv")
        until_it_waits(processes, two, "recv", rank=1)
        processes.pause(processes.pids[1])
        with pytest.raises(AgentDiedError, match=r"batch 'batch': closed, but .* may still write to these tensors"):
            two.call(closing, closed)
        third.call(closing, "client")  # nothing was received there


@pytest.mark.parametrize("closed", ["batch", "client"])
def test_what_a_dead_agent_was_receiving_is_nobodys(closed: str) -> None:
    with process_cluster(2) as processes:
        _, two = pair_of_workers(processes, "recv")
        two.call(acts.start_transfer, "batch", "recv")
        processes.kill(processes.pids[1])
        two.call(closing, closed)


def closing(state: dict[str, Any], closed: str) -> None:
    if closed == "batch":
        state["handlers"]["batch"].close(timeout=LONG)
    else:
        state.pop("client").close()


def closed_meanwhile(state: dict[str, Any], what: str) -> tuple[str, str]:
    """A transfer that waits, and its batch closed by another thread."""
    handler, ended = state["handlers"]["batch"], []
    semaphore = handler.transfer(what)

    def wait() -> None:
        try:
            semaphore.result(LONG)
        except EthaRayError as error:
            ended.append((type(error).__name__, str(error)))

    thread = threading.Thread(target=wait)
    thread.start()
    handler.close(timeout=LONG)
    thread.join(LONG)
    found: tuple[str, str] = ended[0]
    return found


@pytest.mark.parametrize("what", CALLS)
def test_agents_that_are_shut_down_end_what_waits_and_leave_nothing(what: str) -> None:
    with process_cluster(2) as cluster:  # it looks, at its end, at what is left
        one, _two = pair_of_workers(cluster, what)
        one.start(waiting, what)
        until_it_waits(cluster, one, what)
        for pid in cluster.pids:
            os.kill(pid, signal.SIGTERM)
        name, message = one.result(LONG)
        assert name in ("AgentDiedError", "PeerLostError", "TransferCancelledError", "BatchClosedError"), (name, message)
        for pid in cluster.pids:
            cluster.wait(pid)
