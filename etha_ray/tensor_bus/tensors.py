"""What a worker's arguments say about layouts: its mesh and placements, those that a DTensor carries, and explicit pieces."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias, cast

import torch

from etha_ray.errors import ConfigError, LayoutError, NotShareableError
from etha_ray.layout import Layout, MeshSpec

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor.placement_types import Placement


@dataclass(frozen=True, eq=False)
class Piece:
    """A tensor that is one box of a larger one, for what placements cannot say: ragged experts, parts of packed projections.

    Stands in `TensorBusClient.register_tensors` in place of a tensor, and says where it lies itself, whatever the placements
    of its pair are. Where one rank of a side registers a piece, all ranks of that side register one at that position; a rank
    that holds nothing of the tensor gives an empty one (a size of 0). Ranks may hold the same box. What receives may overlap
    otherwise too; a side that sends must cover all that is wanted.

    Attributes:
        tensor: this rank's part; may be a view, as of its rows in a fused tensor.
        global_shape: of the whole tensor, the same on every rank of both sides.
        offsets: where ``tensor`` begins in the whole one, an index per dimension.
    """

    tensor: torch.Tensor
    global_shape: Sequence[int]
    offsets: Sequence[int]


Registrable: TypeAlias = "torch.Tensor | Piece"
"""What can be registered: a tensor or DTensor that lies as its pair says, or an explicit piece."""


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


def described(
    label: str, thing: Registrable, pair_name: str, layout: Layout | None, spec: MeshSpec | None
) -> tuple[torch.Tensor, tuple[int, ...] | None, tuple[int, ...] | None]:
    """The tensor to register, its global shape if that is stated, and its offsets if it is an explicit piece; checked.

    Raises:
        LayoutError: it is a DTensor that does not lie as its pair says, or a piece outside of its global tensor.
        NotShareableError: elements of it share memory.
    """
    if isinstance(thing, Piece):
        whole, offsets = piece_of(label, thing)
        check_writable(label, thing.tensor)
        return thing.tensor, whole, offsets
    check_writable(label, thing)
    check_dtensor(label, thing, pair_name, layout, spec)
    return thing, global_shape(thing), None


def check_writable(label: str, tensor: torch.Tensor) -> None:
    """Raise `NotShareableError` if elements of ``tensor`` share memory, so that it could not be received into."""
    local = getattr(tensor, "_local_tensor", tensor)
    if local.layout == torch.strided and any(step == 0 and size > 1 for size, step in zip(local.shape, local.stride(), strict=True)):
        raise NotShareableError(
            f"{label} of shape {tuple(local.shape)} has stride {local.stride()}: elements that share memory cannot be received;"
            " register the tensor it was expanded from, or .contiguous()"
        )


def piece_of(label: str, piece: Piece) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Global shape and offsets of an explicit piece. Raises `LayoutError` if it does not lie inside its global tensor."""
    if dtensor_layout(piece.tensor) is not None:
        raise LayoutError(f"{label}: a DTensor says by itself where it lies; register it as it is, or give its .to_local() as a Piece")
    whole, offsets = _ints(label, "global_shape", piece.global_shape), _ints(label, "offsets", piece.offsets)
    size = tuple(piece.tensor.shape)
    if not len(whole) == len(offsets) == len(size):
        raise LayoutError(
            f"{label}: a piece of shape {size} with global_shape {whole} and offsets {offsets}: all three must have as many dimensions"
        )
    if any(at < 0 or at + length > total for at, length, total in zip(offsets, size, whole, strict=True)):
        raise LayoutError(
            f"{label}: a piece of shape {size} at offsets {offsets} does not lie inside a tensor of shape {whole}:"
            " correct its offsets, or its global_shape"
        )
    return whole, offsets


def _ints(label: str, what: str, values: Any) -> tuple[int, ...]:
    try:
        return tuple(operator.index(value) for value in values)
    except TypeError:
        raise LayoutError(f"{label}: {what} is {values!r}; give one integer for each dimension") from None


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
        _check_local(label, cast("DTensor", tensor), layout, spec.index)
        return
    raise LayoutError(
        f"{label} is a DTensor {what} with shape {tuple(tensor.shape)}, and pair {pair_name!r} was initialised with {described}:"
        " redistribute the tensor, or register it on a pair of its own layout"
    )


def _check_local(label: str, tensor: DTensor, layout: Layout, index: int) -> None:
    """The others know most DTensors' local shapes from their layout alone."""
    try:
        layout.fit({index: tuple(tensor._local_tensor.shape)}, tuple(tensor.shape))
    except LayoutError as error:
        where = f"{label} is a DTensor of shape {tuple(tensor.shape)}"
        raise LayoutError(f"{where}: {error}; or register its local tensor as a Piece") from error


def dtensor_layout(tensor: torch.Tensor) -> Layout | None:
    """The layout that a DTensor carries; None for any other tensor."""
    mesh, placements = getattr(tensor, "device_mesh", None), getattr(tensor, "placements", None)
    if mesh is None or placements is None:
        return None
    return Layout.of(tuple(mesh.mesh.shape), tuple(placements))


def global_shape(tensor: torch.Tensor) -> tuple[int, ...] | None:
    """The global shape of a DTensor; None for any other tensor, which knows only its own."""
    return tuple(tensor.shape) if dtensor_layout(tensor) is not None else None
