"""Copies between tensors that this process has mapped: the transport of one host.

Every region goes from the source's memory to the target's once, without a buffer in between.

The calls that do it were chosen by measurement, on two cores that the memory's bandwidth keeps busy. A piece large enough
to matter is one ``numpy.copyto``: it moves contiguous runs with libc's ``memmove``, lets go of the GIL, allocates nothing
and stays on its own thread. torch's ``copy_`` is as fast on an idle machine, but starts OpenMP threads in each of ours, and
waiting for those on a busy one costs up to twenty times the copy. Small pieces go by hundreds into one
``torch._foreach_copy_``, 1 us a piece of 4 KiB, which leaves the GIL alone between them.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeAlias

import numpy as np
import torch

from etha_ray.errors import TransferError, WrongDeviceError
from etha_ray.transport.base import Capabilities, Copy, CopyProgram, OneSidedTransport, check_copy

_Array: TypeAlias = "np.ndarray[Any, Any]"
_Dims: TypeAlias = list[tuple[int, int, int]]  # size, source stride, target stride; strides in elements

_PIECE_BYTES = 512 << 10  # measured best of 128 KiB to 4 MiB, by one thread and by two
_SMALL_BYTES = 32 << 10  # from here on a call of its own costs little; below it torch never starts OpenMP threads
_GROUP_BYTES = 1 << 20
_GROUP_PIECES = 256
_LINE_BYTES = 64

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64, 16: torch.complex128}
_WIDER = (torch.complex128, torch.int64, torch.int32, torch.int16)


class MappedTransport(OneSidedTransport):
    """Runs copy programs over ``threads`` threads: the caller's own and ``threads - 1`` that all programs share.

    Programs may run at the same time; each always has its caller's thread, so none waits for another to end.
    """

    def __init__(self, threads: int) -> None:
        """Raises ValueError when ``threads`` is less than 1."""
        if threads < 1:
            raise ValueError(f"threads is {threads}; a transport needs at least 1")
        self.threads = threads
        self._lock = threading.Lock()
        self._closed = False
        self._pool = ThreadPoolExecutor(threads - 1, thread_name_prefix="etha-ray-copy") if threads > 1 else None

    @property
    def capabilities(self) -> Capabilities:
        return Capabilities(same_host_only=True, devices=frozenset({"cpu"}), needs_staging=False, one_sided=True)

    def prepare(self, copies: Sequence[Copy]) -> MappedProgram:
        for index, (source, target) in enumerate(copies):
            check_copy(source, target, f"copy {index}")
            for tensor in (source, target):
                if tensor.device.type != "cpu":
                    raise WrongDeviceError(f"copy {index}: a {tensor.device} tensor on the mapped transport, which moves cpu tensors")
        return MappedProgram(self, copies)

    def close(self) -> None:
        """As in the interface: runs under way end normally, on their caller's thread."""
        with self._lock:
            self._closed = True
        if self._pool is not None:
            self._pool.shutdown()

    def __repr__(self) -> str:
        return f"MappedTransport(threads={self.threads}{', closed' if self._closed else ''})"


class MappedProgram(CopyProgram):
    """What `MappedTransport.prepare` makes."""

    def __init__(self, transport: MappedTransport, copies: Sequence[Copy]) -> None:
        self._transport = transport
        self._nbytes = sum(source.nbytes for source, _ in copies)
        pieces = [piece for source, target in copies if source.numel() for piece in _pieces(source, target)]
        self._large: list[tuple[_Array, _Array]] = [
            (target.numpy(), source.numpy()) for source, target in pieces if target.nbytes >= _SMALL_BYTES
        ]
        self._groups = list(_grouped([(source, target) for source, target in pieces if target.nbytes < _SMALL_BYTES]))
        self._steps = len(self._large) + len(self._groups)

    @property
    def nbytes(self) -> int:
        return self._nbytes

    def run(self) -> int:
        transport = self._transport
        turns = itertools.count()  # handing out a number is one step of the interpreter: no two threads get the same
        with transport._lock:
            if transport._closed:
                raise TransferError("the transport was closed; make a new one and prepare the copies again")
            helpers = []
            if transport._pool is not None:
                helpers = [transport._pool.submit(self._work, turns) for _ in range(min(transport.threads, self._steps) - 1)]
        self._work(turns)
        for helper in helpers:
            # One that has not begun, because other programs keep the threads busy, has nothing left to do.
            if not helper.cancel():
                helper.result()
        return self._nbytes

    def _work(self, turns: Iterator[int]) -> None:
        large, groups, steps = self._large, self._groups, self._steps
        while (turn := next(turns)) < steps:
            if turn < len(large):
                np.copyto(*large[turn])
            else:
                torch._foreach_copy_(*groups[turn - len(large)])

    def __repr__(self) -> str:
        return f"MappedProgram({self._nbytes} bytes in {len(self._large)} pieces and {len(self._groups)} groups of small ones)"


