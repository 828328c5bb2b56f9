"""What every transport is: it moves bytes between buffers (and peers), and knows nothing of layouts, plans or batches.

`OneSidedTransport` reads and writes both ends itself: whoever runs the program has the source and the target mapped.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from etha_ray.dtypes import CASTABLE, CombineOp, combine_problem
from etha_ray.errors import TensorMismatchError


@dataclass(frozen=True, slots=True)
class Copy:
    """One view to be written, and where its values come from.

    With one source, ``target`` gets its values: byte for byte where the dtypes agree, else cast as ``Tensor.copy_`` does.
    With several, which then have one dtype, it gets what `op` and ``divisor`` make of them: combined in the order given, in
    `combine_dtype`, rounded to the sources' dtype, and cast to the target's where that is another.
    """

    sources: tuple[torch.Tensor, ...]
    target: torch.Tensor
    """Of the sources' shape."""
    op: CombineOp | None = None
    """What several sources are combined by; None with one source."""
    divisor: int = 1
    """What the combined values are divided by: the number of sources makes an average of a sum."""
    name: str = ""
    """What `IntegrityError` calls it."""

    @property
    def is_plain(self) -> bool:
        """Whether bytes are moved as they are, and nothing is computed."""
        return self.op is None and self.sources[0].dtype == self.target.dtype


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What a transport can do, as data, so that choosing one needs no instance and no trial."""

    same_host_only: bool
    """Both ends must be on one host, and see each other's memory."""
    devices: frozenset[str]
    """Device types it moves: ``"cpu"``, ``"cuda"``."""
    needs_staging: bool
    """Bytes pass through a buffer of the transport's own."""
    one_sided: bool
    """One end moves the bytes alone; otherwise both must call at the same time."""
    casts: bool
    """Source and target may differ in dtype."""
    combines: bool
    """A target may be made of several sources."""


class CopyProgram(ABC):
    """A fixed list of copies, prepared once and run any number of times.

    Holds references to the views it was prepared from, so their memory stays mapped while the program lives.
    """

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Bytes that one run reads from its sources."""

    @abstractmethod
    def run(self) -> int:
        """Write every target, and return the bytes read; it has all arrived when this returns.

        The copies of one run are done in no particular order, several at once. Sources must not be written meanwhile; a
        target that overlaps a source or another target of the same program holds bytes of either. Nothing is
        allocated but, to combine sources, scratch of a fixed size for each thread.

        Different programs may run at the same time on different threads; so may one program, to no use.

        Raises:
            TransferError: the transport was closed. The targets may hold a mix of old and new bytes.
        """

    def unfinished(self) -> frozenset[int] | None:
        """Which of the copies, by position among those prepared, the last run may have left half written, after it raised.

        None where that is not known: any of them.
        """
        return None


class NoProgram(CopyProgram):
    """Copies nothing."""

    @property
    def nbytes(self) -> int:
        return 0

    def run(self) -> int:
        return 0


class OneSidedTransport(ABC):
    """Moves bytes between memory that this process has mapped, alone."""

    @property
    @abstractmethod
    def capabilities(self) -> Capabilities:
        """The same for every instance of a class."""

    @abstractmethod
    def prepare(self, copies: Sequence[Copy]) -> CopyProgram:
        """The program that does ``copies``: all checks and all splitting are done here, once, and no byte moves.

        May be called from any thread. Empty copies are dropped; an empty list is fine.

        Raises:
            TensorMismatchError: the views of a copy differ in shape; their dtypes cannot be cast, or not be combined by this
                op; a target is expanded (its elements share memory), or shares memory with a source that is cast or
                combined; or a view is lazily conjugated or negated.
            WrongDeviceError: a tensor is on a device that this transport does not move.
        """

    @abstractmethod
    def close(self) -> None:
        """Stop the transport's threads once their running copies end; programs cannot be run after. May be called twice."""


def check_copy(copy: Copy, name: str) -> None:
    """Raise `TensorMismatchError` unless ``copy`` can be done; ``name`` stands in the message."""
    target, first = copy.target, copy.sources[0]
    for source in copy.sources:
        if source.shape != target.shape or source.dtype != first.dtype:
            raise TensorMismatchError(
                f"{name}: source is {tuple(source.shape)} {source.dtype}, target is {tuple(target.shape)} {target.dtype}; "
                "both sides must hold the same tensor"
            )
    if first.dtype != target.dtype and not {first.dtype, target.dtype} <= CASTABLE:
        raise TensorMismatchError(f"{name}: {first.dtype} cannot be cast to {target.dtype}; register the same dtype on both sides")
    if copy.op is None and (len(copy.sources) > 1 or copy.divisor != 1):
        raise TensorMismatchError(f"{name}: {len(copy.sources)} sources and divisor {copy.divisor} without an op to combine them by")
    if copy.op is not None and (problem := combine_problem(first.dtype, copy.op, copy.divisor)):
        raise TensorMismatchError(f"{name}: {problem}")
    if any(tensor.is_conj() or tensor.is_neg() for tensor in (*copy.sources, target)):
        raise TensorMismatchError(
            f"{name}: a lazily conjugated or negated view has other bytes than values; use .resolve_conj().resolve_neg()"
        )
    if math.prod(target.shape) and any(step == 0 and size > 1 for size, step in zip(target.shape, target.stride(), strict=True)):
        raise TensorMismatchError(f"{name}: target of stride {target.stride()} has elements that share memory; receive into .contiguous()")
    if not copy.is_plain and any(_meet(source, target) for source in copy.sources):
        raise TensorMismatchError(f"{name}: the target shares memory with a source that is cast or combined; use other memory")


def _meet(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether the address ranges of two tensors overlap. Memory that is mapped twice is not recognised."""
    (start, stop), (first, last) = _range(one), _range(other)
    return start < last and first < stop


def _range(tensor: torch.Tensor) -> tuple[int, int]:
    start = tensor.data_ptr()
    if not tensor.numel():
        return start, start
    last = sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride(), strict=True))
    return start, start + (last + 1) * tensor.itemsize
