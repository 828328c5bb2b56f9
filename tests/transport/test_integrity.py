"""Bytes that change on their way, through a proxy that turns a bit of them; and copies within a host that go wrong."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import pytest
import torch

from etha_ray.errors import IntegrityError
from etha_ray.transport import Copy, CopyProgram, MappedTransport, OneSidedTransport
from etha_ray.transport.checked import CheckedTransport, differing
from etha_ray.transport.cutting import as_bits
from etha_ray.transport.network import NetworkTransport, Read, RemoteRegion
from tests.contracts.transport import OneSidedTransportContract, bits, combination, numbers, random_tensor
from tests.net.pair import SECRET, Pair, Relay

SOURCES = {
    "straight into the target": [random_tensor((1 << 20,), torch.float32, 0)],
    "through staging memory": [random_tensor((64, 128, 2), torch.complex128, 0)[..., 0]],
    "long runs": [random_tensor((64, 4096), torch.bfloat16, 0)[:, :2048]],
    "small ones together": [random_tensor((99, 3), torch.float8_e4m3fn, seed) for seed in range(40)],
}


@pytest.mark.parametrize("sources", SOURCES.values(), ids=SOURCES)
def test_one_bit_is_noticed_and_reading_again_is_right(sources: list[torch.Tensor], pair: Pair, relay: Relay) -> None:
    pair.owner.export("x", sources)
    targets = [torch.zeros_like(each) for each in sources]
    reads = [
        Read(RemoteRegion(relay.address, "x", index, (0,) * each.dim(), tuple(each.shape), each.dtype), target, f"tensor {index} of ours")
        for index, (each, target) in enumerate(zip(sources, targets, strict=True))
    ]
    program = pair.reader.prepare(reads)
    for _ in range(2):
        relay.flip.set()
        with pytest.raises(IntegrityError, match=rf"tensor \d+ of ours, \[.*\] elements from \[.*\] .*agent at {relay.address}"):
            program.run()
        assert not relay.flip.is_set()
        assert program.unfinished() == frozenset(range(len(sources)))
        program.run()
        assert all(bits(source) == bits(target) for source, target in zip(sources, targets, strict=True))


def test_off_means_off(pair: Pair, relay: Relay) -> None:
    source, target = torch.zeros(1 << 20, dtype=torch.uint8), torch.zeros(1 << 20, dtype=torch.uint8)
    pair.owner.export("x", [source])
    with contextlib.closing(NetworkTransport(SECRET, checksums=False)) as reader:
        program = reader.prepare([Read(RemoteRegion(relay.address, "x", 0, (0,), (1 << 20,), torch.uint8), target)])
        relay.flip.set()
        program.run()
        assert target.sum() == 1


class Flipping(MappedTransport):
    """Turns a bit of the last target after each copy, while ``on``."""

    on = True

    def prepare(self, copies: Sequence[Copy]) -> CopyProgram:  # type: ignore[override]
        program, transport = super().prepare(copies), self

        class Flip(CopyProgram):
            nbytes = program.nbytes

            def run(self) -> int:
                count = program.run()
                if transport.on:
                    copies[-1].target.view(torch.uint8).reshape(-1)[-1:] ^= 64
                return count

        return Flip()


@pytest.mark.parametrize("dtype", [torch.bool, torch.bfloat16, torch.float64, torch.complex128, torch.float8_e5m2])
def test_a_copy_that_went_wrong_is_noticed(dtype: torch.dtype) -> None:
    with contextlib.closing(Flipping(1)) as inner:
        whole = random_tensor((70, 9, 3), dtype, 1)
        sources = [random_tensor((5,), dtype, 2), whole[:, 2:7, 1]]
        targets = [torch.zeros(5, dtype=dtype), torch.zeros(70, 5, dtype=dtype)]
        copies = [Copy((s,), t, name=f"tensor {n} of ours") for n, (s, t) in enumerate(zip(sources, targets, strict=True))]
        program = CheckedTransport(inner).prepare(copies)
        with pytest.raises(IntegrityError, match="tensor 1 of ours: what was copied"):
            program.run()
        assert program.unfinished() == frozenset({1})
        inner.on = False
        assert program.run() == program.nbytes


COMPUTED = [
    ((torch.float32,), torch.bfloat16, None),
    ((torch.bfloat16,), torch.float64, None),
    ((torch.complex64,), torch.float16, None),
    ((torch.bfloat16,) * 3, torch.bfloat16, "avg"),
    ((torch.complex64,) * 2, torch.complex128, "sum"),
    ((torch.int16,) * 2, torch.int16, "max"),
]


@pytest.mark.parametrize(("dtypes", "target_dtype", "op"), COMPUTED)
def test_what_is_computed_is_computed_again(dtypes: tuple[torch.dtype, ...], target_dtype: torch.dtype, op: str | None) -> None:
    with contextlib.closing(Flipping(1)) as inner:
        sources = tuple(numbers((2000, 9), dtype, seed)[:, 2:7] for seed, dtype in enumerate(dtypes))
        target = torch.zeros((2000, 5), dtype=target_dtype)
        copy = Copy(sources, target) if op is None else combination(sources, target, op)
        program = CheckedTransport(inner).prepare([copy])
        with pytest.raises(IntegrityError, match="copy 0: what was copied"):
            program.run()
        inner.on = False
        assert program.run() == program.nbytes


class TestChecked(OneSidedTransportContract):
    """No copy that went well is taken for one that did not."""

    @pytest.fixture
    def transport(self) -> Iterator[OneSidedTransport]:
        with contextlib.closing(CheckedTransport(MappedTransport(threads=1))) as transport:
            yield transport


def test_a_nan_is_what_it_is() -> None:
    with contextlib.closing(CheckedTransport(MappedTransport(1))) as transport:
        source = torch.full((100, 2), float("nan"), dtype=torch.complex128)[:, 0]
        transport.prepare([Copy((source,), torch.zeros(100, dtype=torch.complex128))]).run()


@pytest.mark.parametrize("dtype", [torch.bool, torch.bfloat16, torch.float64, torch.complex128, torch.float8_e5m2, torch.float4_e2m1fn_x2])
def test_comparing_as_it_is_done_on_a_device(dtype: torch.dtype) -> None:
    whole = random_tensor((70, 9, 3), dtype, 1)
    for source in (whole, whole[:, 2:7, 1], whole[1, 1, 1]):
        target = torch.empty(source.shape, dtype=dtype)
        as_bits(target).copy_(as_bits(source))
        assert not any(differing(target, source))
        as_bits(target).reshape(-1).view(torch.uint8)[-1:] ^= 64
        assert any(differing(target, source))
