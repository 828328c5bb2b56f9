"""What `explain` may be asked about: the two sides and the tensor, in every form that callers have at hand."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import torch

from etha_ray.dtypes import DTYPES
from etha_ray.errors import ConfigError, LayoutError
from etha_ray.layout import Layout, Pieces
from etha_ray.plan import Side

SideLike: TypeAlias = "str | Layout | Pieces | Side | tuple[Sequence[int], Sequence[Any]]"
"""One side: ``"4x2: S0,R"``, a layout, ``(mesh shape, placements)``, or a `Side`, which also says who sits on which host."""

DtypeLike: TypeAlias = "torch.dtype | str | int"
"""An element type, or the bytes that an element has."""


def two_sides(source: SideLike, target: SideLike, gpus_per_host: int) -> tuple[Side, Side]:
    """Both sides with a seat for every position.

    Where they do not name agents and hosts, agents are numbered through, the source's first, ``gpus_per_host`` to a host.

    Raises:
        LayoutError: one of them is not a layout, or only one of them is a `Side`.
        ConfigError: ``gpus_per_host`` is below 1.
    """
    if gpus_per_host < 1:
        raise ConfigError(f"gpus_per_host is {gpus_per_host}: give at least 1")
    if isinstance(source, Side) and isinstance(target, Side):
        return source, target
    if isinstance(source, Side) or isinstance(target, Side):
        raise LayoutError(
            "one side is a Side, which names agents and hosts, and the other is not, so nobody knows who sits beside whom: "
            "give both as Side, or both as layouts"
        )
    layouts = _layout("source", source), _layout("target", target)
    first, sides = 0, []
    for layout in layouts:
        agents = tuple(range(first, first + layout.ranks))
        sides.append(Side(layout, agents, tuple(f"host{agent // gpus_per_host}" for agent in agents)))
        first += layout.ranks
    return sides[0], sides[1]


def global_shape(shape: Sequence[int] | str) -> tuple[int, ...]:
    """``shape`` as a tuple: a sequence of sizes, or ``"4096x1024"``; ``""`` is a tensor without dimensions.

    Raises:
        LayoutError: it is neither, or a size is below 0.
    """
    sizes = [part.strip() for part in shape.split("x") if shape.strip()] if isinstance(shape, str) else list(map(str, shape))
    if not all(size.isdecimal() for size in sizes):
        raise LayoutError(f'{shape!r} is not a shape: give the size of each dimension, such as "4096x1024"')
    return tuple(map(int, sizes))


def bytes_of(dtype: DtypeLike) -> int:
    """Bytes of an element of ``dtype``.

    Raises:
        ConfigError: there is no such dtype, or the number is below 1.
    """
    if isinstance(dtype, torch.dtype):
        return dtype.itemsize
    if isinstance(dtype, str) and dtype in DTYPES:
        return DTYPES[dtype].itemsize
    if isinstance(dtype, int) and dtype >= 1:
        return dtype
    raise ConfigError(f'dtype {dtype!r} is not known: give a name such as "bfloat16", "float32" or "float8_e4m3fn", or bytes an element')


def _layout(name: str, given: Any) -> Layout | Pieces:
    try:
        if isinstance(given, (Layout, Pieces)):
            return given
        if isinstance(given, str):
            return Layout.decode(given)
        mesh, placements = given
        return Layout.of(mesh, placements)
    except LayoutError as error:
        raise LayoutError(f"{name}: {error}") from None
    except (TypeError, ValueError):
        accepted = '"4x2: S0,R", (mesh shape, placements), a Layout or a Side'
        raise LayoutError(f"{name} is {given!r}, but it must be a layout: {accepted}") from None
