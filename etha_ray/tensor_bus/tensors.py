"""What a worker's arguments say about layouts: its mesh and placements, and those that a DTensor carries."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from etha_ray.errors import ConfigError, LayoutError
from etha_ray.layout import Layout, MeshSpec

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor.placement_types import Placement


def describe(
    pair_name: str, world_size: int, mesh: DeviceMesh | MeshSpec | None, placements: Sequence[Placement] | None
) -> tuple[Layout | None, MeshSpec | None]:
    """The layout of this worker's side and its place in the mesh, checked."""
    if isinstance(world_size, bool) or not isinstance(world_size, int) or world_size < 1:
        raise ConfigError(f"pair {pair_name!r}: expected_world_size {world_size!r} is not a positive integer")
    if mesh is None:
        if placements is not None:
            raise LayoutError(f"pair {pair_name!r}: placements {placements} without a device_mesh say nothing; give both or neither")
        return None, None
    if placements is None:
        raise LayoutError(f"pair {pair_name!r}: a device_mesh without placements says nothing; give one placement per mesh dimension")
    spec = MeshSpec.of(mesh)
    if spec.size != world_size:
        raise LayoutError(
            f"pair {pair_name!r}: mesh {spec.shape} has {spec.size} coordinates and expected_world_size is {world_size}:"
            " give the size of the mesh"
        )
    return Layout.of(spec.shape, tuple(placements)), spec


def dtensor_layout(tensor: torch.Tensor) -> Layout | None:
    """The layout that a DTensor carries; None for any other tensor."""
    mesh, placements = getattr(tensor, "device_mesh", None), getattr(tensor, "placements", None)
    if mesh is None or placements is None:
        return None
    return Layout.of(tuple(mesh.mesh.shape), tuple(placements))


def global_shape(tensor: torch.Tensor) -> tuple[int, ...] | None:
    """The global shape of a DTensor; None for any other tensor, which knows only its own."""
    return tuple(tensor.shape) if dtensor_layout(tensor) is not None else None