def _pieces(source: torch.Tensor, target: torch.Tensor) -> list[Copy]:
    """The copy as pieces of equal bits: dimensions merged, elements as wide as they can be, big ones cut."""
    source, target = _as_bits(source), _as_bits(target)
    if source.is_contiguous() and target.is_contiguous():
        source, target = source.view(-1), target.view(-1)
    else:
        source, target = _widened(*_merged(source, target))
    pieces: list[Copy] = []
    if target.dim() > 1 and target.stride(-1) == 1 and source.stride(-1) != 1:
        # A transposition touches a line of the source for each element. Strips one target line wide use each source
        # line up while it is cached: five times as fast as row after row.
        width = _LINE_BYTES // source.itemsize
        for strip in zip(torch.split(source, width, -1), torch.split(target, width, -1), strict=True):
            _cut(*strip, pieces)
    else:
        _cut(source, target, pieces)
    return pieces


def _cut(source: torch.Tensor, target: torch.Tensor, pieces: list[Copy]) -> None:
    """Append ``source -> target``, cut along the leading dimensions into pieces of at most `_PIECE_BYTES`."""
    if target.nbytes <= _PIECE_BYTES:
        pieces.append((source, target))
        return
    rows = _PIECE_BYTES // (target.nbytes // len(target))
    if rows:
        pieces.extend(zip(torch.split(source, rows), torch.split(target, rows), strict=True))
        return
    for inner in zip(source, target, strict=True):
        _cut(*inner, pieces)


def _as_bits(tensor: torch.Tensor) -> torch.Tensor:
    """The same memory as a type that both torch and NumPy copy bit for bit (NumPy has no bfloat16 nor float8)."""
    return tensor.detach().view(_BITS[tensor.dtype.itemsize])


def _merged(source: torch.Tensor, target: torch.Tensor) -> Copy:
    """The same elements over as few dimensions as the strides of both allow, at least one, in the target's order."""
    dims: _Dims = sorted(
        (dim for dim in zip(target.shape, source.stride(), target.stride(), strict=True) if dim[0] > 1),
        key=lambda dim: (dim[2], dim[1]),
        reverse=True,
    )
    merged: _Dims = []
    for size, source_step, target_step in dims:
        if merged and merged[-1][1] == size * source_step and merged[-1][2] == size * target_step:
            merged[-1] = (merged[-1][0] * size, source_step, target_step)
        else:
            merged.append((size, source_step, target_step))
    sizes, source_steps, target_steps = zip(*(merged or [(1, 1, 1)]), strict=True)
    return source.as_strided(sizes, source_steps), target.as_strided(sizes, target_steps)


def _widened(source: torch.Tensor, target: torch.Tensor) -> Copy:
    """The same bytes in wider elements where the innermost runs of both allow: narrow runs cost per element."""
    if source.stride(-1) == 1 and target.stride(-1) == 1:
        for dtype in _WIDER:
            if dtype.itemsize > source.itemsize and _can_widen(source, dtype) and _can_widen(target, dtype):
                return _merged(source.view(dtype), target.view(dtype))
    return source, target


def _can_widen(tensor: torch.Tensor, dtype: torch.dtype) -> bool:
    ratio = dtype.itemsize // tensor.itemsize
    places = (tensor.shape[-1], tensor.storage_offset(), *tensor.stride()[:-1])
    return all(place % ratio == 0 for place in places) and tensor.data_ptr() % dtype.itemsize == 0


def _grouped(pieces: Sequence[Copy]) -> Iterator[tuple[list[torch.Tensor], list[torch.Tensor]]]:
    """Targets and sources of small pieces, by groups of about `_GROUP_BYTES` and at most `_GROUP_PIECES`."""
    targets: list[torch.Tensor] = []
    sources: list[torch.Tensor] = []
    size = 0
    for source, target in pieces:
        targets.append(target)
        sources.append(source)
        size += target.nbytes
        if size >= _GROUP_BYTES or len(targets) == _GROUP_PIECES:
            yield targets, sources
            targets, sources, size = [], [], 0
    if targets:
        yield targets, sources
