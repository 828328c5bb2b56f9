"""What a program reads of one owner: what is asked for, and how what comes is laid out here once the owner has answered."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from etha_ray.dtypes import DTYPES
from etha_ray.errors import NoTransportError, PeerLostError
from etha_ray.net import Address
from etha_ray.transport.base import Copy, check_copy
from etha_ray.transport.buckets import Bucket
from etha_ray.transport.network import wire
from etha_ray.transport.network.device import Device, check_device
from etha_ray.transport.network.given import cut_for_communicator, cut_for_streams
from etha_ray.transport.network.rounds import Rounds
from etha_ray.transport.network.runs import BucketMemory, lay_out
from etha_ray.transport.network.staging import MIN_BUCKET_SIZE

_numbers = itertools.count(1)
_SHOWN = 3


@dataclass(frozen=True, slots=True)
class RemoteRegion:
    """A box of a tensor that another agent exported."""

    address: Address
    """Of the owner's server."""
    export: str
    index: int
    """Of the tensor among the export's."""
    start: tuple[int, ...]
    size: tuple[int, ...]
    """Per dimension."""
    dtype: torch.dtype
    """The tensor's."""


@dataclass(frozen=True, slots=True)
class Read:
    """A target and where its values come from. Where the dtypes differ the values are cast, as ``Tensor.copy_`` does."""

    source: RemoteRegion
    target: torch.Tensor
    """On the CPU or the agent's device, of the region's size, of any strides."""
    name: str = ""
    """What errors call it."""


@dataclass(frozen=True)
class Layout:
    """Where what comes from one owner is put."""

    buckets: list[BucketMemory]
    """By streams."""
    rounds: Rounds | None
    """By communicator; None where nothing is."""
    describe_bucket: Callable[[int], str]
    """What the bucket of this number has of which tensors."""
    describe_message: Callable[[int], str]
    """As `describe_bucket`, of a message of the communicator's."""


