"""What a worker's arguments say about layouts: its mesh and placements, and those that a DTensor carries."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, cast

import torch

from etha_ray.errors import ConfigError, LayoutError, NotShareableError
from etha_ray.layout import Layout, MeshSpec

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor.placement_types import Placement


def describe(
    pair_name: str, world_size: int, mesh: DeviceMesh | MeshSpec | None, placements: Sequence[Placement] | None
) -> tuple[Layout | None, MeshSpec | None]:
    """The layout of this worker's side and its place in the mesh, checked.

    Raises `LayoutError` when they do not fit together, and `ConfigError` for a world size that is no positive integer.
    """
    if isinstance(world_size, bool) or not isinstance(world_size, int) or world_size < 1:
        raise ConfigError(f"pair {pair_name!r}: expected_world_size {world_size!r} is not a positive integer")
    if mesh is None:
        if placements is not None:
            raise LayoutError(f"pair {pair_name!r}: placements {placements} without a device_mesh say nothing; give both or neither")
        return None, None
    if placements is None:
        raise LayoutError(f"pair {pair_name!r}: a device_mesh without placements says nothing; give one placement per mesh dimension")
    try:
        spec = MeshSpec.of(mesh)
        layout = Layout.of(spec.shape, tuple(placements))
    except LayoutError as error:
        raise LayoutError(f"pair {pair_name!r}: {error}") from error
    if spec.size != world_size:
        raise LayoutError(
            f"pair {pair_name!r}: mesh {spec.shape} has {spec.size} coordinates and expected_world_size is {world_size}:"
            " give the size of the mesh"
        )
    return layout, spec


def check_label(what: str, label: str) -> str:
    """Return ``label`` if it can name something on the bus: text of 1 to 512 bytes. Raises `ConfigError`."""
    try:
        fits = isinstance(label, str) and 0 < len(label.encode()) <= 512
    except UnicodeEncodeError:
        fits = False
    if fits:
        return label
    raise ConfigError(f"{what} {label!r} cannot be used: give text of 1 to 512 bytes in UTF-8")


def check_writable(label: str, tensor: torch.Tensor) -> None:
    """Raise `NotShareableError` if elements of ``tensor`` share memory, so that it could not be received into."""
    local = getattr(tensor, "_local_tensor", tensor)
    if local.layout == torch.strided and any(step == 0 and size > 1 for size, step in zip(local.shape, local.stride(), strict=True)):
        raise NotShareableError(
            f"{label} of shape {tuple(local.shape)} has stride {local.stride()}: elements that share memory cannot be received;"
            " register the tensor it was expanded from, or .contiguous()"
        )


def check_dtensor(label: str, tensor: torch.Tensor, pair_name: str, layout: Layout | None, spec: MeshSpec | None) -> None:
    """Raise `LayoutError` if ``tensor`` is a DTensor that is not laid out as its pair, or on another coordinate."""
    found = dtensor_layout(tensor)
    if found is None:
        return
    described = "no mesh" if layout is None else layout.encode()
    coordinate = cast("DTensor", tensor).device_mesh.get_coordinate()
    if spec is None or layout is None or layout.resolve(tensor.ndim) != found.resolve(tensor.ndim):
        what = f"laid out as {found.encode()}"
    elif coordinate is None or tuple(coordinate) != spec.coordinate:
        what = f"on coordinate {coordinate} of its mesh"
        described += f" on coordinate {spec.coordinate}"
    else:
        return
    raise LayoutError(
        f"{label} is a DTensor {what} with shape {tuple(tensor.shape)}, and pair {pair_name!r} was initialised with {described}:"
        " redistribute the tensor, or register it on a pair of its own layout"
    )


def dtensor_layout(tensor: torch.Tensor) -> Layout | None:
    """The layout that a DTensor carries; None for any other tensor."""
    mesh, placements = getattr(tensor, "device_mesh", None), getattr(tensor, "placements", None)
    if mesh is None or placements is None:
        return None
    return Layout.of(tuple(mesh.mesh.shape), tuple(placements))


def global_shape(tensor: torch.Tensor) -> tuple[int, ...] | None:
    """The global shape of a DTensor; None for any other tensor, which knows only its own."""
    return tuple(tensor.shape) if dtensor_layout(tensor) is not None else None
