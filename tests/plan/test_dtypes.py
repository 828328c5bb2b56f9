"""Any dtype in any layout: the plan, carried out by the transport of one host, gives each target what DTensor says it holds."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch.distributed.tensor import Partial, Replicate

from etha_ray.dtypes import CASTABLE, COMBINABLE, DTYPES, combine_problem
from etha_ray.layout import Layout
from etha_ray.plan import Side, routes_into
from etha_ray.transport.base import Copy
from etha_ray.transport.mapped import MappedTransport
from tests.contracts.transport import bits, cast, random_tensor, same
from tests.contracts.transport import numbers as any_numbers
from tests.layout.dtensor import WORLD, as_torch, combined, held, playing
from tests.layout.strategies import cases, layouts, pairs_of_sides, shapes
from tests.plan.apply import slices

Case = tuple[Side, Side, tuple[int, ...]]

ALL = st.sampled_from(sorted((dtype for dtype in DTYPES.values() if dtype in CASTABLE), key=str))
"""Every torch float, float8 kinds included, integer, bool and complex."""

WIDTHS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@pytest.fixture(autouse=True, scope="module")
def _processes() -> Iterator[None]:
    with playing(0, WORLD):
        yield


@pytest.fixture(scope="module")
def transport() -> Iterator[MappedTransport]:
    made = MappedTransport(threads=2)
    yield made
    made.close()


@st.composite
def moves(draw: st.DrawFn) -> Case:
    shape = draw(shapes())
    return *draw(pairs_of_sides(draw(layouts(len(shape))), draw(layouts(len(shape))))), shape


@st.composite
def reductions(draw: st.DrawFn) -> Case:
    shape = draw(shapes())
    op = draw(st.sampled_from(["sum", "avg", "max", "min", "product"]))
    source = draw(layouts(len(shape), partial=(op,), max_ranks=16))
    return *draw(pairs_of_sides(source, draw(layouts(len(shape))))), shape


def parts(whole: torch.Tensor, layout: Layout) -> list[torch.Tensor]:
    """What `distribute_tensor` gives each rank, as bits: torch cannot split every dtype."""
    words = whole.view(WIDTHS.get(whole.dtype.itemsize, whole.dtype))
    return [part.contiguous().view(whole.dtype) for part in held(words, layout)]


def carry_out(transport: MappedTransport, case: Case, given: list[torch.Tensor], targets: list[torch.Tensor]) -> None:
    """Fill the targets from what the source's ranks hold."""
    source, target, shape = case
    assert isinstance(source.layout, Layout)
    partial = source.layout.partial
    copies = []
    for index, into in enumerate(targets):
        for route in routes_into(source, target, shape, index):
            for box in route.boxes:
                views = tuple(given[at][slices(box.source_start, box.size)] for at in route.sources)
                here = into[slices(box.target_start, box.size)]
                reduce = (None, 1) if partial is None or not route.others else (partial.op, partial.divisor)
                copies.append(Copy(views, here, *reduce))
    transport.prepare(copies).run()


@cases(300)
@given(moves(), ALL, ALL)
def test_every_target_gets_its_slice_in_its_dtype(transport: MappedTransport, case: Case, dtype: torch.dtype, other: torch.dtype) -> None:
    source, target, shape = case
    assert isinstance(source.layout, Layout)
    assert isinstance(target.layout, Layout)
    whole = random_tensor(shape, dtype) if dtype == other else any_numbers(shape, dtype)
    wanted = parts(whole if dtype == other else cast(whole, other), target.layout)
    got = [torch.empty_like(part) for part in wanted]
    carry_out(transport, case, parts(whole, source.layout), got)
    for mine, expected in zip(got, wanted, strict=True):
        assert bits(mine) == bits(expected) if dtype == other else same(mine, expected)


def contribution(shape: tuple[int, ...], dtype: torch.dtype, op: str, number: int) -> torch.Tensor:
    """Numbers whose sums and products are exact wherever they are computed."""
    if op != "product":
        return any_numbers(shape, dtype, number)
    generator = torch.Generator().manual_seed(number)
    return torch.tensor([0.5, 1, 2, 1])[torch.randint(0, 4, shape, generator=generator)].to(dtype)


def wide(tensor: torch.Tensor) -> torch.Tensor:
    """In 64 bits, as DTensor divides for each mesh dimension and etha_ray once; truth values as integers, as all_reduce takes them."""
    if tensor.dtype.is_complex:
        return tensor.to(torch.complex128)
    if tensor.dtype.is_floating_point:
        return tensor.to(torch.float64)
    return tensor.to(torch.int64) if tensor.dtype == torch.bool else tensor


def narrow(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """What `wide` was made of: floats by way of 32 bits, which takes away what 64 bits have rounded."""
    if dtype in (torch.float64, torch.complex128) or not (dtype.is_floating_point or dtype.is_complex):
        return cast(tensor, dtype)
    return cast(tensor.to(torch.complex64 if dtype.is_complex else torch.float32), dtype)


@cases(150)
@given(reductions(), st.sampled_from(sorted(COMBINABLE, key=str)), ALL)
def test_contributions_of_any_dtype_are_combined_as_dtensor_does(
    transport: MappedTransport, case: Case, dtype: torch.dtype, other: torch.dtype
) -> None:
    source, target, shape = case
    assert isinstance(source.layout, Layout)
    assert isinstance(target.layout, Layout)
    reduction = source.layout.partial
    assert reduction is not None
    assume(combine_problem(dtype, reduction.op, reduction.divisor) is None)
    averaged_in_64_bits = reduction.divisor > 1 and dtype in (torch.float64, torch.complex128)
    assume(not averaged_in_64_bits or other == dtype)
    numbers = [sum(source.layout.coordinate(i)[dim] * 10**k for k, dim in enumerate(reduction.dims)) for i in range(source.layout.ranks)]
    whole = [contribution(shape, dtype, reduction.op, number) for number in numbers]
    unsharded = [placement if isinstance(placement, Partial) else Replicate() for placement in as_torch(source.layout)]
    truth = narrow(combined(source.layout, unsharded, shape, lambda index: wide(whole[index])), dtype)
    unreduced = Layout(source.layout.mesh_shape, tuple("R" if token.startswith("P") else token for token in source.layout.placements))
    wanted = parts(truth if dtype == other else cast(truth, other), target.layout)
    got = [torch.empty_like(part) for part in wanted]
    carry_out(transport, case, [parts(each, unreduced)[index] for index, each in enumerate(whole)], got)
    for mine, expected in zip(got, wanted, strict=True):
        if averaged_in_64_bits:
            torch.testing.assert_close(mine, expected)
        else:
            assert same(mine, expected)
