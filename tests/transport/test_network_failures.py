"""Owners in processes, and on a host, of their own, that die while a reader reads: killed, stopped, or cut off."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest
import torch

from etha_ray.errors import HandleExpiredError, PeerLostError, TransferError
from etha_ray.net import Address, Server
from etha_ray.testing import eventually
from etha_ray.transport.network import NetworkProgram, NetworkTransport, Read, RemoteRegion
from tests.net.namespaces import Cable, cable
from tests.net.peer import FAILURE_TIMEOUT, ROOT, SECRET, first_word, peer, source

TENSORS, ELEMENTS = 8, 2 << 20


@pytest.fixture
def reader() -> Iterator[NetworkTransport]:
    with contextlib.closing(NetworkTransport(SECRET, failure_timeout=FAILURE_TIMEOUT)) as reader:
        yield reader


def prepare(reader: NetworkTransport, address: Address, tensors: int = TENSORS) -> tuple[NetworkProgram, list[torch.Tensor]]:
    targets = [torch.zeros(ELEMENTS, dtype=torch.int32) for _ in range(tensors)]
    regions = [RemoteRegion(address, "weights", index, (0,), (ELEMENTS,), torch.int32) for index in range(tensors)]
    return reader.prepare([Read(region, target) for region, target in zip(regions, targets, strict=True)], bucket_size=1 << 20), targets


def check(targets: list[torch.Tensor]) -> None:
    assert all(torch.equal(target, source(index, ELEMENTS)) for index, target in enumerate(targets))


class Midway:
    """Runs a program again and again until it fails; ``begun`` once the first bytes of a run are there."""

    def __init__(self, program: NetworkProgram, targets: list[torch.Tensor]) -> None:
        self.error: TransferError | None = None
        self._program, self._targets = program, targets
        targets[0].zero_()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()
        eventually(lambda: targets[0].any() or not self._thread.is_alive())

    def _run(self) -> None:
        try:
            while True:
                self._program.run()
        except TransferError as error:
            self.error = error

    def ended(self) -> TransferError:
        self._thread.join()
        assert self.error is not None
        return self.error


@contextlib.contextmanager
def owner(host: str = "127.0.0.1", port: int = 0, tensors: int = TENSORS) -> Iterator[tuple[subprocess.Popen[str], Address]]:
    with peer("own", host, str(port), str(tensors), str(ELEMENTS)) as process:
        yield process, Address(host, int(first_word(process)))


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "stopped"])
def test_an_owner_that_dies_midway_and_comes_back(how: signal.Signals, reader: NetworkTransport) -> None:
    with owner() as (process, address):
        program, targets = prepare(reader, address)
        program.run()
        check(targets)
        midway = Midway(program, targets)
        process.send_signal(how)
        error = midway.ended()
        assert isinstance(error, PeerLostError)
        assert f"agent at {address}" in str(error)
        if how == signal.SIGSTOP:
            # It wakes up, and serves again: the same program connects by itself.
            process.send_signal(signal.SIGCONT)
            for target in targets:
                target.zero_()
            program.run()
            check(targets)
            return
    with pytest.raises(PeerLostError, match=f"cannot reach the agent at {address}"):
        program.run()
    with owner(port=address.port, tensors=0), pytest.raises(HandleExpiredError, match=f"{address}.*'weights' is not there"):
        program.run()
    with owner(port=address.port):
        for target in targets:
            target.zero_()
        program.run()
        check(targets)


def test_a_reader_that_is_killed_costs_the_owner_nothing(reader: NetworkTransport) -> None:
    """It is another process that reads here: this one owns."""
    code = f"""
import sys, torch
from etha_ray.net import Address
from etha_ray.transport.network import *
from tests.net.peer import SECRET
reader = NetworkTransport(SECRET)
region = RemoteRegion(Address.parse(sys.argv[1]), "weights", 0, (0,), ({ELEMENTS},), torch.int32)
program = reader.prepare([Read(region, torch.zeros({ELEMENTS}, dtype=torch.int32))], bucket_size=1 << 16)
print("ready", flush=True)
while True:
    program.run()
"""
    before = set(threading.enumerate())
    with contextlib.closing(Server(SECRET, reader.services, "127.0.0.1")) as server:
        export = reader.export("weights", [source(0, ELEMENTS)])
        for how in (signal.SIGKILL, signal.SIGSTOP):
            command = [sys.executable, "-c", code, str(server.address)]
            with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
                try:
                    assert first_word(process) == "ready"
                    process.send_signal(how)
                    if how == signal.SIGSTOP:
                        export.close()  # waits for it no longer than for one that is lost
                    eventually(lambda: not server._threads and not reader._exports._sessions)
                finally:
                    process.kill()
    eventually(lambda: set(threading.enumerate()) <= before)  # those that the server has forgotten are about to end


@pytest.fixture
def line() -> Iterator[Cable]:
    with cable() as line:
        yield line


@pytest.mark.parametrize("side", ["near", "far"])
def test_a_cable_that_is_cut_midway(side: str, line: Cable, reader: NetworkTransport) -> None:
    with peer("own", line.host, "0", str(TENSORS), str(ELEMENTS), prefix=line.over_there) as process:
        address = Address(line.host, int(first_word(process)))
        program, targets = prepare(reader, address)
        program.run()
        check(targets)
        midway = Midway(program, targets)
        line.cut(side)
        error = midway.ended()
        assert isinstance(error, PeerLostError)
        assert f"agent at {address}" in str(error)
        assert process.poll() is None  # it lives, unreachable


def test_one_stream_that_is_cut_off_alone(line: Cable, reader: NetworkTransport) -> None:
    """The owner's heartbeats still come: it is the stream that must be noticed."""
    with peer("own", line.host, "0", str(TENSORS), str(ELEMENTS), prefix=line.over_there) as process:
        address = Address(line.host, int(first_word(process)))
        program, targets = prepare(reader, address)
        program.run()
        # Of those that are connected: one may have come too late for the run.
        port = max(stream.socket.getsockname()[1] for stream in tuple(reader._sessions[address].streams._streams))
        midway = Midway(program, targets)
        line.drop_packets_to(port)
        error = midway.ended()
        assert isinstance(error, PeerLostError)
        assert f"lost the agent at {address}: Connection timed out" in str(error)
        program.run()  # by new streams
        check(targets)


def test_a_slow_cable_is_waited_for(line: Cable, reader: NetworkTransport) -> None:
    """Several failure timeouts for one program, whose heartbeats share the line with its bytes."""
    line.slow_down(megabits=10)
    with peer("own", line.host, "0", "1", str(ELEMENTS), prefix=line.over_there) as process:
        program, targets = prepare(reader, Address(line.host, int(first_word(process))), tensors=1)
        program.run()
        check(targets)
