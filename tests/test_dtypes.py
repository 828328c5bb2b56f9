from __future__ import annotations

import itertools

import pytest
import torch

from etha_ray.dtypes import CASTABLE, COMBINABLE, DTYPES, cast_loss, combine_dtype, combine_problem

PAIRS = list(itertools.product(sorted(CASTABLE, key=str), repeat=2))
INTEGERS = [dtype for dtype in sorted(CASTABLE, key=str) if not (dtype.is_floating_point or dtype.is_complex or dtype == torch.bool)]


def test_the_same_dtype_loses_nothing() -> None:
    for dtype in DTYPES.values():
        assert cast_loss(dtype, dtype) is None


@pytest.mark.parametrize(("source", "target"), PAIRS, ids=lambda dtype: str(dtype).removeprefix("torch."))
def test_what_torch_will_not_do_by_itself_is_lossy(source: torch.dtype, target: torch.dtype) -> None:
    """`torch.can_cast` is about kinds only: besides them, integers must fit, and float8_e8m0fnu holds scales."""
    loss = cast_loss(source, target)
    if not torch.can_cast(source, target):
        assert loss is not None
    elif loss is not None:
        assert source != target
        assert target == torch.float8_e8m0fnu or (not target.is_floating_point and not target.is_complex)


@pytest.mark.parametrize(("source", "target"), list(itertools.product(INTEGERS, repeat=2)))
def test_integers_are_kept_or_lossy(source: torch.dtype, target: torch.dtype) -> None:
    have, wanted = torch.iinfo(target), torch.iinfo(source)
    ends = [int(torch.tensor(end, dtype=source).to(target).item()) for end in (wanted.min, wanted.max)]
    assert (cast_loss(source, target) is None) == (ends == [wanted.min, wanted.max]) == (have.min <= wanted.min and wanted.max <= have.max)


@pytest.mark.parametrize(
    ("source", "target", "words"),
    [
        (torch.float32, torch.int64, "integers cannot keep real numbers"),
        (torch.complex64, torch.float64, "real numbers cannot keep complex numbers"),
        (torch.int8, torch.bool, "truth values cannot keep integers"),
        (torch.int64, torch.int32, "-2147483648 to 2147483647, and what does not fit wraps around"),
        (torch.int8, torch.uint64, "0 to 18446744073709551615"),
        (torch.float32, torch.float8_e8m0fnu, "neither sign nor zero"),
        (torch.float64, torch.float8_e4m3fn, None),
        (torch.int64, torch.float16, None),
        (torch.uint8, torch.int16, None),
        (torch.bool, torch.complex32, None),
    ],
    ids=str,
)
def test_losses_in_words(source: torch.dtype, target: torch.dtype, words: str | None) -> None:
    loss = cast_loss(source, target)
    assert loss is None if words is None else loss is not None and words in loss


def test_every_float_integer_bool_and_complex_of_torch_can_be_cast() -> None:
    for name, dtype in DTYPES.items():
        numbers = name.startswith(("bfloat", "float", "complex", "bool")) or name in ("int8", "int16", "int32", "int64")
        numbers = numbers or name in ("uint8", "uint16", "uint32", "uint64")
        assert (dtype in CASTABLE) == (numbers and not name.startswith("float4")), name


def test_combining() -> None:
    for dtype in COMBINABLE:
        assert combine_problem(dtype, "sum") is None
        assert combine_dtype(dtype).itemsize >= dtype.itemsize
    assert combine_dtype(torch.bfloat16) == combine_dtype(torch.float8_e5m2) == torch.float32
    assert combine_dtype(torch.float64) == torch.float64
    for dtype, op, divisor, words in (
        (torch.uint32, "sum", 1, "torch.uint32 cannot be combined"),
        (torch.complex64, "max", 1, "sum and avg, not by max"),
        (torch.int32, "sum", 2, "an avg of torch.int32"),
        (torch.float4_e2m1fn_x2, "sum", 1, "cannot be combined"),
    ):
        problem = combine_problem(dtype, op, divisor)
        assert problem is not None
        assert words in problem