class Part:
    """What comes from one owner.

    Args:
        places: the reads' positions among the program's.
        checked: all is to come with checksums.
    """

    def __init__(
        self, address: Address, reads: Sequence[Read], places: list[int], bucket_size: int, checked: bool, device: Device | None
    ) -> None:
        self.address = address
        self.places = places
        self._names = [read.name for read in reads]
        self._views = [read.target.detach() for read in reads]
        self._device = device
        able = device is not None and device.communicators is not None
        self.request = wire.Prepare(
            next(_numbers),
            bucket_size,
            [_region(read, able and device is not None and device.holds(read.target)) for read in reads],
            checked,
            device.receiving.round_size if device is not None and able else 0,
        )
        self._laid_out: tuple[wire.Prepared, Layout] | None = None

    @property
    def wire_nbytes(self) -> int:
        """Bytes that come over the network."""
        return sum(view.numel() * DTYPES[region.wire].itemsize for view, region in zip(self._views, self.request.regions, strict=True))

    @property
    def bucket_count(self) -> int:
        """How many buckets it comes in, by either way; 0 before the owner has answered."""
        if self._laid_out is None:
            return 0
        layout = self._laid_out[1]
        return len(layout.buckets) + (0 if layout.rounds is None else layout.rounds.messages)

    def lay_out(self, answer: wire.Prepared) -> Layout:
        """The layout for the owner's answer, which is the same from one connection to the next unless the owner has changed.

        Raises:
            TransferError: the device has no memory to stage it.
            PeerLostError: it is no answer to what was asked.
        """
        if self._laid_out is None or self._laid_out[0] != answer:
            self._laid_out = answer, self._lay_out(answer)
        return self._laid_out[1]

    def _lay_out(self, answer: wire.Prepared) -> Layout:
        regions, device = self.request.regions, self._device
        asked = [region.on_device for region in regions]
        if len(answer.paired) != len(asked) or any(by and not could for by, could in zip(answer.paired, asked, strict=True)):
            raise PeerLostError(f"the agent at {self.address} answered what was not asked; run the same etha_ray on both sides")
        if not MIN_BUCKET_SIZE <= answer.bucket_size <= self.request.bucket_size:
            raise PeerLostError(f"the agent at {self.address} has buckets of another size; run the same etha_ray on both sides")
        by_stream, by_rounds = ([index for index, by in enumerate(answer.paired) if by == kind] for kind in (False, True))
        rounds = None
        messages: tuple[Bucket, ...] = ()
        if by_rounds:
            if device is None or not 0 < answer.round_size <= self.request.round_size:
                raise PeerLostError(f"the agent at {self.address} has rounds that are too large; run the same etha_ray on both sides")
            messages, dtypes = cut_for_communicator(self.request, answer.paired, min(answer.bucket_size, answer.round_size))
            views = [self._views[index] for index in by_rounds]
            slot, checked = device.receiving.all[0], self.request.checked
            rounds = Rounds(device.copier, messages, views, dtypes, answer.round_size, slot, sends=False, checked=checked)
        cut, dtypes = cut_for_streams(self.request, answer.paired, answer.bucket_size)
        views = [self._views[index] for index in by_stream]
        buckets = [lay_out(bucket, views, dtypes, device, checked=self.request.checked) for bucket in cut]
        return Layout(
            buckets,
            rounds,
            partial(_describe, cut, [(regions[index], self._names[index]) for index in by_stream]),
            partial(_describe, messages, [(regions[index], self._names[index]) for index in by_rounds]),
        )

    def lacks(self, answer: wire.Prepared) -> str:
        """Why what is on both ends' devices does not go by communicator; nothing if it does, or nothing is."""
        if answer.lacks:
            return f"the agent at {self.address}: {answer.lacks}"
        if self._device is None or not any(map(self._device.holds, self._views)):
            return ""
        return self._device.lacks and f"this agent: {self._device.lacks}"

    def require(self, answer: wire.Prepared) -> None:
        """Raise `NoTransportError` unless all of it goes by communicator."""
        for region, by, name in zip(self.request.regions, answer.paired, self._names, strict=True):
            if not by:
                reason = self.lacks(answer) or "this agent has no communicators, or the tensor is not on a device at both ends"
                raise NoTransportError(
                    f"{name or f'tensor {region.index} of export {region.export!r}'} cannot go by NCCL from the agent at {self.address}"
                    f" ({reason}); use path 'auto', by which it goes by TCP"
                )


def _describe(buckets: Sequence[Bucket], regions: Sequence[tuple[wire.WireRegion, str]], number: int) -> str:
    """What the bucket has. ``regions``: those that they were cut from, and what errors call them.

    No method of the part, which has it: what refers to itself is kept, with its targets, until Python collects it.
    """
    shown = []
    for member in buckets[number].members:
        region, name = regions[member.region]
        start = [first + within for first, within in zip(region.start, member.start, strict=True)]
        shown.append(
            f"{name or f'tensor {region.index} of export {region.export!r}'}, {list(member.size)} elements from {start} on of the sender's"
        )
    more = f" and {len(shown) - _SHOWN} more" if len(shown) > _SHOWN else ""
    return "; ".join(shown[:_SHOWN]) + more


def check_read(read: Read, device: Device | None, name: str) -> None:
    """Raise what is wrong with ``read``, which the message calls ``name``."""
    check_device(read.target, device, f"{name}: its target")
    # What holds for a copy holds here, of a source without memory.
    check_copy(Copy((torch.empty(read.source.size, dtype=read.source.dtype, device="meta"),), read.target), name)


def _region(read: Read, on_device: bool) -> wire.WireRegion:
    source = read.source
    dtype = wire.wire_dtype(source.dtype, read.target.dtype)
    names = wire.dtype_name(source.dtype), wire.dtype_name(dtype)
    return wire.WireRegion(source.export, source.index, source.start, source.size, *names, on_device)
