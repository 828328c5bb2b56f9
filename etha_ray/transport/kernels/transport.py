"""Copies of a GPU's memory: one launch for all that are bytes or casts between floats, torch's own calls for the rest.

The launch reads a table of regions that was put into the device's memory when the program was prepared, so a run hands over a
few addresses. torch's calls, one per tensor, are also what everything goes through where kernels cannot be compiled.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from etha_ray.accelerator import Accelerator, Lane
from etha_ray.dtypes import CombineOp
from etha_ray.errors import TransferError, WrongDeviceError
from etha_ray.transport.base import Capabilities, Copy, CopyProgram, OneSidedTransport, check_copy
from etha_ray.transport.computing import combine, valued
from etha_ray.transport.cutting import Views, as_bits, slabs
from etha_ray.transport.kernels.source import COPY_REGIONS
from etha_ray.transport.kernels.table import Region, regions_of, table_of

_EXAMPLE = 16
"""Rows and columns of what calls are rehearsed with."""

_SCRATCH_ELEMENTS = 16 << 20
"""As many elements of scratch does a combination take, and what torch copies from one device to another by way of a buffer."""


class KernelTransport(OneSidedTransport):
    """Copies within ``accelerator``'s memory, between it and the CPU's, and by way of ``host`` what is on the CPU alone.

    Closing it closes ``host``.
    """

    def __init__(self, accelerator: Accelerator, host: OneSidedTransport, kernels: bool | None = None) -> None:
        """``kernels``: False has torch do everything; None, the default, only where ``accelerator`` cannot launch any."""
        self.accelerator = accelerator
        self._host = host
        self._kernels = accelerator.launches if kernels is None else kernels
        self._closed = False
        self.torch_lane = accelerator.lane()
        """Where all programs that have torch do something run, unless they are told where."""
        self._rehearsed: frozenset[_TorchCall] = frozenset()
        self._rehearsing = threading.Lock()

    @property
    def capabilities(self) -> Capabilities:
        return Capabilities(
            same_host_only=True,
            devices=frozenset({"cpu", "cuda"}),
            needs_staging=False,
            one_sided=True,
            casts=True,
            combines=True,
        )

    def prepare(self, copies: Sequence[Copy]) -> KernelProgram:
        """As in the interface.

        Raises:
            TransferError: the device has no memory for the table, or does not take the kernel.
        """
        for index, copy in enumerate(copies):
            check_copy(copy, f"copy {index}")
            for tensor in (*copy.sources, copy.target):
                if tensor.device.type not in ("cpu", self.accelerator.device.type):
                    raise WrongDeviceError(
                        f"copy {index}: a {tensor.device} tensor on the transport of {self.accelerator.device}, which moves that device's"
                        " tensors and the CPU's"
                    )
        program = KernelProgram(self, copies)
        self._rehearse(program)
        return program

    def close(self) -> None:
        """As in the interface: what was handed over is still done."""
        self._closed = True
        self._host.close()

    def check_open(self) -> None:
        """Raise `TransferError` if it was closed."""
        if self._closed:
            raise TransferError("the transport was closed; make a new one and prepare the copies again")

    def _rehearse(self, program: KernelProgram) -> None:
        """Have torch make each kind of the program's calls once, on memory of no importance; each only for the first time.

        A device loads a kernel when it is first launched, and may wait then for all that it has under way: for messages, too, that wait
        for another device, which may be waiting for this one.
        """
        if program.by_torch <= self._rehearsed:
            return  # it may be amid messages, and must not wait for another thread then
        with self._rehearsing:
            lane = self.torch_lane
            examples = [call.example(self.accelerator) for call in program.by_torch - self._rehearsed]
            with lane.current():
                for step in (step for example in examples for step in _torch_steps(example)):
                    step()
            lane.wait()
            self._rehearsed |= program.by_torch  # another set: it is looked at without the lock

    def __repr__(self) -> str:
        how = "by kernels" if self._kernels else "by torch"
        return f"KernelTransport({self.accelerator!r} {how}, {self._host!r}{', closed' if self._closed else ''})"

    # What becomes of one copy.

    def is_for_host(self, copy: Copy) -> bool:
        """Whether ``copy`` has nothing to do with the device."""
        tensors = (*copy.sources, copy.target)
        return self.accelerator.device.type != "cpu" and all(tensor.device.type == "cpu" for tensor in tensors)

    def regions(self, copy: Copy) -> list[Region] | None:
        """What the kernel does for ``copy``; None if it cannot."""
        (source, *others), target = copy.sources, copy.target
        if not self._kernels or others or copy.op is not None:
            return None
        if not all(self.accelerator.reaches(tensor.device) for tensor in (source, target)):
            return None
        return regions_of(source, target)


class KernelProgram(CopyProgram):
    """What `KernelTransport.prepare` makes."""

    def __init__(self, transport: KernelTransport, copies: Sequence[Copy]) -> None:
        self._transport = transport
        self._accelerator = accelerator = transport.accelerator
        self._copies = tuple(copies)  # keeps the memory that the table has addresses of
        self._nbytes = sum(source.nbytes for copy in copies for source in copy.sources)
        self._steps: list[Callable[[], object]] = []
        self._host_places: list[int] = []
        self.by_torch: set[_TorchCall] = set()
        """What it has torch do, by kind."""
        regions: list[Region] = []
        for place, copy in enumerate(copies):
            if not copy.target.numel():
                continue
            if transport.is_for_host(copy):
                self._host_places.append(place)
            elif (found := transport.regions(copy)) is not None:
                regions += found
            else:
                self._steps += _torch_steps(copy)
                self.by_torch.add(_TorchCall.of(copy))
        self._regions = len(regions)
        if regions:
            table, first = table_of(regions)
            self._tiles = int(first[-1])
            self._table, self._first = accelerator.upload(table), accelerator.upload(first)
            accelerator.load(COPY_REGIONS)
        self._host = transport._host.prepare([copies[place] for place in self._host_places])
        # torch keeps scratch for each lane it was taken on: what takes any shares one.
        self._lane = transport.torch_lane if self._steps else accelerator.lane()
        self._begun = threading.Event()
        self._host_done = False

    @property
    def nbytes(self) -> int:
        return self._nbytes

    def enqueue(self, lane: Lane) -> None:
        """Hand the copies over to ``lane``, which does them after what it has been handed before; keep the program until they are done.

        Copies between the device and the CPU are done when this returns, and so are those of the CPU alone.

        Raises:
            TransferError: the transport was closed, or the device does not take them.
        """
        self._transport.check_open()
        self._hand_over(lane)
        self._host.run()

    def run(self) -> int:
        """As in the interface; it also waits for what torch's current lane has been handed before.

        Raises:
            TransferError: the transport was closed, or something failed on the device.
        """
        self._begun.clear()
        self._host_done = False
        self._transport.check_open()
        self._begun.set()
        self._lane.after(self._accelerator.current())
        with _waited_for(self._lane):
            self._hand_over(self._lane)
            self._host.run()
            self._host_done = True
        return self._nbytes

    def unfinished(self) -> frozenset[int] | None:
        """As in the interface. What fails on a device leaves open what was done there, so all that is done there counts."""
        if not self._begun.is_set():
            return frozenset()
        half = self._host.unfinished()
        on_host = range(len(self._host_places)) if half is None else half
        left = set() if self._host_done else {self._host_places[place] for place in on_host}
        return frozenset(left | set(range(len(self._copies))) - set(self._host_places))

    def _hand_over(self, lane: Lane) -> None:
        if self._regions:
            blocks = min(self._tiles, self._accelerator.width)
            self._accelerator.launch(COPY_REGIONS, blocks, (self._table, self._first, self._regions, self._tiles), lane)
        if self._steps:
            with lane.current():
                for step in self._steps:
                    step()

    def __repr__(self) -> str:
        shown = f"{self._regions} regions, {len(self._steps)} calls of torch and {len(self._host_places)} copies on the CPU"
        return f"KernelProgram({self._nbytes} bytes in {shown})"


@contextlib.contextmanager
def _waited_for(lane: Lane) -> Iterator[None]:
    """Nothing of ours is still being written when this is left, whichever way."""
    try:
        yield
    except BaseException:
        with contextlib.suppress(TransferError):  # the first error says more
            lane.wait()
        raise
    lane.wait()


@dataclass(frozen=True)
class _TorchCall:
    """What tells apart the kernels that torch has for a copy."""

    sources: tuple[torch.dtype, ...]
    target: torch.dtype
    op: CombineOp | None
    divisor: int
    contiguous: bool

    @classmethod
    def of(cls, copy: Copy) -> _TorchCall:
        contiguous = all(tensor.is_contiguous() for tensor in (*copy.sources, copy.target))
        return cls(tuple(source.dtype for source in copy.sources), copy.target.dtype, copy.op, copy.divisor, contiguous)

    def example(self, accelerator: Accelerator) -> Copy:
        """One such, of the device's memory alone."""
        source, *others = (_square(dtype, accelerator) for dtype in self.sources)
        given = source if self.contiguous else source.t()
        return Copy((given, *others), _square(self.target, accelerator), self.op, self.divisor)


def _square(dtype: torch.dtype, accelerator: Accelerator) -> torch.Tensor:
    return accelerator.empty(_EXAMPLE * _EXAMPLE * dtype.itemsize).view(dtype).view(_EXAMPLE, _EXAMPLE)


def _torch_steps(copy: Copy) -> list[Callable[[], object]]:
    """``copy`` as calls of torch, which go to the lane that is current when they are made."""
    one_device = all(source.device == copy.target.device for source in copy.sources)
    views: Views = (copy.target, *(valued(source, copy.target) for source in copy.sources))
    if copy.op is not None:
        return [partial(combine, part, copy.op, copy.divisor) for part in slabs(views, _SCRATCH_ELEMENTS)]
    if copy.is_plain:
        views = tuple(map(as_bits, views))
    # Within a device nothing passes through a buffer, so one call does it.
    parts = [tuple(view.detach() for view in views)] if one_device else slabs(views, _SCRATCH_ELEMENTS)
    return [partial(target.copy_, source) for target, source in parts]
