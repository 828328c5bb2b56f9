"""What the kernels do on every accelerator: a test class inherits `KernelsContract` and gives an `accelerator`."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from etha_ray.accelerator import Accelerator
from etha_ray.transport.cutting import as_bits
from etha_ray.transport.kernels import MessageSums
from etha_ray.transport.kernels.source import COPY_REGIONS, IN_PACKS, PACK, SUM_TILE, TILE
from etha_ray.transport.kernels.table import Region, regions_of, table_of
from tests.contracts.transport import bits, numbers, random_bytes, random_tensor

PLAIN = [torch.uint8, torch.bool, torch.bfloat16, torch.float32, torch.float64, torch.complex128, torch.float8_e4m3fn]
FLOATS = [torch.float32, torch.bfloat16, torch.float16, torch.float64]

# The same test runs on several accelerators: that is what it is for.
often = settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.differing_executors])


def moved(accelerator: Accelerator, source: torch.Tensor, target: torch.Tensor) -> list[Region]:
    """Runs the kernel; the regions that it was given."""
    regions = regions_of(source, target)
    assert regions is not None
    if regions:
        rows, first = table_of(regions)
        lane, tables = accelerator.lane(), (accelerator.upload(rows), accelerator.upload(first))
        lane.after(accelerator.current())
        accelerator.launch(COPY_REGIONS, 2, (*tables, len(rows), int(first[-1])), lane)
        lane.wait()
    return regions


SHAPES = st.lists(st.sampled_from([1, 2, 3, 4, 5, 8, 16, 33]), min_size=0, max_size=4)


@st.composite
def layouts(draw: st.DrawFn, dim: int) -> tuple[list[tuple[int, int, int]], list[int]]:
    """Margins before and after and a step for each dimension, and the order in which they lie in memory."""
    margins = [
        draw(st.tuples(st.sampled_from([0, 0, 1, 8]), st.sampled_from([0, 0, 2]), st.sampled_from([1, 1, 1, 2]))) for _ in range(dim)
    ]
    order = draw(st.permutations(range(dim))) if draw(st.booleans()) else list(range(dim))
    return margins, list(order)


def view_of(
    shape: list[int], layout: tuple[list[tuple[int, int, int]], list[int]], dtype: torch.dtype, seed: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """A view of ``shape`` that lies so in its memory, and that memory."""
    margins, order = layout
    held = [before + size * step + after for size, (before, after, step) in zip(shape, margins, strict=True)]
    memory = (numbers if dtype in FLOATS else random_tensor)(tuple(held[dim] for dim in order), dtype, seed).to(device)
    view = memory.permute([order.index(dim) for dim in range(len(shape))])
    for dim, (size, (before, _, step)) in enumerate(zip(shape, margins, strict=True)):
        view = view.narrow(dim, before, size * step)[(slice(None),) * dim + (slice(None, None, step),)]
    return view, memory


LOW_HALVES = (0, 1, 0xFFF, 0x1000, 0x1001, 0x1FFF, 0x2FFF, 0x3000, 0x3001, 0x7FFF, 0x8000, 0x8001, 0xFFFF)
"""Below, at and above what is half way between two numbers of 16 bits, for either kind of them and either parity."""


def patterns(dtype: torch.dtype) -> torch.Tensor:
    if dtype.itemsize == 2:
        return torch.arange(1 << 16, dtype=torch.int32).to(torch.uint16).view(dtype)
    high = torch.arange(1 << 16, dtype=torch.int64) << 16
    singles = (high[:, None] | torch.tensor(LOW_HALVES)).flatten().to(torch.uint32).view(torch.float32)
    if dtype == torch.float32:
        return singles
    exact = singles[::3].double()
    beside = (exact.view(torch.int64)[:, None] + torch.tensor([-1, 0, 1, 1 << 28])).flatten()
    return torch.cat([beside.view(torch.float64), torch.tensor([1e300, -1e300, 5e-324, -5e-324], dtype=torch.float64)])


def assert_same(made: torch.Tensor, wanted: torch.Tensor) -> None:
    """The same bits; but NaN is NaN, as torch's own payloads differ from path to path."""
    assert torch.equal(made.isnan(), wanted.isnan())
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}[made.itemsize]
    assert torch.equal(made.nan_to_num(0.0).view(integers), wanted.nan_to_num(0.0).view(integers))


MASK = (1 << 64) - 1


