"""The truth about layouts, asked from DTensor itself: one process plays every rank of a process group that talks to nobody.

Nothing here uses etha_ray but the data that names a layout.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from unittest import mock

import torch
import torch.distributed as dist
from torch.distributed._local_tensor import LocalTensor, LocalTensorMode
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import Placement, _StridedShard
from torch.testing._internal.distributed.fake_pg import FakeStore

from etha_ray.layout import Layout, Region

WORLD = 64

logging.getLogger("torch.distributed.tensor._redistribute").setLevel(logging.ERROR)  # it advises on the speed of full_tensor


@contextmanager
def playing(rank: int, world_size: int) -> Iterator[None]:
    """Be ``rank`` of a process group of ``world_size`` that talks to nobody."""
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    try:
        yield
    finally:
        dist.destroy_process_group()


def as_torch(layout: Layout) -> list[Placement]:
    """The layout's placements as torch's own objects."""
    found: list[Placement] = []
    for token in layout.placements:
        if match := re.fullmatch(r"P\((\w+)\)", token):
            found.append(Partial(match[1]))
        elif match := re.fullmatch(r"SS(-?\d+)/(\d+)", token):
            found.append(_StridedShard(int(match[1]), split_factor=int(match[2])))
        else:
            found.append(Replicate() if token == "R" else Shard(int(token[1:])))
    return found


@cache
def mesh_of(shape: tuple[int, ...], group: int) -> DeviceMesh:
    """A mesh of the first ranks; ``group`` is the identity of the process group, which a mesh belongs to."""
    return DeviceMesh("cpu", torch.arange(math.prod(shape)).reshape(shape))


def mesh(layout: Layout) -> DeviceMesh:
    """The layout's mesh in the process group of now."""
    return mesh_of(layout.mesh_shape, id(dist.group.WORLD))


def coordinate(layout: Layout, index: int) -> list[int]:
    """Where position ``index`` sits in the mesh."""
    at: list[int] = []
    for size in reversed(layout.mesh_shape):
        index, place = divmod(index, size)
        at.insert(0, place)
    return at


def held(whole: torch.Tensor | Sequence[torch.Tensor], layout: Layout) -> list[torch.Tensor]:
    """What `distribute_tensor` gives each rank, by position, of one tensor or of each rank's own."""
    found: list[torch.Tensor] = []

    def place(_: DeviceMesh) -> list[int]:
        return coordinate(layout, len(found))

    device_mesh, placements = mesh(layout), as_torch(layout)
    with mock.patch.object(DeviceMesh, "get_coordinate", place):
        while len(found) < layout.ranks:
            mine = whole if isinstance(whole, torch.Tensor) else whole[len(found)]
            found.append(distribute_tensor(mine, device_mesh, placements, src_data_rank=None).to_local())
    return found


def combined(layout: Layout, placements: Sequence[Placement], shape: tuple[int, ...], local: Callable[[int], torch.Tensor]) -> torch.Tensor:
    """`DTensor.full_tensor` of what the ranks hold: ``local(index)`` each. All ranks must come to the same."""
    with LocalTensorMode(layout.ranks):
        here = LocalTensor({index: local(index) for index in range(layout.ranks)})
        stride = torch.empty(shape, device="meta").stride()
        tensor = DTensor.from_local(here, mesh(layout), placements, run_check=False, shape=torch.Size(shape), stride=stride)
        full = tensor.full_tensor()
    found = list(full._local_tensors.values()) if isinstance(full, LocalTensor) else [full]
    assert all(torch.equal(found[0], other) for other in found)
    return found[0]


def cut(whole: torch.Tensor, region: Region) -> torch.Tensor:
    """``region`` of ``whole``, by index lists: nothing here but the meaning of the intervals."""
    for dim, spans in enumerate(region.intervals):
        whole = whole.index_select(dim, torch.tensor([i for start, stop in spans for i in range(start, stop)], dtype=torch.long))
    return whole
