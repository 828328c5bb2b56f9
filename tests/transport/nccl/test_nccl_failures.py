"""Communicators that fail, stand still or are never made, runs that are cancelled, exports that close, and peers that die."""

from __future__ import annotations

import contextlib
import gc
import signal
import threading
import time
import traceback
import weakref
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from etha_ray.errors import CommunicatorError, HandleExpiredError, IntegrityError, PeerLostError, TransferCancelledError, TransferError
from etha_ray.net import Address
from etha_ray.transport.network import NetworkProgram, Read, RemoteRegion, joining
from etha_ray.transport.network.slots import SLOTS
from tests.contracts.transport import bits, random_tensor
from tests.net import peer as peers
from tests.net.pair import PATIENCE, SECRET
from tests.net.peer import FAILURE_TIMEOUT, first_word, peer, source
from tests.transport.nccl.pair import DevicePair, Running, end
from tests.transport.nccl.recording import RecordingCommunicators

SOURCE = random_tensor((1 << 20,))
"""Sixteen rounds of the pairs here."""


@pytest.fixture
def pair() -> Iterator[DevicePair]:
    before = set(threading.enumerate())
    budget = {"memory_budget": 1 << 20, "failure_timeout": 3.0}
    with contextlib.closing(DevicePair(budget, budget)) as pair:
        yield pair
    # Whatever happened, no lane and no thread is left, and nobody uses a communicator.
    assert all(each.aborted.is_set() for each in (*pair.sent.made, *pair.received.made))
    for thread in set(threading.enumerate()) - before:
        thread.join(PATIENCE)
        assert not thread.is_alive()


def prepared(pair: DevicePair) -> tuple[NetworkProgram, torch.Tensor]:
    target = torch.zeros_like(SOURCE)
    return pair.prepare([SOURCE], [target]), target


def stalled(pair: DevicePair, program: NetworkProgram) -> Running:
    """A run whose messages stand still."""
    pair.sent.stands_still.set()
    running = Running(program)
    assert pair.sent.stood_still.wait(PATIENCE)
    return running


def goes_on(pair: DevicePair, program: NetworkProgram, target: torch.Tensor, communicators: int) -> None:
    """The next run is right, by as many communicators as there have been."""
    pair.sent.stands_still.clear()
    target.zero_()
    assert program.run() == SOURCE.nbytes
    assert bits(target) == bits(SOURCE)
    assert len(pair.sent.made) == len(pair.received.made) == communicators


# --------------------------------------------------------------------------------------------------- the communicator


@pytest.mark.parametrize("side", ["owner", "reader"])
def test_an_error_of_the_communicator_ends_the_run_at_both_ends(pair: DevicePair, side: str) -> None:
    program, target = prepared(pair)
    running = stalled(pair, program)
    failing = pair.sent if side == "owner" else pair.received
    failing.made[0].error = "NCCL_ERROR_SYSTEM_ERROR: unhandled system error"
    error = running.outcome
    assert isinstance(error, CommunicatorError)
    assert f"the agent at {pair.address}" in str(error)
    assert ("the agent that connected from 127.0.0.1:" in str(error)) == (side == "owner")
    assert "unhandled system error" in str(error)
    assert "NCCL_SOCKET_IFNAME is not set" in str(error)
    assert program.unfinished() == frozenset({0})
    goes_on(pair, program, target, communicators=2)


def test_a_communicator_that_stands_still_is_aborted(pair: DevicePair, monkeypatch: pytest.MonkeyPatch) -> None:
    program, target = prepared(pair)
    monkeypatch.setattr(joining, "STALLED", 0.3)
    error = stalled(pair, program).outcome
    assert isinstance(error, CommunicatorError)
    assert "was not done with what both ends had handed over within 0.3 s" in str(error)
    monkeypatch.setattr(joining, "STALLED", PATIENCE)
    goes_on(pair, program, target, communicators=2)


@pytest.mark.parametrize("side", ["owner", "reader"])
def test_one_that_is_never_joined_is_given_up(pair: DevicePair, side: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(joining, "JOIN_TIMEOUT", 0.3)
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "eth7")
    never = pair.sent if side == "owner" else pair.received
    never.never_joined = True
    with pytest.raises(CommunicatorError, match=r"was not (joined by both|connected) within 0.3 s.*NCCL_SOCKET_IFNAME is eth7") as caught:
        prepared(pair)
    assert f"the agent at {pair.address}" in str(caught.value)
    never.never_joined = False
    monkeypatch.setattr(joining, "JOIN_TIMEOUT", PATIENCE)
    target = torch.zeros_like(SOURCE)
    goes_on(pair, pair.reader.prepare(pair.reads([SOURCE], [target]), 1 << 16), target, communicators=2)


