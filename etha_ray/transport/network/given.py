"""What an owner has prepared for a reader: the regions of one program, checked, and cut for the streams and for the communicator."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from etha_ray.dtypes import CASTABLE, DTYPES
from etha_ray.errors import TensorMismatchError
from etha_ray.transport.buckets import Bucket, Region, cut_into_buckets
from etha_ray.transport.network import wire
from etha_ray.transport.network.device import Device
from etha_ray.transport.network.rounds import Rounds
from etha_ray.transport.network.runs import BucketMemory, lay_out


@dataclass(frozen=True)
class Given:
    """Neither keeps the tensors from closing, nor lives longer than they do."""

    buckets: list[BucketMemory]
    rounds: Rounds | None
    """None where nothing goes by a communicator."""
    answer: wire.Prepared


def given(request: wire.Prepare, bucket_size: int, tensors: Mapping[str, Sequence[torch.Tensor]], device: Device | None) -> Given:
    """What ``request`` asks for, of the exports that ``tensors`` are, in buckets of this size. Everything a reader says is checked.

    Raises:
        TensorMismatchError: a region is not what the reader takes it for.
        TransferError: the device has no memory to stage it.
    """
    views = [_view(tensors[region.export], region) for region in request.regions]
    held = [region.on_device and device is not None and device.holds(view) for region, view in zip(request.regions, views, strict=True)]
    able = device is not None and device.communicators is not None and request.round_size > 0
    paired = [able and here for here in held]
    round_size = 0
    rounds = None
    if device is not None and any(paired):
        round_size = min(request.round_size, device.sending.round_size)
        cut, dtypes = cut_for_communicator(request, paired, min(bucket_size, round_size))
        own = [view for view, by in zip(views, paired, strict=True) if by]
        rounds = Rounds(device.copier, cut, own, dtypes, round_size, device.sending.all[0], sends=True, checked=request.checked)
    cut, dtypes = cut_for_streams(request, paired, bucket_size)
    own = [view for view, by in zip(views, paired, strict=True) if not by]
    buckets = [lay_out(bucket, own, dtypes, device, checked=request.checked) for bucket in cut]
    lacks = device.lacks if device is not None and any(held) else ""
    return Given(buckets, rounds, wire.Prepared(request.program, paired, bucket_size, round_size, lacks))


def cut_for_streams(request: wire.Prepare, paired: Sequence[bool], bucket_size: int) -> tuple[tuple[Bucket, ...], list[torch.dtype]]:
    """The buckets of the regions that are not ``paired``, which they count from 0, and these regions' dtypes: the same at both ends."""
    return _cut([region for region, by in zip(request.regions, paired, strict=True) if not by], bucket_size)


def cut_for_communicator(request: wire.Prepare, paired: Sequence[bool], bucket_size: int) -> tuple[tuple[Bucket, ...], list[torch.dtype]]:
    """As `cut_for_streams`, of those that are; no bucket may be larger than a round, however small a budget makes that."""
    return _cut([region for region, by in zip(request.regions, paired, strict=True) if by], bucket_size)


def _cut(regions: Sequence[wire.WireRegion], bucket_size: int) -> tuple[tuple[Bucket, ...], list[torch.dtype]]:
    dtypes = [DTYPES[region.wire] for region in regions]
    sizes = [Region(region.size, dtype.itemsize) for region, dtype in zip(regions, dtypes, strict=True)]
    return cut_into_buckets(sizes, bucket_size), dtypes


def _view(tensors: Sequence[torch.Tensor], region: wire.WireRegion) -> torch.Tensor:
    """The region of an export's tensors; everything a reader says is checked."""
    where = f"tensor {region.index} of export {region.export!r}"
    if not 0 <= region.index < len(tensors):
        raise TensorMismatchError(f"{where} is not there: it has {len(tensors)}")
    tensor = tensors[region.index]
    if wire.dtype_name(tensor.dtype) != region.dtype:
        raise TensorMismatchError(f"{where} is {tensor.dtype}, and was taken for {region.dtype}; both sides must mean the same tensor")
    sent = DTYPES.get(region.wire)
    if sent is None or (sent != tensor.dtype and (not {sent, tensor.dtype} <= CASTABLE or sent.itemsize >= tensor.itemsize)):
        raise TensorMismatchError(f"{where} is {tensor.dtype} and cannot be sent as {region.wire}")
    inside = len(region.start) == len(region.size) == tensor.dim() and all(
        first >= 0 and size >= 0 and first + size <= extent
        for first, size, extent in zip(region.start, region.size, tensor.shape, strict=True)
    )
    if not inside:
        raise TensorMismatchError(f"{where} has shape {tuple(tensor.shape)}: {region.size} from {region.start} is not within it")
    return tensor[tuple(slice(first, first + size) for first, size in zip(region.start, region.size, strict=True))]
