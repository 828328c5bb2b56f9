"""The whole plan of one tensor: all routes between two sides, proved, hashed and summed up."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from etha_ray.layout import Reduction
from etha_ray.plan.digest import digest_inputs
from etha_ray.plan.proof import prove
from etha_ray.plan.route import Route
from etha_ray.plan.routing import routes_of_target
from etha_ray.plan.sharing import turn_of
from etha_ray.plan.side import Side

if TYPE_CHECKING:
    from etha_ray.explanation import Explanation
    from etha_ray.explanation.sides import DtypeLike


@dataclass(frozen=True)
class TensorPlan:
    """All routes of one tensor between two sides. An agent needs only its own; this is for proof, hashes and display.

    Attributes:
        shape: the tensor's global shape.
        routes: ascending by target, then source.
    """

    source: Side
    target: Side
    shape: tuple[int, ...]
    routes: tuple[Route, ...]

    @property
    def reduction(self) -> Reduction | None:
        """How the contributions of a Partial source are combined; None where sources hold values."""
        return self.source.layout.partial

    def verify(self) -> None:
        """Prove that each target element is written exactly once, from a source that holds that very element; where the
        source is Partial, from one holder of each contribution to it. What a target gets from another one, that one gets too, and
        whoever passes it on has it from the sources in the end.

        The proof does not use the code that made the routes: it asks both layouts what each position holds.

        Raises:
            LayoutError: it is not so; the message names the route or the position.
        """
        prove(self.source.layout, self.target.layout, self.shape, self.routes)

    def bytes_between(self, itemsize: int) -> dict[tuple[int, int], int]:
        """Bytes that targets read from sources, by (source position, target position), for elements of ``itemsize`` bytes."""
        crossing: dict[tuple[int, int], int] = {}
        for route in self.routes:
            for source in route.sources if route.relay is None else ():
                pair = (source, route.target)
                crossing[pair] = crossing.get(pair, 0) + route.numel * itemsize
        return crossing

    def bytes_relayed(self, itemsize: int) -> dict[tuple[int, int], int]:
        """Bytes that targets read from other targets, by (the relay's position, the reader's)."""
        crossing: dict[tuple[int, int], int] = {}
        for route in self.routes:
            if route.relay is not None:
                pair = (route.relay, route.target)
                crossing[pair] = crossing.get(pair, 0) + route.numel * itemsize
        return crossing

    def bytes_of_origin(self, itemsize: int) -> dict[tuple[int, int], int]:
        """Bytes by (the source position they come from, target position), whichever way they take."""
        coming: dict[tuple[int, int], int] = {}
        for route in self.routes:
            for source in route.sources:
                pair = (source, route.target)
                coming[pair] = coming.get(pair, 0) + route.numel * itemsize
        return coming

    def hops(self) -> int:
        """The longest path that bytes take, in moves: 1 where every target reads from sources; 0 if nothing moves."""
        relays = {(route.target, route.sources, route.boxes): route.relay for route in self.routes if route.numel}
        longest = 0
        for target, sources, boxes in relays:
            count, at = 1, relays[target, sources, boxes]
            while at is not None:
                count, at = count + 1, relays[at, sources, boxes]
            longest = max(longest, count)
        return longest

    def explain(self, dtype: DtypeLike = "bfloat16", *, bandwidth: float = 50e9) -> Explanation:
        """This plan in numbers, text and pictures: `etha_ray.explain`, which see."""
        # The one look upwards in the package, and only when it is called: whoever has a plan looks for this here.
        from etha_ray.explanation import explain

        return explain(self, dtype=dtype, bandwidth=bandwidth)

    def digest(self) -> str:
        """A hash over both sides, the shape and every route: equal plans, equal digest, in any process. 64 hex digits."""
        return digest_inputs(
            (self.source.encode(), self.target.encode(), repr(self.shape), *(_encode_route(route) for route in self.routes))
        )


def plan(source: Side, target: Side, shape: Sequence[int], turn: int = 0) -> TensorPlan:
    """All routes that carry a tensor of ``shape`` from ``source`` to ``target``. ``turn`` as in `routes_into`.

    Raises:
        LayoutError: a layout does not fit the shape, the target's layout has a Partial, or no source holds some element.
    """
    wanted = tuple(shape)
    turned = turn_of(source, target, wanted, turn)
    # Past the cache: a whole plan would push out the few routes that this process's own agents need.
    into = (routes_of_target(source, target, wanted, index, turned) for index in range(target.layout.ranks))
    return TensorPlan(source, target, wanted, tuple(itertools.chain.from_iterable(into)))


def inputs_digest(source: Side, target: Side, tensors: Iterable[tuple[Sequence[int], str]]) -> str:
    """A hash over all that plans are made from: both sides and each tensor's global shape and dtype name, in order.

    Planning is a pure function of these, so sides that agree on this hash agree on every route.
    """
    described = (f"{dtype} {'x'.join(map(str, shape))}" for shape, dtype in tensors)
    return digest_inputs((source.encode(), target.encode(), *described))


def _encode_route(route: Route) -> str:
    boxes = ";".join(f"{box.source_start}{box.target_start}{box.size}" for box in route.boxes)
    return f"{'+'.join(map(str, route.sources))}>{route.target} {route.numel} {boxes} {route.relay}"
