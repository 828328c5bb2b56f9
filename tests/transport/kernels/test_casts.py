"""Casts by the kernel against torch's, over all bit patterns of 16 bits and those of 32 and 64 where rounding could go wrong."""

from __future__ import annotations

import itertools

import pytest
import torch

from etha_ray.transport import Copy, MappedTransport
from etha_ray.transport.cutting import as_bits
from etha_ray.transport.kernels import KernelTransport
from tests.accelerator.host import HostAccelerator

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
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


@pytest.mark.parametrize(("source", "target"), list(itertools.permutations(FLOATS, 2)), ids=str)
@pytest.mark.parametrize("step", [1, 3], ids=["together", "apart"])
def test_casts_are_torchs(source: torch.dtype, target: torch.dtype, step: int) -> None:
    accelerator = HostAccelerator()
    values = patterns(source)[1:]  # an odd number, so that a part of them is left over
    apart = torch.zeros(len(values), step, dtype=source)[:, 0]
    as_bits(apart).copy_(as_bits(values))
    made = torch.zeros(len(values), step, dtype=target)[:, 0]
    KernelTransport(accelerator, MappedTransport(1)).prepare([Copy((apart,), made)]).run()
    assert accelerator.launched == ["copy_regions"]
    assert_same(made, apart.to(target))


def test_known_values() -> None:
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
    made = torch.zeros(len(cases), dtype=torch.float16)
    KernelTransport(HostAccelerator(), MappedTransport(1)).prepare([Copy((torch.tensor(list(cases)),), made)]).run()
    assert made.view(torch.uint16).tolist() == list(cases.values())


def test_a_nan_keeps_its_sign_and_is_never_infinite() -> None:
    nans = torch.tensor([0x7F800001, 0xFF800001 - (1 << 32), 0x7FFFFFFF, 0xFFFFFFFF - (1 << 32)], dtype=torch.int32).view(torch.float32)
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        made = torch.zeros(4, dtype=dtype)
        KernelTransport(HostAccelerator(), MappedTransport(1)).prepare([Copy((nans,), made)]).run()
        assert made.isnan().all()
        assert made.signbit().tolist() == [False, True, False, True]
