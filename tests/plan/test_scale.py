"""What one agent of thousands works out, for the shapes of a mixture of experts with 671 billion parameters.

The experts of a layer are stacked; training shards rows (FSDP) and experts, the target shards heads (tensor parallel) and
experts. Time is not measured here: calls of functions are counted, which is the same in every run.
"""

from __future__ import annotations

import itertools
import sys
import tracemalloc
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import pytest

from etha_ray.layout import Layout, Pieces
from etha_ray.plan import Route, Side, routes_into, routes_out_of, turns

HIDDEN = 7168

DENSE = [  # (shape, token that tensor parallelism gives it), per layer
    ((1536, HIDDEN), "R"),
    ((1536,), "R"),
    ((128 * 192, 1536), "S0"),
    ((576, HIDDEN), "R"),
    ((512,), "R"),
    ((128 * 256, 512), "S0"),
    ((HIDDEN, 128 * 128), "S1"),
    ((HIDDEN,), "R"),
    ((HIDDEN,), "R"),
    ((256, HIDDEN), "R"),
    ((256,), "R"),
    ((2048, HIDDEN), "S0"),
    ((2048, HIDDEN), "S0"),
    ((HIDDEN, 2048), "S1"),
]
EXPERTS = [((256, 2048, HIDDEN), "S1"), ((256, 2048, HIDDEN), "S1"), ((256, HIDDEN, 2048), "S2")]


@pytest.fixture(autouse=True)
def _cold() -> None:
    """As in a new process: nothing is remembered from other tests."""
    for name, module in list(sys.modules.items()):
        if name.startswith(("etha_ray.plan.", "etha_ray.layout.")):
            for value in vars(module).values():
                if hasattr(value, "cache_clear"):
                    value.cache_clear()


class Groups:
    """``fsdp`` x ``experts`` ranks that give to ``tp`` x ``target_experts``, eight agents a host."""

    def __init__(self, fsdp: int, experts: int, tp: int, target_experts: int) -> None:
        self.source, self.target = (fsdp, experts), (tp, target_experts)
        self.side = cache(self._side)

    def _side(self, mesh: tuple[int, int], tokens: tuple[str, str], first: int, host: str) -> Side:
        layout = Layout(mesh, tokens)
        return Side(layout, tuple(range(first, first + layout.ranks)), tuple(f"{host}{index // 8}" for index in range(layout.ranks)))

    def tensors(self, layers: int) -> Iterator[tuple[Side, Side, tuple[int, ...]]]:
        for _ in range(layers):
            for shape, token in DENSE:
                yield self._pair(("S0", "R"), (token, "R"), shape)
            for shape, token in EXPERTS:
                yield self._pair(("S1", "S0"), (token, "S0"), shape)

    def _pair(self, source: tuple[str, str], target: tuple[str, str], shape: tuple[int, ...]) -> tuple[Side, Side, tuple[int, ...]]:
        return self.side(self.source, source, 0, "a"), self.side(self.target, target, 1 << 20, "b"), shape

    def routes(self, layers: int, call: Callable[..., tuple[Route, ...]], index: int) -> list[tuple[Route, ...]]:
        """What ``call`` says of each tensor to the rank at ``index``."""
        tensors = list(self.tensors(layers))
        return [call(*tensor, index, turn) for tensor, turn in zip(tensors, turns(shape for *_, shape in tensors), strict=True)]


def calls(work: Callable[[], Any]) -> int:
    """Functions called in ``work``."""
    count = 0

    def called(_frame: object, event: str, _arg: object) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(called)
    try:
        work()
    finally:
        sys.setprofile(None)
    return count


@pytest.mark.parametrize("groups", [(64, 16, 8, 64), (256, 16, 16, 256)], ids=["1024 to 512", "4096 to 4096"])
@pytest.mark.parametrize("call", [routes_into, routes_out_of])
def test_work_grows_with_what_a_rank_exchanges(groups: tuple[int, int, int, int], call: Callable[..., tuple[Route, ...]]) -> None:
    here = Groups(*groups)
    found: list[tuple[Route, ...]] = []
    spent = calls(lambda: found.extend(here.routes(1, call, 77)))
    assert spent < 550 * sum(map(len, found)) + 3000 * len(found), "so many a route and a tensor, whatever the size of the groups"
    more: list[tuple[Route, ...]] = []
    here.routes(20, call, 77)
    again = calls(lambda: more.extend(here.routes(20, call, 77)))
    assert again < 60 * sum(map(len, more)), "equal tensors are planned once for each replica that may give them"


def test_both_sides_of_a_large_plan_agree() -> None:
    here = Groups(64, 16, 8, 64)
    into = here.routes(1, routes_into, 300)
    for position, routes in enumerate(into):
        for route in routes[:: max(1, len(routes) // 4)]:
            assert route in here.routes(1, routes_out_of, route.source)[position]


def test_experts_come_from_those_who_hold_them() -> None:
    source, target, shape = list(Groups(64, 16, 8, 64).tensors(1))[-3]
    into = routes_into(source, target, shape, 300)
    # A target has 4 of 256 experts and an eighth of their 2048 rows: 8 of the 64 pieces of 32 rows, of one group of experts.
    assert [route.numel for route in into] == [4 * 32 * HIDDEN] * 8
    assert len({source.layout.coordinate(route.source)[1] for route in into}) == 1  # type: ignore[union-attr]


def test_memory_of_one_agent() -> None:
    here = Groups(64, 16, 8, 64)
    tracemalloc.start()
    try:
        kept = here.routes(61, routes_into, 77), here.routes(61, routes_out_of, 77)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert kept
    assert peak < 30 * 2**20


def test_explicit_pieces_of_thousands() -> None:
    """Ragged experts: everyone reads what all ranks said, but looks only at the boxes near its own."""
    ends = [0]
    for number in range(2048):
        ends.append(ends[-1] + 1 + number * 7919 % 13)
    shape = (ends[-1], 64)
    pieces = Pieces(shape, tuple(((start, 0), (stop - start, 64)) for start, stop in itertools.pairwise(ends)))
    source = Side(pieces, tuple(range(2048)), tuple(f"a{index // 8}" for index in range(2048)))
    target = Side(Layout.decode("512: S0"), tuple(range(9000, 9512)), tuple(f"b{index // 8}" for index in range(512)))
    routes_into(source, target, shape, 0)
    found: list[tuple[Route, ...]] = []
    spent = calls(lambda: found.extend(routes_into(source, target, shape, index) for index in range(100, 110)))
    assert spent < 200 * sum(map(len, found))
    for index, routes in enumerate(found, 100):
        assert all(route in routes_out_of(source, target, shape, route.source) for route in routes)
        assert sum(route.numel for route in routes) == target.layout.region(index, shape).numel
