"""A program over this host's memory and another's: the contract of one-sided transports with every second source behind a socket."""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Iterator, Sequence

import pytest
import torch

from etha_ray.errors import HandleExpiredError, NoTransportError, PeerLostError
from etha_ray.net import Server
from etha_ray.transport import Capabilities, Copy, CopyProgram, MappedTransport, OneSidedTransport, joint
from etha_ray.transport.base import check_copy
from etha_ray.transport.joint import Move, Source, prepare
from etha_ray.transport.network import NetworkTransport, Read, RemoteRegion
from tests.contracts.transport import OneSidedTransportContract


class _Owner:
    """Another agent's side: exports tensors, each under a name of its own."""

    def __init__(self) -> None:
        self.secret = os.urandom(32)
        self.transport = NetworkTransport(self.secret)
        self.server = Server(self.secret, self.transport.services, "127.0.0.1")
        self._names = (f"export {number}" for number in itertools.count())

    def remote(self, tensor: torch.Tensor) -> RemoteRegion:
        name = next(self._names)
        self.transport.export(name, [tensor])
        return RemoteRegion(self.server.address, name, 0, (0,) * tensor.dim(), tuple(tensor.shape), tensor.dtype)

    def close(self) -> None:
        self.transport.close()
        self.server.close()


class _HalfRemote(OneSidedTransport):
    def __init__(self) -> None:
        self._owner = _Owner()
        self._reader, self._mapped = NetworkTransport(self._owner.secret), MappedTransport(threads=2)
        self._turn = itertools.cycle((True, False))

    @property
    def capabilities(self) -> Capabilities:
        return self._mapped.capabilities

    def prepare(self, copies: Sequence[Copy]) -> CopyProgram:
        moves = []
        for index, copy in enumerate(copies):
            check_copy(copy, f"copy {index}")
            sources = tuple(self._placed(source) for source in copy.sources)
            moves.append(Move(sources, copy.target, copy.op, copy.divisor))
        return prepare(moves, self._mapped, self._reader, bucket_size=1 << 20)

    def _placed(self, source: torch.Tensor) -> Source:
        return self._owner.remote(source) if source.device.type == "cpu" and next(self._turn) else source

    def close(self) -> None:
        self._reader.close()
        self._owner.close()
        self._mapped.close()


class TestJointProgram(OneSidedTransportContract):
    @pytest.fixture
    def transport(self) -> Iterator[OneSidedTransport]:
        with contextlib.closing(_HalfRemote()) as transport:
            yield transport


@pytest.fixture
def owner() -> Iterator[_Owner]:
    with contextlib.closing(_Owner()) as owner:
        yield owner


@pytest.fixture
def reader(owner: _Owner) -> Iterator[NetworkTransport]:
    with contextlib.closing(NetworkTransport(owner.secret)) as reader:
        yield reader


@pytest.fixture
def mapped() -> Iterator[MappedTransport]:
    with contextlib.closing(MappedTransport(threads=1)) as mapped:
        yield mapped


@pytest.mark.parametrize("scratch", [16, 100, 4096, 1 << 20])
def test_contributions_are_combined_in_bounded_memory(
    owner: _Owner, reader: NetworkTransport, mapped: MappedTransport, monkeypatch: pytest.MonkeyPatch, scratch: int
) -> None:
    monkeypatch.setattr(joint, "SCRATCH_BYTES", scratch)
    bounds: list[int] = []
    rounds = joint._rounds

    def watched(moves: Sequence[Move], scratch_bytes: int, device: torch.device) -> Iterator[tuple[list[Read], list[Copy]]]:
        assert device.type == "cpu"
        for reads, copies in rounds(moves, scratch_bytes, device):
            bounds.extend(read.target.untyped_storage().nbytes() for read in reads)
            yield reads, copies

    monkeypatch.setattr(joint, "_rounds", watched)
    parts = [torch.randint(-1000, 1000, (7, 5, 3), dtype=torch.int64) for _ in range(4)]
    scalars = [torch.tensor(float(number)) for number in range(3)]
    target, scalar = torch.zeros(7, 5, 3, dtype=torch.int64), torch.zeros(())
    sources = (owner.remote(parts[0]), parts[1], owner.remote(parts[2]), parts[3])
    moves = [Move(sources, target, "sum"), Move((scalars[0], *map(owner.remote, scalars[1:])), scalar, "max")]
    program = prepare(moves, mapped, reader)
    for _ in range(2):
        assert program.run() == program.nbytes == sum(part.nbytes for part in (*parts, *scalars))
        assert torch.equal(target, sum(parts))
        assert scalar == 2.0
        parts[0] += 1
        parts[3] -= 5
    # One element of each remote contribution is the least that can be combined.
    assert max(bounds) <= max(scratch, 32)
    assert len(set(bounds)) == 1