def reference(message: bytes) -> int:
    """As sums.py describes it, word by word."""

    def mixed(word: int, place: int) -> int:
        value = word ^ (place * 0x9E3779B97F4A7C15) & MASK
        value = ((value ^ (value >> 32)) * 0xD6E8FEB86659FD93) & MASK
        value = ((value ^ (value >> 32)) * 0xD6E8FEB86659FD93) & MASK
        return value ^ (value >> 32)

    words = [int.from_bytes(message[start : start + 8], "little") for start in range(0, len(message), 8)]
    return (sum(mixed(word, place) for place, word in enumerate(words, 1)) + mixed(len(message), 0)) & MASK


def pieces(data: torch.Tensor, cuts: Sequence[int], leads: list[int]) -> list[torch.Tensor]:
    """``data`` in pieces, each at an address of its own."""
    places = sorted({min(cut, len(data)) for cut in cuts} | {0, len(data)})
    parts = []
    for number, (start, stop) in enumerate(itertools.pairwise(places)):
        lead = leads[number % len(leads)]
        memory = torch.zeros(stop - start + 8, dtype=torch.uint8, device=data.device)
        memory[lead : lead + stop - start] = data[start:stop]
        parts.append(memory[lead : lead + stop - start])
    return parts


def sums(accelerator: Accelerator, messages: Sequence[Sequence[torch.Tensor]]) -> list[int]:
    made = MessageSums(accelerator, messages)
    lane = accelerator.lane()
    lane.after(accelerator.current())
    made.enqueue(lane)
    made.enqueue(lane)  # taken again, they are not added to those before
    lane.wait()
    return made.values()


