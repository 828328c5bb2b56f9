"""Checksums of messages against the same worked out in Python, however they are cut and wherever they lie."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from etha_ray.errors import TensorMismatchError, WrongDeviceError
from etha_ray.transport.kernels import MessageSums
from etha_ray.transport.kernels.source import SUM_TILE
from tests.accelerator.host import HostAccelerator
from tests.contracts.transport import random_bytes, random_tensor

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


def sums(messages: list[list[torch.Tensor]], width: int = 3) -> list[int]:
    accelerator = HostAccelerator()
    accelerator.width = width
    made = MessageSums(accelerator, messages)
    lane = accelerator.lane()
    made.enqueue(lane)
    made.enqueue(lane)  # taken again, they are not added to those before
    return made.values()


def pieces(data: torch.Tensor, cuts: list[int], leads: list[int]) -> list[torch.Tensor]:
    """``data`` in pieces, each at an address of its own."""
    places = sorted({min(cut, len(data)) for cut in cuts} | {0, len(data)})
    parts = []
    for number, (start, stop) in enumerate(itertools.pairwise(places)):
        lead = leads[number % len(leads)]
        memory = torch.zeros(stop - start + 8, dtype=torch.uint8)
        memory[lead : lead + stop - start] = data[start:stop]
        parts.append(memory[lead : lead + stop - start])
    return parts


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 300), st.lists(st.integers(0, 300), max_size=8), st.lists(st.integers(0, 7), min_size=1, max_size=4))
def test_however_a_message_is_cut(size: int, cuts: list[int], leads: list[int]) -> None:
    data = random_bytes(size, seed=size)
    assert sums([pieces(data, cuts, leads)]) == [reference(data.numpy().tobytes())]


def test_many_messages_at_once() -> None:
    messages = [random_bytes(size, seed=size) for size in [0, 1, 7, 8, 9, 64, 1000, 8 * SUM_TILE - 1, 8 * SUM_TILE + 8, 600_000, 0, 3]]
    wanted = [reference(message.numpy().tobytes()) for message in messages]
    for width in (1, 2, 7, 100):
        assert sums([[message] for message in messages], width) == wanted
    cut = [pieces(message, list(range(0, len(message), 999)), [0, 1, 2, 4]) for message in messages]
    assert sums(cut) == wanted


def test_no_messages() -> None:
    assert sums([]) == []
    assert sums([[]]) == sums([[torch.zeros(0)]]) == [reference(b"")]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e5m2, torch.complex128, torch.bool, torch.float4_e2m1fn_x2], ids=str)
def test_every_dtype_is_bytes(dtype: torch.dtype) -> None:
    tensor = random_tensor((33, 7), dtype)
    assert sums([[tensor]]) == [reference(tensor.view(torch.uint8).numpy().tobytes())]


def test_any_change_shows() -> None:
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
    found = sums([[each] for each in changed])
    assert len(same | set(found)) == len(changed) + 1


def test_what_cannot_be_summed_is_named() -> None:
    with pytest.raises(TensorMismatchError, match=r"message 1, piece 0: strides \(1, 5\)"):
        MessageSums(HostAccelerator(), [[torch.zeros(2)], [torch.zeros(4, 5).t()]])
    with pytest.raises(WrongDeviceError, match="message 0, piece 1: a meta tensor"):
        MessageSums(HostAccelerator(), [[torch.zeros(2), torch.zeros(2, device="meta")]])