def test_one_that_cannot_be_made_says_why(pair: DevicePair, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses() -> bytes:
        raise CommunicatorError("no unique id can be made: NCCL_ERROR_INTERNAL_ERROR: no socket interface found")

    with monkeypatch.context() as patch:
        patch.setattr(pair.sent, "unique_id", refuses)
        with pytest.raises(CommunicatorError, match=rf"agent at {pair.address}: NCCL between .*no socket interface found"):
            prepared(pair)
    target = torch.zeros_like(SOURCE)
    goes_on(pair, pair.reader.prepare(pair.reads([SOURCE], [target]), 1 << 16), target, communicators=1)


def test_a_device_that_fails_is_not_taken_for_a_peer_that_died(pair: DevicePair, monkeypatch: pytest.MonkeyPatch) -> None:
    program, _ = prepared(pair)
    device = pair.reader._device
    assert device is not None

    def fails() -> bool:
        raise TransferError("cuda:0 reports: an illegal memory access was encountered")

    with monkeypatch.context() as patch:
        patch.setattr(device.receiving.all[0].lanes[0], "done", fails)
        with pytest.raises(TransferError, match="illegal memory access") as caught:
            program.run()
    assert type(caught.value) is TransferError


# ---------------------------------------------------------------------------------------------------------- both live


def test_a_cancelled_run_ends_after_the_rounds_under_way_and_leaves_the_communicator_good(pair: DevicePair) -> None:
    program, target = prepared(pair)
    running = stalled(pair, program)
    program.cancel()
    pair.sent.stands_still.clear()
    assert isinstance(running.outcome, TransferCancelledError)
    assert len(pair.groups) < 17
    arrived = len(pair.groups) - 1
    assert bits(target[: arrived << 16]) == bits(SOURCE[: arrived << 16])
    assert not target[arrived << 16 :].any()
    goes_on(pair, program, target, communicators=1)


def test_a_cancelled_run_that_its_owner_does_not_end_is_aborted(pair: DevicePair) -> None:
    program, target = prepared(pair)
    running = stalled(pair, program)
    program.cancel()
    assert isinstance(running.outcome, TransferCancelledError)
    goes_on(pair, program, target, communicators=2)


def test_a_run_that_waits_for_its_turn_can_be_cancelled(pair: DevicePair) -> None:
    program, _ = prepared(pair)
    target = torch.zeros_like(SOURCE)
    other = pair.reader.prepare(pair.reads([SOURCE], [target]), 1 << 16)
    running = stalled(pair, program)
    waiting = Running(other)
    while not pair.reader._sessions[pair.address].taker()._waiting:
        threading.Event().wait(0.01)
    other.cancel()
    assert isinstance(waiting.outcome, TransferCancelledError)
    pair.sent.stands_still.clear()
    assert running.outcome == SOURCE.nbytes
    goes_on(pair, other, target, communicators=1)


def test_a_run_that_waits_for_a_slot_of_its_owner_can_be_cancelled(pair: DevicePair) -> None:
    """At once, as what has the slots may take long; and its communicator stays good."""
    program, target = prepared(pair)
    communicators = [RecordingCommunicators() for _ in range(SLOTS)]
    with contextlib.ExitStack() as stack:
        readers = [stack.enter_context(contextlib.closing(end(each, memory_budget=1 << 20))) for each in communicators]
        others = [reader.prepare(pair.reads([SOURCE], [torch.zeros_like(SOURCE)]), 1 << 16) for reader in readers]
        pair.sent.stands_still.set()
        running = [Running(other) for other in others]
        assert pair.owner._device is not None
        while pair.owner._device.sending._free:
            threading.Event().wait(0.01)
        waiting = Running(program)
        while not pair.reader._sessions[pair.address].taker()._run:
            threading.Event().wait(0.01)
        program.cancel()
        assert isinstance(waiting.outcome, TransferCancelledError)
        assert len(pair.received.made) == 1
        assert not pair.received.made[0].aborted.is_set()
        pair.sent.stands_still.clear()
        assert [each.outcome for each in running] == [SOURCE.nbytes] * SLOTS
        target.zero_()
        assert program.run() == SOURCE.nbytes
        assert bits(target) == bits(SOURCE)
        assert len(pair.received.made) == 1


class Array(np.ndarray[Any, Any]):
    """Memory whose end can be seen."""


@pytest.mark.parametrize("side", ["owner", "reader", "none"])
def test_no_tensor_is_held_once_its_export_and_its_program_are_gone(pair: DevicePair, side: str) -> None:
    """Not by what is left of a failure either, and without waiting for Python to collect garbage: it is memory of workers."""
    source, target = (np.zeros(SOURCE.numel(), np.float32).view(Array) for _ in range(2))
    held = [weakref.ref(source), weakref.ref(target)]
    export = pair.owner.export("x", [torch.from_numpy(source)])
    program = pair.reader.prepare([Read(pair.region(0, export.tensors[0]), torch.from_numpy(target))], 1 << 16)
    running = stalled(pair, program)
    if side != "none":
        (pair.sent if side == "owner" else pair.received).made[0].error = "unhandled system error"
        error = running.outcome
        assert isinstance(error, CommunicatorError)
        traceback.clear_frames(error.__traceback__)  # those of whoever ran it, as the agent's jobs do
        del error
    pair.sent.stands_still.clear()
    running.join()
    gc.collect()
    gc.disable()
    try:
        export.close()
        del source, target, program, running, export
        deadline = time.monotonic() + PATIENCE
        while any(each() is not None for each in held):  # the communicator's threads may be about to end
            assert time.monotonic() < deadline
            time.sleep(0.01)
    finally:
        gc.enable()


def test_an_export_that_closes_ends_its_runs_after_the_rounds_under_way(pair: DevicePair) -> None:
    program, target = prepared(pair)
    export = pair.owner._exports._exports["x"]
    running = stalled(pair, program)
    closing = threading.Thread(target=export.close)
    closing.start()
    while not export._closed:
        threading.Event().wait(0.01)
    assert closing.is_alive()  # what is under way still reads
    pair.sent.stands_still.clear()
    closing.join()
    error = running.outcome
    assert isinstance(error, HandleExpiredError)
    assert f"the agent at {pair.address}: what it reads was closed by its owner" in str(error)
    with pytest.raises(HandleExpiredError, match="export 'x' is not there"):
        program.run()
    pair.owner.export("x", [SOURCE])
    goes_on(pair, program, target, communicators=1)


@pytest.mark.parametrize("side", ["owner", "reader"])
def test_closing_either_end_ends_the_runs(pair: DevicePair, side: str) -> None:
    program, _ = prepared(pair)
    running = stalled(pair, program)
    (pair.owner if side == "owner" else pair.reader).close()
    if side == "owner":
        pair.server.close()
    assert isinstance(running.outcome, TransferCancelledError if side == "reader" else PeerLostError)


@pytest.mark.parametrize("contiguous", [True, False], ids=["straight", "packed"])
def test_one_bit_is_noticed(pair: DevicePair, contiguous: bool) -> None:
    sources = [random_tensor((70, 300)), SOURCE if contiguous else random_tensor((1 << 15, 32), seed=1).t()]
    targets = [torch.zeros_like(each) for each in sources]
    pair.owner.export("x", sources)
    reads = [
        Read(pair.region(index, each), target, f"tensor {index} of ours")
        for index, (each, target) in enumerate(zip(sources, targets, strict=True))
    ]
    program = pair.reader.prepare(reads, 1 << 16)
    pair.sent.flip = 5
    with pytest.raises(IntegrityError, match=rf"tensor 1 of ours, \[.*\] elements from \[.*\] .*agent at {pair.address} by NCCL has not"):
        program.run()
    assert program.unfinished() == frozenset({0, 1})
    program.run()
    assert all(bits(each) == bits(target) for each, target in zip(sources, targets, strict=True))


def test_off_means_off() -> None:
    with contextlib.closing(DevicePair(reader={"checksums": False})) as pair:
        target = torch.zeros(1 << 20, dtype=torch.uint8)
        program = pair.prepare([torch.zeros_like(target)], [target])
        pair.sent.flip = 3
        program.run()
        assert target.sum() == 1


# ---------------------------------------------------------------------------------------------------------- who dies

ELEMENTS = 4 << 20
PEER = "tests.transport.nccl.peer"


def test_an_owner_that_dies_midway_and_comes_back() -> None:
    target = torch.zeros(ELEMENTS, dtype=torch.int32)
    communicators = RecordingCommunicators()
    with (
        contextlib.closing(end(communicators, peers.SECRET, failure_timeout=FAILURE_TIMEOUT)) as reader,
        peer("own", str(ELEMENTS), module=PEER) as process,
    ):
        address = Address("127.0.0.1", int(first_word(process)))
        region = RemoteRegion(address, "weights", 0, (0,), (ELEMENTS,), torch.int32)
        program = reader.prepare([Read(region, target)], 1 << 18)
        for how in (signal.SIGSTOP, signal.SIGKILL):
            target.zero_()
            program.run()
            assert torch.equal(target, source(0, ELEMENTS))
            communicators.stands_still.set()
            communicators.stood_still.clear()
            running = Running(program)
            assert communicators.stood_still.wait(PATIENCE)
            process.send_signal(how)
            error = running.outcome
            assert isinstance(error, PeerLostError)
            assert f"agent at {address}" in str(error)
            assert communicators.made[-1].aborted.is_set()
            communicators.stands_still.clear()
            process.send_signal(signal.SIGCONT)


def test_a_reader_that_is_killed_costs_the_owner_nothing(pair: DevicePair) -> None:
    pair.owner.export("weights", [source(0, ELEMENTS)])
    with peer("read", SECRET.hex(), str(pair.address), str(ELEMENTS), module=PEER) as process:
        assert first_word(process) == "ready"
        pair.sent.stands_still.set()
        assert pair.sent.stood_still.wait(PATIENCE)
        process.kill()
        assert pair.sent.made[0].aborted.wait(PATIENCE)
    pair.sent.stands_still.clear()
    program, target = prepared(pair)
    assert program.run() == SOURCE.nbytes
    assert bits(target) == bits(SOURCE)