class KernelsContract:
    @pytest.fixture(scope="class")
    @classmethod
    def accelerator(cls) -> Accelerator:
        raise NotImplementedError  # a subclass gives one

    # ----------------------------------------------------------------------------------------------------- copies

    @often
    @given(st.data(), SHAPES, st.sampled_from(PLAIN))
    def test_any_layouts(self, accelerator: Accelerator, data: st.DataObject, shape: list[int], dtype: torch.dtype) -> None:
        ways = [data.draw(layouts(len(shape))) for _ in range(2)]
        (source, _), (target, memory) = (view_of(shape, way, dtype, seed, accelerator.device) for seed, way in enumerate(ways))
        wanted = memory.clone()
        wanted.as_strided(target.shape, target.stride(), target.storage_offset()).copy_(source)
        regions = moved(accelerator, source, target)
        assert bits(memory) == bits(wanted)
        assert sum(region.units << region.kind for region in regions) == source.nbytes
        for region in regions:
            places = (region.source, region.target, *(step for _, *both in region.dims for step in both))
            assert all(place % (1 << region.kind) == 0 for place in places)

    @often
    @given(st.data(), SHAPES, st.sampled_from(FLOATS), st.sampled_from(FLOATS))
    def test_any_casts(self, accelerator: Accelerator, data: st.DataObject, shape: list[int], one: torch.dtype, other: torch.dtype) -> None:
        ways = [data.draw(layouts(len(shape))) for _ in range(2)]
        source, _ = view_of(shape, ways[0], one, 0, accelerator.device)
        target, memory = view_of(shape, ways[1], other, 1, accelerator.device)
        wanted = memory.clone()
        wanted.as_strided(target.shape, target.stride(), target.storage_offset()).copy_(source)
        regions = moved(accelerator, source, target)
        assert bits(memory) == bits(wanted)
        for region in regions:
            count = PACK if region.kind & IN_PACKS else 1
            for place, size in ((region.source, source.itemsize), (region.target, target.itemsize)):
                assert place % min(16, count * size) == 0

    @often
    @given(st.integers(0, 40), st.integers(0, 40), st.integers(1, 5 * TILE))
    def test_bytes_at_any_address(self, accelerator: Accelerator, lead: int, other: int, size: int) -> None:
        source, target = (random_bytes(6 * TILE, seed).to(accelerator.device) for seed in (0, 1))
        wanted = target.clone()
        wanted[other : other + size] = source[lead : lead + size]
        moved(accelerator, source[lead : lead + size], target[other : other + size])
        assert torch.equal(target, wanted)

    # ------------------------------------------------------------------------------------------------------ casts

    @pytest.mark.parametrize(("source", "target"), list(itertools.permutations(FLOATS, 2)), ids=str)
    @pytest.mark.parametrize("step", [1, 3], ids=["together", "apart"])
    def test_casts_are_torchs(self, accelerator: Accelerator, source: torch.dtype, target: torch.dtype, step: int) -> None:
        """Over all bit patterns of 16 bits, and those of 32 and 64 where rounding could go wrong."""
        values = patterns(source)[1:].to(accelerator.device)  # an odd number, so that a part of them is left over
        apart = torch.zeros(len(values), step, dtype=source, device=accelerator.device)[:, 0]
        as_bits(apart).copy_(as_bits(values))
        made = torch.zeros(len(values), step, dtype=target, device=accelerator.device)[:, 0]
        moved(accelerator, apart, made)
        assert_same(made, apart.to(target))

    def test_known_values(self, accelerator: Accelerator) -> None:
        """Not only torch's word for it."""
        cases = {
            65519.0: 0x7BFF,  # rounds down to the largest there is
            65520.0: 0x7C00,  # half way to 65536, which there is not
            2.0**-25: 0x0000,  # half of the smallest: to even
            1.5 * 2.0**-25: 0x0001,
            3 * 2.0**-25: 0x0002,
            -0.0: 0x8000,
            1.0 + 2.0**-11: 0x3C00,
            1.0 + 3 * 2.0**-11: 0x3C02,
        }
        made = torch.zeros(len(cases), dtype=torch.float16, device=accelerator.device)
        moved(accelerator, torch.tensor(list(cases), device=accelerator.device), made)
        assert made.view(torch.uint16).tolist() == list(cases.values())

    def test_a_nan_keeps_its_sign_and_is_never_infinite(self, accelerator: Accelerator) -> None:
        nans = torch.tensor([0x7F800001, 0xFF800001 - (1 << 32), 0x7FFFFFFF, 0xFFFFFFFF - (1 << 32)], dtype=torch.int32).view(torch.float32)
        for dtype in (torch.bfloat16, torch.float16):
            made = torch.zeros(4, dtype=dtype, device=accelerator.device)
            moved(accelerator, nans.to(accelerator.device), made)
            assert made.isnan().all()
            assert made.signbit().tolist() == [False, True, False, True]

    # ------------------------------------------------------------------------------------------------------- sums

    @often
    @given(st.integers(0, 300), st.lists(st.integers(0, 300), max_size=8), st.lists(st.integers(0, 7), min_size=1, max_size=4))
    def test_however_a_message_is_cut(self, accelerator: Accelerator, size: int, cuts: list[int], leads: list[int]) -> None:
        data = random_bytes(size, seed=size)
        assert sums(accelerator, [pieces(data.to(accelerator.device), cuts, leads)]) == [reference(data.numpy().tobytes())]

    def test_many_messages_at_once(self, accelerator: Accelerator) -> None:
        sizes = [0, 1, 7, 8, 9, 64, 1000, 8 * SUM_TILE - 1, 8 * SUM_TILE + 8, 600_000, 0, 3]
        messages = [random_bytes(size, seed=size) for size in sizes]
        wanted = [reference(message.numpy().tobytes()) for message in messages]
        there = [message.to(accelerator.device) for message in messages]
        assert sums(accelerator, [[message] for message in there]) == wanted
        assert sums(accelerator, [pieces(message, range(0, len(message), 999), [0, 1, 2, 4]) for message in there]) == wanted

    def test_no_messages(self, accelerator: Accelerator) -> None:
        assert sums(accelerator, []) == []
        assert sums(accelerator, [[], [torch.zeros(0, device=accelerator.device)]]) == [reference(b"")] * 2

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e5m2, torch.complex128, torch.bool, torch.float4_e2m1fn_x2], ids=str)
    def test_every_dtype_is_summed_as_bytes(self, accelerator: Accelerator, dtype: torch.dtype) -> None:
        tensor = random_tensor((33, 7), dtype)
        assert sums(accelerator, [[tensor.to(accelerator.device)]]) == [reference(bits(tensor))]

    def test_any_change_shows(self, accelerator: Accelerator) -> None:
        data = random_bytes(200)
        same = {reference(data.numpy().tobytes())}
        changed = [data[:-1], torch.cat([data, torch.zeros(1, dtype=torch.uint8)]), data.roll(8), data.flip(0)]
        for place in range(len(data)):
            turned = data.clone()
            turned[place] ^= 1 << place % 8
            changed.append(turned)
        swapped = data.view(torch.int64).clone()
        swapped[[3, 9]] = swapped[[9, 3]]
        changed.append(swapped.view(torch.uint8))
        found = sums(accelerator, [[each.to(accelerator.device)] for each in changed])
        assert len(same | set(found)) == len(changed) + 1
