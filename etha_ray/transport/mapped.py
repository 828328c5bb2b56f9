"""Copies between tensors that this process has mapped: the transport of one host.

Every region goes from the source's memory to the target's once, without a buffer in between; a cast happens in that one
copy. Only contributions that are combined go through scratch, a piece at a time, so it never grows with the tensor.

The calls that do it were chosen by measurement, on two cores that the memory's bandwidth keeps busy. A piece large enough
to matter is one ``numpy.copyto``: it moves contiguous runs with libc's ``memmove``, lets go of the GIL, allocates nothing
and stays on its own thread. torch's ``copy_`` is as fast on an idle machine, but starts OpenMP threads in each of ours, and
waiting for those on a busy one costs up to twenty times the copy. Small pieces go by hundreds into one
``torch._foreach_copy_``, 1 us a piece of 4 KiB, which leaves the GIL alone between them. NumPy has not torch's dtypes, so
casts go there too, in pieces too small for torch to start threads.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import torch

from etha_ray.errors import TransferError, WrongDeviceError
from etha_ray.transport.base import Capabilities, Copy, CopyProgram, OneSidedTransport, check_copy
from etha_ray.transport.computing import combine, valued
from etha_ray.transport.cutting import Views, computed_pieces, grouped, plain_pieces

_PIECE_BYTES = 512 << 10  # measured best of 128 KiB to 4 MiB, by one thread and by two
_SMALL_BYTES = 32 << 10  # from here on a call of its own costs little; below it torch never starts OpenMP threads
_COMPUTED_ELEMENTS = 16 << 10  # half of at::internal::GRAIN_SIZE, from which on torch starts OpenMP threads
_GROUP_BYTES = 1 << 20
_GROUP_PIECES = 256


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
        return Capabilities(same_host_only=True, devices=frozenset({"cpu"}), needs_staging=False, one_sided=True, casts=True, combines=True)

    def prepare(self, copies: Sequence[Copy]) -> MappedProgram:
        for index, copy in enumerate(copies):
            check_copy(copy, f"copy {index}")
            for tensor in (*copy.sources, copy.target):
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
        self._nbytes = sum(source.nbytes for copy in copies for source in copy.sources)
        large: list[Callable[[], object]] = []
        small: list[Views] = []
        combined: list[Callable[[], object]] = []
        for copy in copies:
            if not copy.target.numel():
                continue
            if copy.is_plain:
                for target, source in plain_pieces(copy.target, copy.sources[0], _PIECE_BYTES):
                    if target.nbytes >= _SMALL_BYTES:
                        large.append(partial(np.copyto, target.numpy(), source.numpy()))
                    else:
                        small.append((target, source))
                continue
            views = (copy.target, *(valued(source, copy.target) for source in copy.sources))
            if copy.op is None:
                small.extend(computed_pieces(views, _COMPUTED_ELEMENTS))
            else:
                combined += [partial(combine, piece, copy.op, copy.divisor) for piece in computed_pieces(views, _COMPUTED_ELEMENTS)]
        groups = [partial(torch._foreach_copy_, *group) for group in grouped(small, _GROUP_BYTES, _GROUP_PIECES)]
        self._steps: list[Callable[[], object]] = [*large, *combined, *groups]
        self._shown = f"{len(large)} pieces, {len(combined)} combined and {len(groups)} groups of small ones"

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
                helpers = [transport._pool.submit(self._work, turns) for _ in range(min(transport.threads, len(self._steps)) - 1)]
        self._work(turns)
        for helper in helpers:
            # One that has not begun, because other programs keep the threads busy, has nothing left to do.
            if not helper.cancel():
                helper.result()
        return self._nbytes

    def _work(self, turns: Iterator[int]) -> None:
        steps, count = self._steps, len(self._steps)
        while (turn := next(turns)) < count:
            steps[turn]()

    def __repr__(self) -> str:
        return f"MappedProgram({self._nbytes} bytes in {self._shown})"
