"""One program over two transports: what this host's memory holds is copied, what other hosts hold is read.

A target that combines contributions of which some are remote is made in rounds: the remote ones are read into scratch memory,
a bounded part at a time, and combined from there with those at hand. The scratch memory is where the target is, or the CPU's where the
network does not write to that device; what goes there without being combined then takes the same way.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

import torch

from etha_ray.dtypes import CombineOp
from etha_ray.errors import NoTransportError
from etha_ray.transport.base import Copy, CopyProgram, OneSidedTransport
from etha_ray.transport.buckets import DEFAULT_BUCKET_SIZE
from etha_ray.transport.network import NetworkTransport, Read, RemoteRegion

Source: TypeAlias = torch.Tensor | RemoteRegion
"""Memory that this process has mapped, or a box of a tensor that another agent exported."""

SCRATCH_BYTES = 64 << 20
"""Memory that one program's rounds share, for what they have read and not yet combined."""

_ALIGNMENT = 16


@dataclass(frozen=True, slots=True)
class Move:
    """A `Copy` whose sources may be remote."""

    sources: tuple[Source, ...]
    target: torch.Tensor
    op: CombineOp | None = None
    divisor: int = 1
    name: str = ""


def prepare(
    moves: Sequence[Move], mapped: OneSidedTransport, network: NetworkTransport | None, bucket_size: int = DEFAULT_BUCKET_SIZE
) -> CopyProgram:
    """The program that does ``moves``. Without remote sources it is the mapped transport's own.

    Raises:
        NoTransportError: a source is remote, and there is no network.
        TensorMismatchError, WrongDeviceError, ConfigError, HandleExpiredError, PeerLostError, TransferError: as the
            transports' own ``prepare``.
    """
    copies: list[Copy] = []
    reads: list[Read] = []
    mixed: list[Move] = []
    places: tuple[list[int], list[int], list[int]] = ([], [], [])  # of these three, among the moves
    for place, move in enumerate(moves):
        if all(isinstance(source, torch.Tensor) for source in move.sources):
            copies.append(_copy(move, {}))
            places[0].append(place)
        elif network is None:
            raise NoTransportError("a source is on another host, and this agent has no network: give it the address of its host")
        elif move.op is None and isinstance(move.sources[0], RemoteRegion) and move.target.device.type in network.capabilities.devices:
            reads.append(Read(move.sources[0], move.target, move.name))
            places[1].append(place)
        else:
            mixed.append(move)
            places[2].append(place)
    local = mapped.prepare(copies)
    if network is None or (not reads and not mixed):
        return local
    beside: dict[torch.device, list[Move]] = {}
    for move in mixed:
        written = move.target.device.type in network.capabilities.devices
        beside.setdefault(move.target.device if written else torch.device("cpu"), []).append(move)
    rounds = [
        _Round(network.prepare(fetch, bucket_size), mapped.prepare(combine))
        for device, group in beside.items()
        for fetch, combine in _rounds(group, SCRATCH_BYTES, device)
    ]
    return _JointProgram(local, network.prepare(reads, bucket_size), rounds, places)


@dataclass(frozen=True)
class _Round:
    fetch: CopyProgram
    combine: CopyProgram


class _JointProgram(CopyProgram):
    def __init__(
        self, local: CopyProgram, remote: CopyProgram, rounds: Sequence[_Round], places: tuple[list[int], list[int], list[int]]
    ) -> None:
        self._local, self._remote, self._rounds, self._places = local, remote, tuple(rounds), places
        self._failed: set[CopyProgram] = set()
        # What a round combines counts once, though the remote part of it is moved twice.
        self._nbytes = local.nbytes + remote.nbytes + sum(each.combine.nbytes for each in rounds)
        self._turn = threading.Lock()

    @property
    def nbytes(self) -> int:
        return self._nbytes

    def run(self) -> int:
        with self._turn:  # the rounds share their scratch memory
            errors: dict[CopyProgram, BaseException] = {}
            copying = threading.Thread(target=_run, args=(self._local, errors), name="etha-ray copy", daemon=True)
            copying.start()
            _run(self._remote, errors)
            copying.join()
            for each in self._rounds:
                if errors:
                    break
                _run(each.fetch, errors)
                if not errors:
                    _run(each.combine, errors)
            self._failed = set(errors)
            for error in errors.values():
                raise error
        return self._nbytes

    def unfinished(self) -> frozenset[int] | None:
        """As in the interface: what combines remote contributions comes last, and is unfinished after any error."""
        copied, read, mixed = self._places
        left = set(mixed if self._failed else ())
        for program, places in ((self._local, copied), (self._remote, read)):
            if program in self._failed:
                half = program.unfinished()
                left.update(places if half is None else (places[place] for place in half))
        return frozenset(left)


