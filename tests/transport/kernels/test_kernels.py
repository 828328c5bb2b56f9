"""The kernels on the CPU, compiled from the very text that a GPU gets."""

from __future__ import annotations

import itertools

import pytest
import torch

from etha_ray.errors import TensorMismatchError, WrongDeviceError
from etha_ray.transport.kernels import MessageSums
from tests.accelerator.host import HostAccelerator
from tests.contracts.kernels import FLOATS, KernelsContract, assert_same, moved, patterns, sums
from tests.contracts.transport import random_bytes


class TestKernels(KernelsContract):
    @pytest.fixture(scope="class")
    @classmethod
    def accelerator(cls) -> HostAccelerator:
        return HostAccelerator()


@pytest.mark.parametrize(("source", "target"), list(itertools.permutations(FLOATS, 2)), ids=str)
def test_numbers_that_the_processor_takes_for_zero_are_cast_all_the_same(source: torch.dtype, target: torch.dtype) -> None:
    """cupy has NVRTC compile everything so that floats below 2^-126 are zero; the CPU can be told the same."""
    values = patterns(source)
    wanted, made = values.to(target), torch.zeros(len(values), dtype=target)
    if not torch.set_flush_denormal(True):
        pytest.skip("this CPU always has such numbers")
    try:
        moved(HostAccelerator(), values, made)
    finally:
        torch.set_flush_denormal(False)
    assert_same(made, wanted)


def test_sums_do_not_depend_on_how_many_blocks_there_are() -> None:
    found = []
    for width in (1, 2, 7, 100):
        accelerator = HostAccelerator()
        accelerator.width = width
        found.append(sums(accelerator, [[random_bytes(900_000)], [random_bytes(12345)]]))
    assert found == [found[0]] * 4


def test_what_cannot_be_summed_is_named() -> None:
    with pytest.raises(TensorMismatchError, match=r"message 1, piece 0: strides \(1, 5\)"):
        MessageSums(HostAccelerator(), [[torch.zeros(2)], [torch.zeros(4, 5).t()]])
    with pytest.raises(WrongDeviceError, match="message 0, piece 1: a meta tensor"):
        MessageSums(HostAccelerator(), [[torch.zeros(2), torch.zeros(2, device="meta")]])
