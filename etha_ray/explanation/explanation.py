"""`explain`: what a plan moves, as numbers, text, pictures and a page. Needs no GPU, no Ray and no process group."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import overload

from etha_ray.errors import ConfigError
from etha_ray.explanation.byte_map import byte_map
from etha_ray.explanation.html import html, page
from etha_ray.explanation.numbers import PlanNumbers
from etha_ray.explanation.picture import Picture, arranged
from etha_ray.explanation.png import png
from etha_ray.explanation.shard_map import shard_maps
from etha_ray.explanation.sides import DtypeLike, SideLike, bytes_of, global_shape, two_sides
from etha_ray.explanation.svg import svg
from etha_ray.explanation.text import heading, plain
from etha_ray.explanation.words import words
from etha_ray.plan import TensorPlan, plan

BANDWIDTH = 50e9
"""Bytes a second of a host's link where none is given: 400 Gbit/s."""


@dataclass(frozen=True)
class Explanation(PlanNumbers):
    """One tensor's way from one side to the other: numbers as attributes, and ways to look at them.

    ``print`` it for plain text; a notebook shows a page with pictures.
    """

    def __str__(self) -> str:
        return plain(self)

    def _repr_html_(self) -> str:
        return html(self)

    def svg(self) -> str:
        """The shard picture of both sides and the byte map as one SVG document, in light and dark."""
        return svg(self._picture())

    def png(self) -> bytes:
        """The same as a PNG file. Raises `OptionalDependencyError` without Pillow."""
        return png(self._picture())

    def save(self, path: str | Path) -> None:
        """Write the pictures to ``path``, whose ending says how: ``.svg``, ``.png``, or ``.html`` for the whole page.

        Raises:
            ConfigError: another ending.
            OptionalDependencyError: ``.png`` without Pillow.
        """
        file = Path(path)
        ending = file.suffix.lower()
        if ending == ".svg":
            file.write_text(self.svg(), encoding="utf-8")
        elif ending == ".png":
            file.write_bytes(self.png())
        elif ending == ".html":
            file.write_text(page(self), encoding="utf-8")
        else:
            raise ConfigError(f"cannot save to {str(path)!r}: give a name that ends in .svg, .png or .html")

    def _picture(self) -> Picture:
        return arranged(heading(self), [shard_maps(self), [byte_map(self), words(self)]])


@overload
def explain(source: TensorPlan, *, dtype: DtypeLike = ..., bandwidth: float = ...) -> Explanation: ...


@overload
def explain(
    source: SideLike,
    target: SideLike,
    shape: Sequence[int] | str,
    dtype: DtypeLike = ...,
    *,
    gpus_per_host: int = ...,
    bandwidth: float = ...,
) -> Explanation: ...


def explain(
    source: SideLike | TensorPlan,
    target: SideLike | None = None,
    shape: Sequence[int] | str | None = None,
    dtype: DtypeLike = "bfloat16",
    *,
    gpus_per_host: int = 8,
    bandwidth: float = BANDWIDTH,
) -> Explanation:
    """What crosses when a tensor goes from ``source`` to ``target``: ``print(explain("4x2: S0,S1", "8: R", "4096x1024"))``.

    Args:
        source: how the giving side holds the tensor: ``"4x2: S0,S1"``, ``(mesh shape, placements)``, a `Layout`, `Pieces`, or
            a `Side`; or a `TensorPlan`, without ``target`` and ``shape``.
        target: the same of the receiving side.
        shape: the tensor's global shape, ``(4096, 1024)`` or ``"4096x1024"``.
        dtype: the element type, or the bytes of an element.
        gpus_per_host: how ranks are seated where the sides do not say: numbered through, the source's first, so many to a host.
        bandwidth: bytes a second of each host's link, for the time.

    Raises:
        LayoutError: a layout or the shape cannot be read, or they do not fit together.
        ConfigError: ``dtype`` is not known; ``gpus_per_host`` or ``bandwidth`` is not above 0.
    """
    if not bandwidth > 0:
        raise ConfigError(f"bandwidth is {bandwidth}: give bytes a second, above 0")
    if isinstance(source, TensorPlan):
        made = source
    elif target is None or shape is None:
        raise ConfigError("give source, target and shape, or a TensorPlan alone")
    else:
        made = plan(*two_sides(source, target, gpus_per_host), global_shape(shape))
    itemsize = bytes_of(dtype)
    return Explanation(
        source=made.source,
        target=made.target,
        shape=made.shape,
        itemsize=itemsize,
        bandwidth=float(bandwidth),
        direct=made.bytes_between(itemsize),
        relayed=made.bytes_relayed(itemsize),
        pairs=made.bytes_of_origin(itemsize),
        hops=made.hops(),
        routes=len(made.routes),
        boxes=sum(len(route.boxes) for route in made.routes),
    )
