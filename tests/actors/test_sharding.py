from __future__ import annotations

import pytest
import torch

from actors.sharding import differences, digest, spoil

RIGHT = {"a": "11", "b": "22"}


def test_equal_digests_differ_nowhere() -> None:
    assert differences([RIGHT, dict(RIGHT)], [dict(RIGHT)] * 3) == []


def test_every_rank_that_holds_other_bits_is_named() -> None:
    assert differences([RIGHT, RIGHT | {"a": "12"}], [RIGHT, RIGHT | {"b": "23"}]) == [
        "a: trainer 1 has 12, trainer 0 has 11",
        "b: generator 1 has 23, trainer 0 has 22",
    ]


def test_a_tensor_that_is_missing_or_too_many_is_a_difference() -> None:
    assert differences([RIGHT], [{"a": "11", "c": "33"}]) == [
        "b: generator 0 has nothing, trainer 0 has 22",
        "c: generator 0 has 33, trainer 0 has nothing",
    ]


def test_one_flipped_bit_changes_the_digest() -> None:
    tensor = torch.arange(1000.0)
    before = digest(tensor)
    tensor.view(torch.int32)[777] ^= 1
    assert digest(tensor) != before


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool])
@pytest.mark.parametrize("shape", [(), (3, 4), (0, 5)])
def test_spoiled_tensors_keep_nothing_of_what_they_held(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    tensor = torch.zeros(shape, dtype=dtype)
    spoil([tensor])
    assert tensor.dtype == dtype
    assert tensor.shape == shape
    assert not (tensor == 0).any()
