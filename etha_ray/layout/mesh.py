"""A device mesh as one of its members sees it, and the arithmetic of positions in it."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from etha_ray.errors import LayoutError


def ints(values: Iterable[Any], what: str) -> tuple[int, ...]:
    """``values`` as a tuple of integers; one integer is taken as a sequence of one. ``what`` names them in the error."""
    if isinstance(values, int):
        values = (values,)
    try:
        return tuple(operator.index(value) for value in values)
    except TypeError:
        raise LayoutError(f"{what} is {values!r}, but it must be a sequence of integers, such as (4, 2)") from None


def check_mesh(shape: tuple[int, ...]) -> None:
    """Raise `LayoutError` if ``shape`` has a dimension without members."""
    if any(size < 1 for size in shape):
        raise LayoutError(f"mesh shape {shape} has a dimension below 1: every mesh dimension needs at least one member")


@lru_cache(maxsize=1024)
def strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    """How far apart neighbours along each dimension are, in row-major order."""
    return tuple(math.prod(shape[dim + 1 :]) for dim in range(len(shape)))


@dataclass(frozen=True)
class MeshSpec:
    """A device mesh as one of its members sees it, without a process group.

    Args:
        shape: the mesh's size per dimension, such as ``(4, 2)``. A list or one integer is taken too.
        coordinate: this member's place in it, one entry per mesh dimension.
        dim_names: names of the mesh dimensions, for messages only.

    Raises:
        LayoutError: a size is below 1, the coordinate lies outside the mesh, or the lengths disagree.
    """

    shape: tuple[int, ...]
    coordinate: tuple[int, ...]
    dim_names: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        shape = ints(self.shape, "MeshSpec shape")
        coordinate = ints(self.coordinate, "MeshSpec coordinate")
        check_mesh(shape)
        if len(coordinate) != len(shape):
            raise LayoutError(
                f"MeshSpec coordinate {coordinate} has {len(coordinate)} entries, but the mesh {shape} has "
                f"{len(shape)} dimensions: give one entry per mesh dimension"
            )
        if any(not 0 <= at < size for at, size in zip(coordinate, shape, strict=True)):
            raise LayoutError(
                f"MeshSpec coordinate {coordinate} lies outside the mesh {shape}: each entry must be at least 0 and "
                "below the size of its mesh dimension"
            )
        object.__setattr__(self, "shape", shape)
        object.__setattr__(self, "coordinate", coordinate)
        if self.dim_names is not None:
            names = tuple(self.dim_names)
            if isinstance(self.dim_names, str) or len(names) != len(shape):
                raise LayoutError(f"MeshSpec dim_names {self.dim_names!r} do not fit the mesh {shape}: give {len(shape)} names, or none")
            object.__setattr__(self, "dim_names", names)

    @classmethod
    def of(cls, mesh: Any) -> MeshSpec:
        """The spec of ``mesh``, which is a `MeshSpec` or a torch `DeviceMesh` that this process belongs to.

        Raises:
            LayoutError: ``mesh`` is something else, or this process is not in it.
        """
        if isinstance(mesh, MeshSpec):
            return mesh
        # Asked only for a foreign object, so that layouts stay usable (and quick to import) without torch.distributed.
        from torch.distributed.device_mesh import DeviceMesh

        if not isinstance(mesh, DeviceMesh):
            raise LayoutError(f"device_mesh is a {type(mesh).__name__}, but it must be a torch DeviceMesh or an etha_ray.MeshSpec")
        coordinate = mesh.get_coordinate()
        shape = tuple(mesh.mesh.shape)
        if coordinate is None:
            raise LayoutError(
                f"this process is not part of the device mesh of shape {shape}: "
                "only members of the mesh hold a shard, so only they may take part with it"
            )
        names = mesh.mesh_dim_names
        return cls(shape, tuple(coordinate), None if names is None else tuple(names))

    @property
    def ndim(self) -> int:
        """How many dimensions the mesh has."""
        return len(self.shape)

    @property
    def size(self) -> int:
        """How many members the mesh has."""
        return math.prod(self.shape)

    @property
    def index(self) -> int:
        """This member's position in the mesh, row-major, from 0."""
        return sum(at * stride for at, stride in zip(self.coordinate, strides(self.shape), strict=True))
