"""Runs under way: an owner that is slow, cancelling, closing, and programs that share an owner."""

from __future__ import annotations

import contextlib
import threading

import torch

from etha_ray.errors import TransferCancelledError, TransferError
from etha_ray.testing import eventually
from etha_ray.transport.network import NetworkProgram, NetworkTransport, Read, RemoteRegion
from tests.net.pair import PATIENCE, SECRET, Pair, Relay


def running(program: NetworkProgram, outcome: list[object]) -> threading.Thread:
    def run() -> None:
        try:
            outcome.append(program.run())
        except TransferError as error:
            outcome.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    return thread


def test_an_owner_that_lives_and_is_slow_is_waited_for(pair: Pair, relay: Relay) -> None:
    source, target = torch.ones(16 << 20, dtype=torch.uint8), torch.zeros(16 << 20, dtype=torch.uint8)
    pair.owner.export("x", [source])
    reader = NetworkTransport(SECRET, failure_timeout=1.0)
    with contextlib.closing(reader):
        region = RemoteRegion(relay.address, "x", 0, (0,), (16 << 20,), torch.uint8)
        program = reader.prepare([Read(region, target)])
        relay.open.clear()
        outcome: list[object] = []
        thread = running(program, outcome)
        assert relay.held_back.wait(PATIENCE)
        thread.join(3.0)  # failure timeouts: the channel's heartbeats go on meanwhile
        assert thread.is_alive()
        relay.open.set()
        thread.join()
        assert outcome == [16 << 20]
        assert target.all()


def test_cancel_from_another_thread(pair: Pair, relay: Relay) -> None:
    source, target = torch.ones(64 << 20, dtype=torch.uint8), torch.zeros(64 << 20, dtype=torch.uint8)
    pair.owner.export("x", [source])
    program = pair.reader.prepare([Read(RemoteRegion(relay.address, "x", 0, (0,), (64 << 20,), torch.uint8), target)], bucket_size=1 << 20)
    program.cancel()  # nothing runs: nothing happens
    relay.open.clear()
    outcome: list[object] = []
    thread = running(program, outcome)
    assert relay.held_back.wait(PATIENCE)
    program.cancel()
    relay.open.set()
    thread.join()
    assert isinstance(outcome[0], TransferCancelledError)
    assert not target.all()  # torn, as the error says
    arrived = int(target.sum())
    assert arrived <= 8 << 20  # what was asked for: two buckets a stream
    assert program.run() == 64 << 20
    assert target.all()


def test_closing_the_transport_ends_its_runs(pair: Pair, relay: Relay) -> None:
    source = torch.ones(64 << 20, dtype=torch.uint8)
    pair.owner.export("x", [source])
    program = pair.reader.prepare([Read(RemoteRegion(relay.address, "x", 0, (0,), (64 << 20,), torch.uint8), torch.zeros_like(source))])
    relay.open.clear()
    outcome: list[object] = []
    thread = running(program, outcome)
    assert relay.held_back.wait(PATIENCE)
    pair.reader.close()
    thread.join()
    assert isinstance(outcome[0], TransferCancelledError)


def test_a_small_program_does_not_wait_for_a_large_one(pair: Pair) -> None:
    """Both read the same owner: their buckets take turns. The large one has most of a minute to go when the small one is done."""
    large, small = torch.ones(96 << 20, dtype=torch.uint8), torch.ones(1000, dtype=torch.uint8)
    pair.owner.export("x", [large, small])
    targets = torch.zeros_like(large), torch.zeros_like(small)
    slow = pair.reader.prepare([Read(pair.region(0, large), targets[0])] * 500, bucket_size=1 << 22)
    quick = pair.reader.prepare([Read(pair.region(1, small), targets[1])])
    outcome: list[object] = []
    thread = running(slow, outcome)
    eventually(lambda: targets[0][0])
    quick.run()
    assert targets[1].all()
    slow.cancel()
    thread.join()
    assert isinstance(outcome[0], TransferCancelledError)
