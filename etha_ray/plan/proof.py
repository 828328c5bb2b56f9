"""Proof that routes fill every target with what it should hold, made from the two layouts alone."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from etha_ray.errors import LayoutError
from etha_ray.layout import Layout, Pieces
from etha_ray.plan.route import Box, Route


def prove(source: Layout | Pieces, target: Layout | Pieces, shape: tuple[int, ...], routes: Sequence[Route]) -> None:
    """Prove that each target element is written exactly once, from a source that holds that very element; where the source is
    Partial, from one holder of each contribution to it.

    Raises:
        LayoutError: it is not so; the message names the route or the position.
    """
    into: dict[int, list[Route]] = {index: [] for index in range(target.ranks)}
    for route in routes:
        if route.target not in into:
            name = f"{_name(source, target, shape)}: route {route.source} -> {route.target}"
            raise LayoutError(f"{name} names a position that is not in the mesh")
        into[route.target].append(route)
    for index, found in into.items():
        prove_target(source, target, shape, index, found)
    _prove_relays(_name(source, target, shape), into)


def prove_target(source: Layout | Pieces, target: Layout | Pieces, shape: tuple[int, ...], index: int, routes: Sequence[Route]) -> None:
    """`prove` for one target position, given all routes into it.

    Raises:
        LayoutError: as `prove`.
    """
    name = _name(source, target, shape)
    boxes: list[Box] = []
    for route in routes:
        _prove_route(f"{name}: route {route.source} -> {route.target}", source, target, shape, route)
        if route.target != index:
            raise LayoutError(f"{name}: route {route.source} -> {route.target} does not go to {index}")
        boxes.extend(route.boxes)
    wanted = target.region(index, shape).numel
    written = sum(box.numel for box in boxes)
    if written != wanted:
        raise LayoutError(f"{name} writes {written} elements into target {index}, which holds {wanted}")
    if overlap := _overlap(boxes):
        raise LayoutError(f"{name} writes target {index} twice: {overlap[0]} overlaps {overlap[1]}")


def _prove_relays(name: str, into: dict[int, list[Route]]) -> None:
    """Whoever passes something on must get just that, and have it from the sources in the end."""
    there = {(route.target, route.sources, route.boxes): route.relay for route in itertools.chain.from_iterable(into.values())}
    for target, sources, boxes in there:
        passed = {target}
        while (relay := there[target, sources, boxes]) is not None:
            if (relay, sources, boxes) not in there or relay in passed:
                why = "does not get it" if relay not in passed else "would get it from itself in the end"
                raise LayoutError(f"{name}: target {relay} passes on to {target} what it {why}")
            passed.add(relay)
            target = relay


def _name(source: Layout | Pieces, target: Layout | Pieces, shape: tuple[int, ...]) -> str:
    return f"the plan from {source} to {target} for shape {shape}"


def _prove_route(name: str, source: Layout | Pieces, target: Layout | Pieces, shape: tuple[int, ...], route: Route) -> None:
    if not (all(0 <= giver < source.ranks for giver in route.sources) and 0 <= route.target < target.ranks):
        raise LayoutError(f"{name} names a position that is not in the mesh")
    giving = source.region(route.source, shape)
    taking = target.region(route.target, shape)
    if route.relay is not None and (not 0 <= route.relay < target.ranks or target.region(route.relay, shape) != taking):
        raise LayoutError(f"{name} is passed on by target {route.relay}, which does not hold the same indices")
    if any(source.region(other, shape) != giving for other in route.others):
        raise LayoutError(f"{name} combines {route.sources}, which do not hold the same indices")
    _prove_contributors(name, source, route)
    if route.numel != sum(box.numel for box in route.boxes):
        raise LayoutError(f"{name} says {route.numel} elements, but its boxes have {sum(box.numel for box in route.boxes)}")
    for box in route.boxes:
        if not len(box.source_start) == len(box.target_start) == len(box.size) == len(shape):
            raise LayoutError(f"{name}: {box} has another number of dimensions than the tensor")
        if any(size < 1 for size in box.size):
            raise LayoutError(f"{name}: {box} is empty")
        for dim, size in enumerate(box.size):
            given, taken = giving.span(dim, box.source_start[dim], size), taking.span(dim, box.target_start[dim], size)
            if given != taken or sum(stop - start for start, stop in given) != size:
                raise LayoutError(f"{name}: {box} reads {given} and writes {taken} of the tensor's dimension {dim}")


def _prove_contributors(name: str, source: Layout | Pieces, route: Route) -> None:
    """Each contribution to what the route carries must be among its sources once, in mesh order."""
    if source.partial is None:
        if route.others:
            raise LayoutError(f"{name} combines {route.sources}, but the source holds values, not contributions to them")
        return
    assert isinstance(source, Layout)
    found = [tuple(source.coordinate(giver)[dim] for dim in source.partial.dims) for giver in route.sources]
    if len(found) != source.partial.count or any(one >= other for one, other in itertools.pairwise(found)):
        raise LayoutError(
            f"{name} combines the contributions of {route.sources}, which is not each of {source.partial.count} once, in mesh order"
        )


def _overlap(boxes: Sequence[Box]) -> tuple[Box, Box] | None:
    """Two boxes that share a target element, if there are any: a sweep along the dimension that separates most of them."""
    if len(boxes) < 2:
        return None
    if not boxes[0].size:
        return boxes[0], boxes[1]
    sweep = max(range(len(boxes[0].size)), key=lambda dim: len({box.target_start[dim] for box in boxes}))
    open_boxes: list[Box] = []
    for box in sorted(boxes, key=lambda box: box.target_start[sweep]):
        open_boxes = [other for other in open_boxes if other.target_start[sweep] + other.size[sweep] > box.target_start[sweep]]
        for other in open_boxes:
            if all(_meet(box, other, dim) for dim in range(len(box.size))):
                return other, box
        open_boxes.append(box)
    return None


def _meet(one: Box, other: Box, dim: int) -> bool:
    return (
        one.target_start[dim] < other.target_start[dim] + other.size[dim]
        and other.target_start[dim] < one.target_start[dim] + one.size[dim]
    )
