"""What every transport is: it moves bytes between buffers (and peers), and knows nothing of layouts, plans or batches.

`OneSidedTransport` reads and writes both ends itself: whoever runs the program has the source and the target mapped.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch

from etha_ray.errors import TensorMismatchError

Copy: TypeAlias = tuple[torch.Tensor, torch.Tensor]
"""A source view and the target view of the same shape and dtype that its bytes go to."""


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


class CopyProgram(ABC):
    """A fixed list of copies, prepared once and run any number of times.

    Holds references to the views it was prepared from, so their memory stays mapped while the program lives.
    """

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Bytes that one run moves."""

    @abstractmethod
    def run(self) -> int:
        """Copy every source to its target, and return the bytes moved; it has all arrived when this returns.

        The copies of one run are done in no particular order, several at once. Sources must not be written meanwhile; a
        target that overlaps a source or another target of the same program holds bytes of either. Nothing is
        allocated.

        Different programs may run at the same time on different threads; so may one program, to no use.

        Raises:
            TransferError: the transport was closed. The targets may hold a mix of old and new bytes.
        """


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
            TensorMismatchError: a source and its target differ in shape or dtype, a target is expanded (its elements
                share memory), or a view is lazily conjugated or negated.
            WrongDeviceError: a tensor is on a device that this transport does not move.
        """

    @abstractmethod
    def close(self) -> None:
        """Stop the transport's threads once their running copies end; programs cannot be run after. May be called twice."""


def check_copy(source: torch.Tensor, target: torch.Tensor, name: str) -> None:
    """Raise `TensorMismatchError` unless ``target`` can take ``source`` byte for byte; ``name`` stands in the message."""
    if source.shape != target.shape or source.dtype != target.dtype:
        raise TensorMismatchError(
            f"{name}: source is {tuple(source.shape)} {source.dtype}, target is {tuple(target.shape)} {target.dtype}; "
            "both sides must hold the same tensor"
        )
    if any(tensor.is_conj() or tensor.is_neg() for tensor in (source, target)):
        raise TensorMismatchError(
            f"{name}: a lazily conjugated or negated view has other bytes than values; use .resolve_conj().resolve_neg()"
        )
    if math.prod(target.shape) and any(step == 0 and size > 1 for size, step in zip(target.shape, target.stride(), strict=True)):
        raise TensorMismatchError(f"{name}: target of stride {target.stride()} has elements that share memory; receive into .contiguous()")
