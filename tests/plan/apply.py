"""A plan applied to real data in one process, and sides to plan between."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import pytest
import torch

import etha_ray.plan.routing as routing
import etha_ray.plan.sharing as sharing
from etha_ray.layout import Layout, Reduction
from etha_ray.plan import Route, Side


def side(layout: str, first_agent: int = 0, per_host: int = 8, host: str = "host") -> Side:
    """Agents in order from ``first_agent``, ``per_host`` of them on each host."""
    found = Layout.decode(layout)
    agents = tuple(range(first_agent, first_agent + found.ranks))
    return Side(found, agents, tuple(f"{host}{agent // per_host}" for agent in agents))


def far(layout: str) -> Side:
    """A side that shares neither agents nor hosts with `side`."""
    return side(layout, 10_000, host="far")


def filled(routes: Iterable[Route], given: Callable[[int], torch.Tensor], like: torch.Tensor, reduction: Reduction | None) -> torch.Tensor:
    """A target's tensor after ``routes``, where source ``i`` holds ``given(i)``. Each element must be written exactly once."""
    got, writes = torch.full_like(like, -1), torch.zeros(like.shape, dtype=torch.int64)
    for route in routes:
        for box in route.boxes:
            parts = torch.stack([given(index)[slices(box.source_start, box.size)] for index in route.sources])
            here = slices(box.target_start, box.size)
            got[here] = parts[0] if reduction is None else reduced(parts, reduction).to(like.dtype)
            writes[here] += 1
    assert bool((writes == 1).all())
    return got


def reduced(parts: torch.Tensor, reduction: Reduction) -> torch.Tensor:
    """The rows of ``parts`` combined."""
    by = {"sum": torch.sum, "product": torch.prod, "max": torch.amax, "min": torch.amin}[reduction.op](parts, 0)
    return by / reduction.divisor if reduction.divisor > 1 else by


def slices(start: tuple[int, ...], size: tuple[int, ...]) -> tuple[slice, ...]:
    return tuple(slice(at, at + n) for at, n in zip(start, size, strict=True))


@contextmanager
def least_share(elements: int) -> Iterator[None]:
    """Divide demands into parts of ``elements``, so that small tensors show what happens to large ones."""
    caches = sharing._sharing, routing._routes_into, routing._routes_out_of
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sharing, "LEAST_SHARE", elements)
        for cache in caches:
            cache.cache_clear()
        yield
    for cache in caches:
        cache.cache_clear()