def test_without_remote_sources_it_is_the_mapped_program(mapped: MappedTransport) -> None:
    source, target = torch.arange(6), torch.zeros(6, dtype=torch.int64)
    program = prepare([Move((source,), target)], mapped, None)
    assert isinstance(program, type(mapped.prepare([])))
    program.run()
    assert torch.equal(source, target)


def test_a_remote_source_needs_a_network(owner: _Owner, mapped: MappedTransport) -> None:
    with pytest.raises(NoTransportError, match="no network"):
        prepare([Move((owner.remote(torch.ones(3)),), torch.zeros(3))], mapped, None)


def test_what_the_network_does_not_write_to_is_copied_there(owner: _Owner, reader: NetworkTransport) -> None:
    """The device is one that holds nothing, so the copies that would go there are looked at."""
    source, target = torch.arange(100.0), torch.zeros(100, device="meta")
    handed: list[torch.Tensor] = []

    class Device(MappedTransport):
        def prepare(self, copies: Sequence[Copy]) -> CopyProgram:  # type: ignore[override]
            class Handed(CopyProgram):
                nbytes = sum(copy.sources[0].nbytes for copy in copies)

                def run(self) -> int:
                    assert all(copy.target.is_meta and not copy.sources[0].is_meta for copy in copies)
                    handed.extend(copy.sources[0].clone() for copy in copies)
                    return self.nbytes

            return Handed()

    program = prepare([Move((owner.remote(source),), target)], Device(1), reader)
    assert program.run() == source.nbytes
    assert torch.equal(torch.cat(handed), source)
    assert program.unfinished() == frozenset()


def test_an_owner_that_is_gone_is_an_error(owner: _Owner, reader: NetworkTransport, mapped: MappedTransport) -> None:
    here, target, combined = torch.ones(3), torch.zeros(2, 3), torch.zeros(3)
    remote = owner.remote(torch.ones(3))
    program = prepare([Move((remote,), target[0]), Move((here,), target[1]), Move((remote, here), combined, "sum")], mapped, reader)
    assert program.run() == 4 * 12
    assert combined.tolist() == [2.0, 2.0, 2.0]
    owner.close()
    with pytest.raises((PeerLostError, HandleExpiredError)):
        program.run()


def test_after_an_owner_was_lost_it_is_known_what_is_whole(reader: NetworkTransport, mapped: MappedTransport, owner: _Owner) -> None:
    source, targets = torch.arange(100.0), [torch.zeros(100) for _ in range(3)]
    program = prepare(
        [
            Move((owner.remote(source), source), targets[0], "sum"),
            Move((source,), targets[1]),
            Move((owner.remote(source),), targets[2]),
        ],
        mapped,
        reader,
    )
    program.run()
    assert program.unfinished() == frozenset()
    for target in targets:
        target.zero_()
    owner.close()
    with pytest.raises((PeerLostError, HandleExpiredError)):
        program.run()
    assert program.unfinished() == {0, 2}
    assert torch.equal(targets[1], source)