def _run(program: CopyProgram, errors: dict[CopyProgram, BaseException]) -> None:
    try:
        program.run()
    except BaseException as error:  # raised again on the thread that waits
        errors[program] = error


# --- rounds -------------------------------------------------------------------------------------------------------------


def _rounds(moves: Sequence[Move], scratch_bytes: int, device: torch.device) -> Iterator[tuple[list[Read], list[Copy]]]:
    """What to read and then to combine, round by round; all rounds use the same scratch memory, on ``device``."""
    pieces = [piece for move in moves for piece in _pieces(move, scratch_bytes)]
    needed = [_scratch_of(piece) for piece in pieces]
    scratch = torch.empty(max([min(scratch_bytes, sum(needed)), *needed]), dtype=torch.uint8, device=device)
    used = 0
    reads: list[Read] = []
    copies: list[Copy] = []
    for piece in pieces:
        if used + _scratch_of(piece) > scratch.nbytes:
            yield reads, copies
            used, reads, copies = 0, [], []
        fetched: dict[int, torch.Tensor] = {}
        for number, source in enumerate(piece.sources):
            if isinstance(source, RemoteRegion):
                size = piece.target.numel() * source.dtype.itemsize
                fetched[number] = scratch[used : used + size].view(source.dtype).view(piece.target.shape)
                reads.append(Read(source, fetched[number], piece.name))
                used += _aligned(size)
        copies.append(_copy(piece, fetched))
    if copies:
        yield reads, copies


def _pieces(move: Move, scratch_bytes: int) -> Iterator[Move]:
    """``move`` cut along its leading dimensions until each part fits the scratch memory, or is one element."""
    if not move.target.numel():
        return
    if _scratch_of(move) <= scratch_bytes or move.target.numel() == 1:
        yield move
        return
    dim = next(dim for dim, size in enumerate(move.target.shape) if size > 1)
    size = move.target.shape[dim]
    rows = max(1, min(size - 1, size * scratch_bytes // _scratch_of(move)))
    for start in range(0, size, rows):
        yield from _pieces(narrowed(move, dim, start, min(rows, size - start)), scratch_bytes)


def narrowed(move: Move, dim: int, start: int, size: int) -> Move:
    """The part of ``move`` that lies in ``size`` rows of dimension ``dim``, from ``start`` on."""

    def cut(source: Source) -> Source:
        if isinstance(source, torch.Tensor):
            return source.narrow(dim, start, size)
        first, sizes = list(source.start), list(source.size)
        first[dim], sizes[dim] = first[dim] + start, size
        return replace(source, start=tuple(first), size=tuple(sizes))

    return replace(move, sources=tuple(map(cut, move.sources)), target=move.target.narrow(dim, start, size))


def _scratch_of(move: Move) -> int:
    remote = (source.dtype.itemsize for source in move.sources if isinstance(source, RemoteRegion))
    return sum(_aligned(move.target.numel() * itemsize) for itemsize in remote)


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT


def _copy(move: Move, fetched: dict[int, torch.Tensor]) -> Copy:
    sources = (fetched.get(number, source) for number, source in enumerate(move.sources))
    return Copy(tuple(source for source in sources if isinstance(source, torch.Tensor)), move.target, move.op, move.divisor, move.name)
