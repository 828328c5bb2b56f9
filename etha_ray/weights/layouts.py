"""Which ranks a side has, and how they hold each tensor of it."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias, cast

import torch

from etha_ray.config import worker_environment
from etha_ray.errors import ConfigError, LayoutError
from etha_ray.layout import Layout, MeshSpec
from etha_ray.tensor_bus.tensors import dtensor_layout

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

Placements: TypeAlias = "Any | Sequence[Any]"
"""One placement per mesh dimension, or just the one of a one-dimensional mesh."""

PlacementsOf: TypeAlias = "Placements | Mapping[str, Placements] | Callable[[str, torch.Tensor], Placements | None] | None"
"""How plain tensors lie: all alike, by patterns of their own names, or by a function of own name and local tensor."""


@dataclass(frozen=True)
class Seat:
    """This process's place on its side.

    Attributes:
        rank, size: its rank, from 0, among the side's ranks.
        members: the ranks of torch.distributed that the side consists of, in order; None where they are its own ranks.
    """

    rank: int
    size: int
    members: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.size:
            raise ConfigError(f"rank {self.rank} of world_size {self.size}: ranks go from 0 to world_size - 1")

    def ranks(self, mesh: DeviceMesh) -> tuple[int, ...]:
        """The side's ranks that a mesh consists of, in the order of its indices."""
        found = [int(rank) for rank in mesh.mesh.flatten().tolist()]
        if self.members is None:
            strangers = [rank for rank in found if rank >= self.size]
        else:
            places = {member: place for place, member in enumerate(self.members)}
            strangers = [rank for rank in found if rank not in places]
            found = [places.get(rank, -1) for rank in found]
        if strangers:
            raise ConfigError(
                f"a mesh has ranks {strangers}, which are not among the {self.size} of this side: give world_size and rank so"
                " that all meshes of its tensors are in it"
            )
        return tuple(found)


def find_seat(tensors: Iterable[torch.Tensor], mesh: DeviceMesh | MeshSpec | None, world_size: int | None, rank: int | None) -> Seat:
    """This process's place, from the first of these that says it: ``world_size`` and ``rank``; ``mesh``; the meshes of DTensors, the
    largest, with what they are slices of; torch.distributed, if it is initialised; RANK and WORLD_SIZE. Else it is alone.

    Raises `ConfigError` for ranks that do not fit together.
    """
    if (world_size is None) != (rank is None):
        raise ConfigError(f"world_size={world_size} and rank={rank}: give both, or neither")
    if world_size is not None and rank is not None:
        return Seat(rank, world_size, _block(rank, world_size))
    if isinstance(mesh, MeshSpec):
        return Seat(mesh.index, mesh.size)
    candidates = [mesh, *(getattr(tensor, "device_mesh", None) for tensor in tensors)]
    meshes: list[DeviceMesh] = list({id(one): one for one in candidates if one is not None}.values())
    if meshes:
        members = max((sorted(map(int, _root(one).mesh.flatten().tolist())) for one in meshes), key=len)
        own = meshes[0].get_rank()
        if own not in members:
            raise ConfigError(f"this process is rank {own}, which is not in the mesh of ranks {members}: only its members take part")
        return Seat(members.index(own), len(members), tuple(members))
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return Seat(torch.distributed.get_rank(), torch.distributed.get_world_size())
    environment = worker_environment()
    if environment.global_rank is not None and environment.world_size is not None:
        return Seat(environment.global_rank, environment.world_size)
    return Seat(0, 1)


@dataclass(frozen=True)
class Held:
    """How one tensor lies.

    Attributes:
        layout: its mesh and placements; None for a plain tensor that is whole on each rank that has it.
        ranks: the side's ranks that the mesh consists of; None without a layout.
        shape: global if ``whole``, else this rank's part.
    """

    layout: Layout | None
    ranks: tuple[int, ...] | None
    shape: tuple[int, ...]
    whole: bool


class Layouts:
    """Says how each tensor of this side lies.

    Args:
        seat: this process's place.
        mesh: of the plain tensors that ``placements`` speak of; by default the side's ranks in a row.
        placements: see `PlacementsOf`.
    """

    def __init__(self, seat: Seat, mesh: DeviceMesh | MeshSpec | None = None, placements: PlacementsOf = None) -> None:
        self._seat = seat
        self._placements = placements
        self._spec = MeshSpec((seat.size,), (seat.rank,)) if mesh is None else MeshSpec.of(mesh)
        if mesh is None or isinstance(mesh, MeshSpec):
            self._ranks: tuple[int, ...] = tuple(range(seat.size))
        else:
            self._ranks = seat.ranks(mesh)
        if len(self._ranks) != self._spec.size or self._ranks[self._spec.index] != seat.rank:
            raise ConfigError(
                f"mesh {self._spec.shape} with this process at {self._spec.coordinate} does not fit rank {seat.rank} of {seat.size}:"
                " a MeshSpec has all ranks of its side, in order; give a torch DeviceMesh for a part of them"
            )

    def of(self, name: str, tensor: torch.Tensor) -> Held:
        """How the tensor lies that this side calls ``name``. Raises `LayoutError` if its placements do not fit mesh and shape."""
        found = dtensor_layout(tensor)
        if found is not None:
            return Held(found, self._seat.ranks(cast("Any", tensor).device_mesh), tuple(tensor.shape), True)
        placements = self._find(name, tensor)
        if placements is None:
            return Held(None, None, tuple(tensor.shape), True)
        try:
            layout = Layout.of(self._spec.shape, placements)
            layout.resolve(tensor.ndim)
        except LayoutError as error:
            raise LayoutError(f"{name!r}: {error}") from error
        whole = all(token == "R" or token.startswith("P") for token in layout.placements)
        return Held(layout, self._ranks, tuple(tensor.shape), whole)

    def _find(self, name: str, tensor: torch.Tensor) -> list[Any] | None:
        given: Any = self._placements
        if isinstance(given, Mapping):
            given = next((value for pattern, value in given.items() if fnmatch.fnmatchcase(name, pattern)), None)
        elif callable(given):
            given = given(name, tensor)
        if given is None:
            return None
        return list(given) if isinstance(given, list | tuple) else [given]


def _block(rank: int, world_size: int) -> tuple[int, ...] | None:
    """The ranks of torch.distributed behind a rank that was given: its own ones, or a row among more."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return None
    own, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    first = own - rank
    return None if size == world_size or first < 0 or first + world_size > size else tuple(range(first, first + world_size))


def _root(mesh: DeviceMesh) -> DeviceMesh:
    """The mesh that ``mesh`` was sliced from: a stage of a pipeline is in it with the others."""
    return mesh._get_root_mesh()
