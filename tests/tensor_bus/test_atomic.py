"""What tensors hold while they are received, after a receive that ended midway, and after deaths in the midst of one."""

from __future__ import annotations

import os
import secrets
import signal
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

import etha_ray.tensor_bus.agent as module
from etha_ray.config import AgentPaths
from etha_ray.errors import (
    AgentDiedError,
    BatchClosedError,
    BatchTornError,
    ConfigError,
    PeerLostError,
    TransferTimeoutError,
)
from etha_ray.tensor_bus import connection, pinned
from etha_ray.tensor_bus.agent import TensorBusAgent
from etha_ray.tensor_bus.client import BatchHandler, TensorBusClient
from etha_ray.testing import eventually, succeed, together
from etha_ray.transport import Copy, CopyProgram, MappedTransport
from tests.tensor_bus.cluster import LONG, LocalCluster, ProcessCluster, local_cluster, process_cluster


class Stop(CopyProgram):
    """A program that stands still once it has copied: all of it, or half of its tensors."""

    def __init__(self, transport: Stopping, copies: Sequence[Copy]) -> None:
        self.transport = transport
        self.whole = MappedTransport.prepare(transport, copies)
        self.half = MappedTransport.prepare(transport, copies[: len(copies) // 2])

    @property
    def nbytes(self) -> int:
        return self.whole.nbytes

    def run(self) -> int:
        self.transport.runs += 1
        if self.transport.runs in self.transport.stops:
            self.half.run()
            self.transport.inside.set()
            assert self.transport.open.wait(LONG)
        return self.whole.run()


class Stopping(MappedTransport):
    """Stands still in the runs with these numbers, which begin with 1, until it is opened."""

    def __init__(self, *stops: int) -> None:
        super().__init__(1)
        self.stops, self.runs = stops, 0
        self.inside, self.open = threading.Event(), threading.Event()

    def prepare(self, copies: Sequence[Copy]) -> Any:
        return Stop(self, copies)

    def again(self, *stops: int) -> None:
        self.stops, self.runs = stops, 0
        self.inside.clear()
        self.open.clear()


def filled(value: float) -> list[torch.Tensor]:
    return [torch.full((6,), value), torch.full((2, 3), value)]


def batch(
    one: TensorBusClient, two: TensorBusClient, batch_id: str
) -> tuple[BatchHandler, BatchHandler, list[torch.Tensor], list[torch.Tensor]]:
    """A batch of two tensors, ones at ``one`` and zeros at ``two``."""
    pair, mine, theirs = f"pair of {batch_id}", filled(1.0), filled(0.0)
    succeed(lambda: one.init_pair(pair, "a", "b", 1, timeout=LONG), lambda: two.init_pair(pair, "b", "a", 1, timeout=LONG))
    first, second = succeed(
        lambda: one.register_tensors(batch_id, [(tensor, pair) for tensor in mine], timeout=LONG),
        lambda: two.register_tensors(batch_id, [(tensor, pair) for tensor in theirs], timeout=LONG),
    )
    return first, second, mine, theirs


def hold(tensors: Sequence[torch.Tensor], value: float) -> bool:
    return all(bool((tensor == value).all()) for tensor in tensors)


@pytest.fixture(scope="module")
def transport() -> Stopping:
    return Stopping()


@pytest.fixture(scope="module")
def cluster(transport: Stopping) -> Iterator[LocalCluster]:
    with local_cluster(mapped=transport) as made:
        yield made


def first_version(first: BatchHandler, second: BatchHandler, **more: Any) -> None:
    sent = first.transfer("send", version=1)
    assert second.transfer("recv", **more).result(LONG).version == 1
    sent.result(LONG)


def give_up_when_it_is_read(cluster: LocalCluster, transport: Stopping, first: BatchHandler) -> None:
    """A send on the first agent whose time is up once the transport stands still in the midst of it."""
    gave_up, _ = together(
        lambda: first.transfer("send", blocking=True, timeout=LONG),
        lambda: (transport.inside.wait(LONG), cluster.time_is_up(0)),
    )
    assert isinstance(gave_up, TransferTimeoutError), gave_up


class TestAtomic:
    def test_the_tensors_change_when_all_is_there(self, cluster: LocalCluster, transport: Stopping) -> None:
        transport.again()
        first, second, mine, theirs = batch(cluster.client(0), cluster.client(1), "whole")
        first_version(first, second, atomic=True)
        assert hold(theirs, 1.0)
        for tensor in mine:
            tensor.fill_(2.0)
        transport.again(1)
        sent, got = first.transfer("send"), second.transfer("recv", atomic=True)
        assert transport.inside.wait(LONG)
        assert hold(theirs, 1.0)
        assert (second.version, second.torn) == (1, ())
        transport.open.set()
        report = got.result(LONG)
        sent.result(LONG)
        assert hold(theirs, 2.0)
        assert (second.version, second.torn) == (2, ())
        assert [span.name for span in report.spans] == ["wait for senders", "move", "swap in"]

    def test_a_sender_that_gave_up_is_waited_for_again(self, cluster: LocalCluster, transport: Stopping) -> None:
        transport.again()
        first, second, mine, theirs = batch(cluster.client(0), cluster.client(1), "given up")
        first_version(first, second)
        transport.again(1)
        got = second.transfer("recv", atomic=True)
        give_up_when_it_is_read(cluster, transport, first)
        for tensor in mine:
            tensor.fill_(3.0)  # it may: its send is over
        transport.open.set()
        with pytest.raises(TimeoutError):
            got.result(0.2)
        assert hold(theirs, 1.0)
        assert (second.version, second.torn) == (1, ())
        first.transfer("send", version=9)
        assert got.result(LONG).version == 9
        assert hold(theirs, 3.0)

    def test_a_sender_that_left_ends_it_and_nothing_was_written(self, cluster: LocalCluster, transport: Stopping) -> None:
        transport.again()
        first, second, mine, theirs = batch(cluster.client(0), cluster.client(1), "left")
        first_version(first, second)
        for tensor in mine:
            tensor.fill_(2.0)
        transport.again(1)
        sent, got = first.transfer("send"), second.transfer("recv", atomic=True)
        assert transport.inside.wait(LONG)
        first.close()
        transport.open.set()
        with pytest.raises(BatchClosedError, match=r"a\[0\] is gone.*its tensors still hold version 1"):
            got.result(LONG)
        with pytest.raises(BatchClosedError):
            sent.result(LONG)
        assert hold(theirs, 1.0)
        assert (second.version, second.torn) == (1, ())

    def test_it_is_for_receivers(self, cluster: LocalCluster, transport: Stopping) -> None:
        transport.again()
        first, _, _, _ = batch(cluster.client(0), cluster.client(1), "for receivers")
        with pytest.raises(ConfigError, match='atomic goes with "recv"'):
            first.transfer("send", atomic=True)


class TestInPlace:
    def test_torn_is_known_until_the_next_good_receive(self, cluster: LocalCluster, transport: Stopping) -> None:
        transport.again()
        first, second, _, theirs = batch(cluster.client(0), cluster.client(1), "torn")
        first_version(first, second)
        transport.again(1)
        got = second.transfer("recv")
        give_up_when_it_is_read(cluster, transport, first)
        assert (second.version, second.torn) == (0, (0, 1))
        assert "torn: version 2 is being received" in repr(second)
        transport.open.set()
        with pytest.raises(BatchTornError, match=r"a\[0\] gave up .*\(torn: tensors 0-1\): receive again"):
            got.result(LONG)
        assert (second.version, second.torn) == (0, (0, 1))
        with pytest.raises(BatchTornError, match="must not be sent on"):
            second.transfer("send").result(LONG)
        first.transfer("send")
        assert second.transfer("recv").result(LONG).version == 3  # 2 was given up, and may stand somewhere else
        assert (second.version, second.torn) == (3, ())
        assert hold(theirs, 1.0)


# --- deaths

_STOPS = {0: 0, 1: 2, 2: 2, 3: 3}


def stuck_agent(arguments: list[str]) -> None:
    """An agent that stands still for good in one of its runs, in the midst of the copy."""
    rank = int(arguments[arguments.index("--rank") + 1])
    pinned.MappedTransport = lambda _: Stopping(_STOPS[rank])  # type: ignore[assignment, misc]
    module.main(arguments)


@pytest.fixture(scope="module")
def processes() -> Iterator[ProcessCluster]:
    with process_cluster(len(_STOPS), run=stuck_agent) as made:
        yield made


@pytest.mark.parametrize(
    ("rank", "atomic", "torn"),
    [(1, False, (0, 1)), (2, True, ()), (3, True, (0, 1))],
    ids=["received in place", "read for an atomic receive", "swapped in"],
)
def test_the_receivers_agent_is_killed_in_the_midst_of_a_copy(
    processes: ProcessCluster, rank: int, atomic: bool, torn: tuple[int, ...]
) -> None:
    one, two = processes.client(0), processes.client(rank)
    first, second, mine, theirs = batch(one, two, f"killed {rank}")
    first_version(first, second)
    for tensor in mine:
        tensor.fill_(2.0)
    sent, got = first.transfer("send"), second.transfer("recv", atomic=atomic)
    if torn:
        # Half of the tensors are written, and half are not.
        eventually(lambda: hold(theirs[:1], 2.0))
        assert hold(theirs[1:], 1.0)
    else:
        eventually(lambda: first.query_transfer_signal())
    processes.kill(processes.pids[rank])
    with pytest.raises(AgentDiedError):
        got.result(LONG)
    assert second.torn == torn
    assert second.version == (0 if torn else 1)
    if torn:
        assert "or its agent was killed" in repr(second)
    else:
        assert hold(theirs, 1.0)
    if rank != 3:  # whose senders were let go before it was swapped in
        with pytest.raises(PeerLostError):
            sent.result(LONG)
    for client in (one, two):
        client.close()


@pytest.mark.parametrize("atomic", [True, False])
def test_the_senders_agent_is_killed_while_its_data_is_read(processes: ProcessCluster, tmp_path: Any, atomic: bool) -> None:
    transport = Stopping(2)
    paths = AgentPaths(f"{tmp_path}/c.lmdb", f"{tmp_path}/s.lmdb")
    receiver = TensorBusAgent(9, processes.master, paths=paths, mapped=transport)
    receiver.start()
    one, two = processes.client(0), TensorBusClient(9, paths.command_queue, paths.state, LONG)
    first, second, mine, theirs = batch(one, two, f"sender killed {atomic}")
    first_version(first, second)
    for tensor in mine:
        tensor.fill_(2.0)
    _, got = first.transfer("send"), second.transfer("recv", atomic=atomic)
    assert transport.inside.wait(LONG)
    processes.kill(processes.pids[0])
    transport.open.set()
    if atomic:
        with pytest.raises(PeerLostError, match=r"a\[0\] is gone .*its tensors still hold version 1"):
            got.result(LONG)
        assert (second.version, second.torn) == (1, ())
        assert hold(theirs, 1.0)
    else:
        with pytest.raises(BatchTornError, match="torn: tensors 0-1"):
            got.result(LONG)
        assert (second.version, second.torn) == (0, (0, 1))
    for client in (one, two):
        client.close()
    receiver.stop()
    processes.start_agent(0)


def test_what_is_whole_when_one_of_two_senders_is_killed_while_its_data_is_read(processes: ProcessCluster, tmp_path: Any) -> None:
    transport = Stopping(1)
    paths = AgentPaths(f"{tmp_path}/c.lmdb", f"{tmp_path}/s.lmdb")
    receiver = TensorBusAgent(9, processes.master, paths=paths, mapped=transport)
    receiver.start()
    one, two, three = processes.client(0), *(TensorBusClient(9, paths.command_queue, paths.state, LONG) for _ in range(2))
    succeed(lambda: one.init_pair("left", "a", "b", 1, timeout=LONG), lambda: two.init_pair("left", "b", "a", 1, timeout=LONG))
    succeed(lambda: three.init_pair("right", "c", "b", 1, timeout=LONG), lambda: two.init_pair("right", "b", "c", 1, timeout=LONG))
    left, right = filled(0.0)
    first, second, third = succeed(
        lambda: one.register_tensors("both", [(torch.full((6,), 5.0), "left")], timeout=LONG),
        lambda: two.register_tensors("both", [(left, "left"), (right, "right")], timeout=LONG),
        lambda: three.register_tensors("both", [(torch.full((2, 3), 5.0), "right")], timeout=LONG),
    )
    sent, got = [first.transfer("send", version=7), third.transfer("send", version=7)], second.transfer("recv")
    assert transport.inside.wait(LONG)
    processes.kill(processes.pids[0])
    transport.open.set()
    with pytest.raises(BatchTornError, match=r"a\[0\] went away .*\(torn: tensor 0; whole, at version 7: tensor 1\): receive again"):
        got.result(LONG)
    assert (second.version, second.torn) == (0, (0,))
    assert hold([right], 5.0)
    with pytest.raises(AgentDiedError):
        sent[0].result(LONG)
    for client in (one, two, three):
        client.close()
    receiver.stop()
    processes.start_agent(0)


class GivenUp:
    """A receive of version 2 whose worker gave up when the transport stood still in the midst of it; its agent was ``told``, or could not
    be. ``sent`` is what it receives, from ``first``."""

    def __init__(
        self,
        cluster: LocalCluster,
        transport: Stopping,
        monkeypatch: pytest.MonkeyPatch,
        *,
        atomic: bool = True,
        stop: int = 1,
        told: bool = True,
    ) -> None:
        transport.again()
        name = f"given up {secrets.token_hex(4)}"
        self.first, self.second, self.mine, self.theirs = batch(cluster.client(0), cluster.client(1), name)
        first_version(self.first, self.second)
        self.fill(2.0)
        transport.again(stop)
        self.sent = self.first.transfer("send", version=2)
        _give_up_receiving(transport, monkeypatch, self.second, atomic=atomic, told=told)

    def fill(self, value: float) -> None:
        for tensor in self.mine:
            tensor.fill_(value)


def _give_up_receiving(transport: Stopping, monkeypatch: pytest.MonkeyPatch, handler: BatchHandler, *, atomic: bool, told: bool) -> None:
    def waits(*_: Any) -> None:
        assert transport.inside.wait(LONG)
        raise TransferTimeoutError("it gave no answer")

    with monkeypatch.context() as patched:
        patched.setattr(connection.Connection, "_wait", waits)
        if not told:
            patched.setattr(connection.Connection, "_give_up", lambda _, reply, cancel: reply.abandon())
        with pytest.raises(TransferTimeoutError, match="gave no answer"):
            handler.transfer("recv", blocking=True, timeout=LONG, atomic=atomic)


@pytest.mark.parametrize(("atomic", "stop"), [(False, 1), (True, 1), (True, 2)], ids=["in place", "atomic", "atomic, swapping in"])
@pytest.mark.parametrize("told", [True, False], ids=["told", "not told"])
def test_the_next_call_waits_for_a_copy_that_was_given_up(
    cluster: LocalCluster, transport: Stopping, monkeypatch: pytest.MonkeyPatch, atomic: bool, stop: int, told: bool
) -> None:
    """Also where its worker could not tell the agent that it gave it up, as the queue was full or held."""
    it = GivenUp(cluster, transport, monkeypatch, atomic=atomic, stop=stop, told=told)
    with pytest.raises(TransferTimeoutError, match=r"an earlier call, which was given up, .*was still under way; .* within 1 s"):
        it.second.transfer("recv", blocking=True, timeout=1.0, atomic=atomic)
    got = it.second.transfer("recv", atomic=atomic)
    transport.open.set()
    it.sent.result(LONG)
    assert it.second.wait_version(2, LONG) == 2
    assert not got.done()
    it.fill(3.0)
    it.first.transfer("send")
    assert got.result(LONG).version == 3
    assert hold(it.theirs, 3.0)


def test_a_copy_that_was_given_up_takes_no_later_version(
    cluster: LocalCluster, transport: Stopping, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that is received atomically waits again when its sender takes back what it reads, but not if nobody waits for it."""
    it = GivenUp(cluster, transport, monkeypatch)
    got = it.second.transfer("recv")
    cluster.time_is_up(0)
    with pytest.raises(TransferTimeoutError):
        it.sent.result(LONG)
    transport.open.set()
    it.first.transfer("send", version=8)
    assert got.result(LONG).version == 8


def test_who_waits_for_a_copy_that_was_given_up_hears_that_the_batch_is_closed(
    cluster: LocalCluster, transport: Stopping, monkeypatch: pytest.MonkeyPatch
) -> None:
    it = GivenUp(cluster, transport, monkeypatch)
    got = it.second.transfer("recv")
    closing = ThreadPoolExecutor(1).submit(it.second.close)
    with pytest.raises(BatchClosedError):
        got.result(LONG)
    assert not closing.done()  # it waits for what may still be written
    transport.open.set()
    closing.result(LONG)
    assert hold(it.theirs, 1.0) or hold(it.theirs, 2.0)


@pytest.mark.parametrize(
    ("atomic", "stop", "version"), [(False, 1, 0), (True, 1, 1), (True, 2, 0)], ids=["in place", "atomic", "atomic, swapping in"]
)
def test_ctrl_c_in_the_midst_of_a_copy(cluster: LocalCluster, transport: Stopping, atomic: bool, stop: int, version: int) -> None:
    """A copy is not cut short: until it is over, ``version`` says that the tensors are being written, and then what they hold."""
    transport.again()
    first, second, mine, theirs = batch(cluster.client(0), cluster.client(1), f"interrupted {atomic} {stop}")
    first_version(first, second)
    for tensor in mine:
        tensor.fill_(2.0)
    transport.again(stop)
    sent = first.transfer("send")
    interrupting = threading.Thread(target=lambda: transport.inside.wait(LONG) and os.kill(os.getpid(), signal.SIGINT))
    interrupting.start()
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            second.transfer("recv", blocking=True, timeout=LONG, atomic=atomic)
    finally:
        signal.signal(signal.SIGINT, before)
    interrupting.join()
    assert second.version == version
    assert hold(theirs, 1.0) or not version
    transport.open.set()
    sent.result(LONG)
    assert second.wait_version(2, LONG) == 2
    assert hold(theirs, 2.0)
    assert second.torn == ()
    for tensor in mine:
        tensor.fill_(3.0)
    sent = first.transfer("send")
    assert second.transfer("recv", blocking=True, timeout=LONG, atomic=atomic).result(LONG).version == 3
    sent.result(LONG)
    assert hold(theirs, 3.0)
