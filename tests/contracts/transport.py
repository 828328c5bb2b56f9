"""What every one-sided transport promises. A test class inherits `OneSidedTransportContract` and gives a `transport`.

Tensors are made on torch's default device, so a class may have them on a GPU; what they should be is worked out on the CPU.
"""

from __future__ import annotations

import functools
import math
import threading
from collections.abc import Callable, Iterator

import pytest
import torch

from etha_ray import dtypes
from etha_ray.dtypes import combine_problem
from etha_ray.errors import TensorMismatchError, TransferError, WrongDeviceError
from etha_ray.transport import Copy, CopyProgram, OneSidedTransport

# float4 and the sub-byte integers too: what is of one dtype is moved bit for bit.
DTYPES = sorted(
    {v for v in vars(torch).values() if isinstance(v, torch.dtype) and "q" not in str(v)},
    key=str,
)
CASTABLE, COMBINABLE = sorted(dtypes.CASTABLE, key=str), sorted(dtypes.COMBINABLE, key=str)


def random_bytes(nbytes: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (nbytes,), dtype=torch.uint8, generator=generator, device="cpu").to(torch.get_default_device())


def random_tensor(shape: tuple[int, ...], dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> torch.Tensor:
    """Random bits, NaNs of every payload among them (but valid truth values for bool)."""
    count = 1
    for size in shape:
        count *= size
    data = random_bytes(count * dtype.itemsize, seed)
    if dtype == torch.bool:
        data %= 2
    return torch.empty(0, dtype=dtype).set_(data.untyped_storage(), 0, shape, torch.empty(shape, device="meta").stride())


def bits(tensor: torch.Tensor) -> bytes:
    """The tensor's elements, in order, as bytes."""
    width = tensor.dtype.itemsize
    as_int = tensor.detach().view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64, 16: torch.complex128}[width])
    return bytes(as_int.contiguous().cpu().numpy().tobytes())


def numbers(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    """Small numbers, which every dtype casts to every other in the same way on any path of torch's."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randint(0, 11, shape, generator=generator, device="cpu") / 2
    if dtype.is_floating_point and dtype != torch.float8_e8m0fnu:
        values -= 2.25
    if dtype.is_complex:
        values = torch.complex(values, -values)
    return cast(values, dtype).to(torch.get_default_device())


def cast(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return (torch.view_as_real(tensor)[..., 0] if tensor.dtype.is_complex and dtype not in COMPLEX_OR_BOOL else tensor).to(dtype)


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    """The same numbers; NaN is NaN, whatever its payload."""
    assert one.dtype == other.dtype
    one, other = one.cpu(), other.cpu()
    if one.dtype.is_complex:
        one, other = torch.view_as_real(one), torch.view_as_real(other)
    if one.dtype.is_floating_point:
        return torch.equal(one.double().nan_to_num(7e300), other.double().nan_to_num(7e300))
    return torch.equal(one, other)


def plain(source: torch.Tensor, target: torch.Tensor) -> Copy:
    return Copy((source,), target)


def combination(sources: tuple[torch.Tensor, ...], target: torch.Tensor, op: str) -> Copy:
    if op == "avg":
        return Copy(sources, target, "sum", len(sources))
    return Copy(sources, target, op)  # type: ignore[arg-type]


def combined(sources: tuple[torch.Tensor, ...], op: str) -> torch.Tensor:
    """What all_reduce would make of them, by way of float64 where floats are added up: sums here are exact in either."""
    dtype = sources[0].dtype
    wide = [cast(s.cpu(), WIDE.get(dtype, dtype)) for s in sources]
    total = functools.reduce(COMBINE[op], wide)
    if op == "avg":
        parts = torch.view_as_real(total) if total.dtype.is_complex else total
        parts /= len(sources)  # division of a complex number by another rounds more than once
    return cast(total, dtype)


COMPLEX_OR_BOOL = (torch.bool, torch.complex32, torch.complex64, torch.complex128)
WIDE = {dtype: torch.float64 for dtype in COMBINABLE if dtype.is_floating_point}
WIDE |= {dtype: torch.complex128 for dtype in COMBINABLE if dtype.is_complex}
COMBINE: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "sum": torch.add,
    "avg": torch.add,
    "product": torch.mul,
    "max": torch.maximum,
    "min": torch.minimum,
}


class OneSidedTransportContract:
    @pytest.fixture
    def transport(self) -> Iterator[OneSidedTransport]:
        raise NotImplementedError  # a subclass yields one, and closes it after

    def check(self, transport: OneSidedTransport, source: torch.Tensor, target: torch.Tensor) -> CopyProgram:
        wanted = bits(source)
        program = transport.prepare([Copy((source,), target)])
        assert program.nbytes == source.numel() * source.element_size()
        assert program.run() == program.nbytes
        assert bits(target) == wanted
        assert bits(source) == wanted
        return program

    def test_capabilities_are_data(self, transport: OneSidedTransport) -> None:
        assert transport.capabilities.one_sided
        assert "cpu" in transport.capabilities.devices

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_every_dtype_bit_for_bit(self, transport: OneSidedTransport, dtype: torch.dtype) -> None:
        self.check(transport, random_tensor((33, 70), dtype), random_tensor((33, 70), dtype, seed=1))
        wide = random_tensor((33, 70), dtype)
        self.check(transport, wide[:, 10:40], random_tensor((33, 35), dtype, seed=1)[:, 3:33])

    @pytest.mark.parametrize("shape", [(), (1,), (1, 1, 1), (7,), (0,), (3, 0, 5)])
    def test_small_shapes(self, transport: OneSidedTransport, shape: tuple[int, ...]) -> None:
        self.check(transport, random_tensor(shape), random_tensor(shape, seed=1))

    def test_requires_grad(self, transport: OneSidedTransport) -> None:
        source = torch.nn.Parameter(torch.randn(5, 3))
        target = torch.nn.Parameter(torch.zeros(5, 3))
        transport.prepare([Copy((source,), target)]).run()
        assert torch.equal(source, target)
        assert target.requires_grad

    @pytest.mark.parametrize("columns", [1, 2, 3, 4, 8, 30, 300, 1000])
    @pytest.mark.parametrize("offset", [0, 1, 4])
    def test_columns_of_both_sides(self, transport: OneSidedTransport, columns: int, offset: int) -> None:
        source = random_tensor((301, 1040))[:, offset : offset + columns]
        holder = random_tensor((301, 1024), seed=1)
        before = holder.clone()
        self.check(transport, source, holder[:, 16 : 16 + columns])
        assert bits(holder[:, :16]) == bits(before[:, :16])
        assert bits(holder[:, 16 + columns :]) == bits(before[:, 16 + columns :])

    @pytest.mark.parametrize("shape", [(130, 70), (1100, 900)])
    def test_transposed(self, transport: OneSidedTransport, shape: tuple[int, int]) -> None:
        rows, columns = shape
        self.check(transport, random_tensor((columns, rows)).t(), random_tensor(shape, seed=1))
        self.check(transport, random_tensor(shape), random_tensor((columns, rows), seed=1).t())
        self.check(transport, random_tensor((columns, rows)).t(), random_tensor((columns, rows), seed=1).t())

    def test_many_dimensions(self, transport: OneSidedTransport) -> None:
        source = random_tensor((6, 5, 40, 30, 20), torch.float32)
        self.check(transport, source.permute(2, 0, 4, 1, 3), random_tensor((40, 6, 20, 5, 30), torch.float32, seed=1))
        self.check(transport, source[1:5, ::2, 3:, 7:29, ::3], random_tensor((4, 3, 37, 22, 7), torch.float32, seed=1))

    def test_expanded_source(self, transport: OneSidedTransport) -> None:
        self.check(transport, random_tensor((1, 300)).expand(5000, 300), random_tensor((5000, 300), seed=1))

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.int64], ids=str)
    @pytest.mark.parametrize("lead", [1, 3, 8, 15])
    def test_odd_alignment(self, transport: OneSidedTransport, dtype: torch.dtype, lead: int) -> None:
        """Tensors at any byte, as in a packed file."""
        if torch.get_default_device().type != "cpu":
            pytest.skip("torch has such tensors on the CPU only")
        size = dtype.itemsize
        source_bytes = random_bytes(300_000 * size + lead).numpy()
        target_bytes = random_bytes(300_000 * size + 5, seed=1).numpy()
        source = torch.frombuffer(source_bytes, dtype=dtype, offset=lead).view(300, 1000)
        target = torch.frombuffer(target_bytes, dtype=dtype, offset=5).view(300, 1000)
        self.check(transport, source, target)
        self.check(transport, source[:, 2:402], target[:, 100:500])

    @pytest.mark.parametrize("shape", [(5_000_011,), (2, 3_000_000), (3, 2, 900_001), (4096, 1031)])
    def test_large(self, transport: OneSidedTransport, shape: tuple[int, ...]) -> None:
        self.check(transport, random_tensor(shape), random_tensor(shape, seed=1))

    def test_many_copies_in_one_program(self, transport: OneSidedTransport) -> None:
        sizes = [0, 1, 5, 2048, 16383, 16384, 16385, 700_000] * 60
        sources = [random_tensor((size,), seed=seed) for seed, size in enumerate(sizes)]
        targets = [torch.zeros(size, dtype=torch.bfloat16) for size in sizes]
        program = transport.prepare([Copy((source,), target) for source, target in zip(sources, targets, strict=True)])
        assert program.run() == 2 * sum(sizes)
        assert [bits(target) for target in targets] == [bits(source) for source in sources]

    def test_onto_itself(self, transport: OneSidedTransport) -> None:
        """Both sides of a pair may be the same memory."""
        for shape in [(50,), (700, 900)]:
            tensor = random_tensor(shape)
            self.check(transport, tensor, tensor)

    def test_no_copies(self, transport: OneSidedTransport) -> None:
        assert transport.prepare([]).run() == 0

    def test_a_program_moves_what_is_there_at_each_run(self, transport: OneSidedTransport) -> None:
        source, target = torch.zeros(600_000), torch.zeros(600_000)
        program = transport.prepare([Copy((source,), target)])
        assert not target.any()  # preparing moves nothing
        for version in range(1, 6):
            source.fill_(version)
            program.run()
            assert bits(target) == bits(source)

    def test_programs_on_several_threads(self, transport: OneSidedTransport) -> None:
        """Also two that read the same source."""
        source = random_tensor((1500, 1500))
        targets = [torch.zeros(1500, 1500, dtype=torch.bfloat16) for _ in range(6)]
        programs = [transport.prepare([plain(source[:, :700], t[:, :700]), plain(source[:, 700:], t[:, 700:])]) for t in targets]
        failures: list[str] = []

        def work(index: int) -> None:
            for _ in range(10):
                targets[index].zero_()
                if programs[index].run() != source.nbytes or bits(targets[index]) != bits(source):
                    failures.append(f"program {index}")

        threads = [threading.Thread(target=work, args=(index,)) for index in range(len(targets))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert failures == []

    def test_mismatches_are_named(self, transport: OneSidedTransport) -> None:
        good = plain(torch.zeros(2), torch.zeros(2))
        with pytest.raises(TensorMismatchError, match=r"copy 1: source is \(2, 3\) torch.float32, target is \(3, 2\)"):
            transport.prepare([good, plain(torch.zeros(2, 3), torch.zeros(3, 2))])
        with pytest.raises(TensorMismatchError, match=r"share memory.*contiguous"):
            transport.prepare([plain(torch.zeros(4, 3), torch.zeros(3).expand(4, 3))])
        with pytest.raises(TensorMismatchError, match="resolve_conj"):
            transport.prepare([plain(torch.zeros(4, dtype=torch.complex64).conj(), torch.zeros(4, dtype=torch.complex64))])
        with pytest.raises(TensorMismatchError, match=r"copy 0: torch.float4_e2m1fn_x2 cannot be cast to torch.uint8"):
            transport.prepare([plain(random_tensor((4,), torch.float4_e2m1fn_x2), torch.zeros(4, dtype=torch.uint8))])
        with pytest.raises(TensorMismatchError, match=r"copy 0: 2 sources and divisor 1 without an op"):
            transport.prepare([Copy((torch.zeros(2), torch.zeros(2)), torch.zeros(2))])
        with pytest.raises(TensorMismatchError, match=r"source is \(2,\) torch.float64"):
            transport.prepare([Copy((torch.zeros(2), torch.zeros(2, dtype=torch.float64)), torch.zeros(2), "sum")])

    # ------------------------------------------------------------------------------------------------------ casts

    @pytest.mark.parametrize("source_dtype", CASTABLE, ids=str)
    def test_every_cast_is_torchs_own(self, transport: OneSidedTransport, source_dtype: torch.dtype) -> None:
        """Also lossy ones: whether they are wanted is not asked here."""
        source = numbers((33, 70), source_dtype)
        for target_dtype in CASTABLE:
            target = numbers((33, 70), target_dtype, seed=1)
            self.check_cast(transport, source, target)
            self.check_cast(transport, source[:, 10:40], numbers((33, 35), target_dtype, seed=1)[:, 3:33])
            self.check_cast(transport, source.t(), numbers((70, 33), target_dtype, seed=1))

    def check_cast(self, transport: OneSidedTransport, source: torch.Tensor, target: torch.Tensor) -> None:
        before = bits(source)
        program = transport.prepare([plain(source, target)])
        assert program.run() == program.nbytes == source.numel() * source.element_size()
        assert same(target, cast(source, target.dtype)), (source.dtype, target.dtype)
        assert bits(source) == before

    @pytest.mark.parametrize("source_dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.float8_e5m2], ids=str)
    def test_infinities_nans_and_values_out_of_range(self, transport: OneSidedTransport, source_dtype: torch.dtype) -> None:
        values = [math.inf, -math.inf, math.nan, 0.0, -0.0, 1e-8, 1.0 + 2**-9, 448.0, 480.0, 57344.0, 65504.0, 1e38, -1e38]
        source = torch.tensor(values, dtype=torch.float64).repeat(1000).to(source_dtype)
        for target_dtype in CASTABLE:
            if target_dtype.is_floating_point or target_dtype.is_complex:
                self.check_cast(transport, source, numbers(tuple(source.shape), target_dtype))

    @pytest.mark.parametrize("shape", [(), (1,), (0,), (3, 0, 5), (7, 5_003), (2, 600_001), (1_300_003,)])
    def test_cast_of_every_size(self, transport: OneSidedTransport, shape: tuple[int, ...]) -> None:
        self.check_cast(transport, numbers(shape, torch.float32), numbers(shape, torch.bfloat16, seed=1))
        self.check_cast(transport, numbers(shape, torch.bfloat16), numbers(shape, torch.float32, seed=1))

    def test_cast_of_many_dimensions(self, transport: OneSidedTransport) -> None:
        source = numbers((6, 5, 40, 30, 20), torch.float32)
        self.check_cast(transport, source.permute(2, 0, 4, 1, 3), numbers((40, 6, 20, 5, 30), torch.bfloat16, seed=1))
        self.check_cast(transport, source[1:5, ::2, 3:, 7:29, ::3], numbers((4, 3, 37, 22, 7), torch.float16, seed=1))
        self.check_cast(transport, numbers((1, 300), torch.float32).expand(500, 300), numbers((500, 300), torch.bfloat16, seed=1))

    def test_casts_and_copies_in_one_program(self, transport: OneSidedTransport) -> None:
        dtypes = [torch.float32, torch.bfloat16, torch.float16]
        sizes = [0, 1, 2048, 16384, 16385, 300_000] * 6
        sources = [numbers((size,), dtypes[i % 3], seed=i) for i, size in enumerate(sizes)]
        targets = [numbers((size,), dtypes[i % 2], seed=99) for i, size in enumerate(sizes)]
        transport.prepare([plain(source, target) for source, target in zip(sources, targets, strict=True)]).run()
        for source, target in zip(sources, targets, strict=True):
            assert same(target, cast(source, target.dtype))

    # -------------------------------------------------------------------------------------------------- combining

    @pytest.mark.parametrize("dtype", COMBINABLE, ids=str)
    @pytest.mark.parametrize("op", ["sum", "avg", "max", "min", "product"])
    def test_every_combination_is_torchs_own(self, transport: OneSidedTransport, dtype: torch.dtype, op: str) -> None:
        for count in (2, 3, 7):
            sources = tuple(numbers((33, 70), dtype, seed=seed)[:, 5:65] for seed in range(count))
            self.check_combined(transport, sources, numbers((33, 61), dtype, seed=9)[:, 1:], op)

    def check_combined(self, transport: OneSidedTransport, sources: tuple[torch.Tensor, ...], target: torch.Tensor, op: str) -> None:
        copy = combination(sources, target, op)
        if combine_problem(sources[0].dtype, copy.op or "sum", copy.divisor):
            with pytest.raises(TensorMismatchError, match="copy 0: "):
                transport.prepare([copy])
            return
        before = [bits(source) for source in sources]
        program = transport.prepare([copy])
        assert program.run() == program.nbytes == sum(source.numel() * source.element_size() for source in sources)
        assert same(target, cast(combined(sources, op), target.dtype)), (sources[0].dtype, target.dtype, op)
        assert [bits(source) for source in sources] == before

    def test_sixteen_bits_are_summed_in_float32(self, transport: OneSidedTransport) -> None:
        """One after the other in bfloat16 these would stay at 256."""
        sources = (torch.full((5,), 256.0, dtype=torch.bfloat16), *(torch.ones(5, dtype=torch.bfloat16) for _ in range(255)))
        target = torch.zeros(5, dtype=torch.bfloat16)
        transport.prepare([Copy(sources, target, "sum")]).run()
        assert target.tolist() == [512.0] * 5  # 511, rounded once

    def test_the_sources_dtype_is_what_is_cast(self, transport: OneSidedTransport) -> None:
        sources = torch.tensor([256.0], dtype=torch.bfloat16), torch.tensor([1.0], dtype=torch.bfloat16)
        target = torch.zeros(1)
        transport.prepare([Copy(sources, target, "sum")]).run()
        assert target.item() == 256.0

    def test_sums_beyond_and_not_a_number(self, transport: OneSidedTransport) -> None:
        for op in ("sum", "max", "min", "product", "avg"):
            one = torch.tensor([60000.0, math.inf, -math.inf, math.nan, 1.0], dtype=torch.float16)
            two = torch.tensor([60000.0, 1.0, math.inf, 1.0, math.nan], dtype=torch.float16)
            self.check_combined(transport, (one, two), torch.zeros(5, dtype=torch.float16), op)
        self.check_combined(transport, (torch.full((3,), 100, dtype=torch.int8),) * 2, torch.zeros(3, dtype=torch.int8), "sum")

    @pytest.mark.parametrize("target_dtype", [torch.float64, torch.float16, torch.float8_e4m3fn, torch.int32, torch.complex64], ids=str)
    def test_combined_then_cast(self, transport: OneSidedTransport, target_dtype: torch.dtype) -> None:
        for dtype in (torch.bfloat16, torch.float32, torch.complex64, torch.complex32):
            sources = tuple(numbers((70, 33), dtype, seed=seed).t() for seed in range(3))
            self.check_combined(transport, sources, numbers((33, 70), target_dtype, seed=9), "sum")

    @pytest.mark.parametrize("shape", [(), (1,), (0,), (3, 0, 5), (7, 5_003), (2, 300_001), (700_003,)])
    def test_combined_of_every_size(self, transport: OneSidedTransport, shape: tuple[int, ...]) -> None:
        sources = tuple(numbers(shape, torch.bfloat16, seed=seed) for seed in range(3))
        self.check_combined(transport, sources, numbers(shape, torch.bfloat16, seed=9), "avg")

    def test_memory_that_is_read_and_written(self, transport: OneSidedTransport) -> None:
        memory = torch.zeros(64, dtype=torch.uint8)
        words, halves = memory.view(torch.float32), memory.view(torch.bfloat16)
        for copy in (plain(words[:8], halves[:8]), Copy((words[:8], words[8:]), words[4:12], "sum")):
            with pytest.raises(TensorMismatchError, match="copy 0: the target shares memory with a source"):
                transport.prepare([copy])
        transport.prepare([plain(words[:8], halves[16:24]), Copy((words[:4], words[4:8]), words[8:12], "sum")]).run()

    def test_wrong_device(self, transport: OneSidedTransport) -> None:
        with pytest.raises(WrongDeviceError, match="copy 0: a meta tensor"):
            transport.prepare([plain(torch.zeros(4, device="meta"), torch.zeros(4))])

    def test_closed(self, transport: OneSidedTransport) -> None:
        program = transport.prepare([plain(torch.ones(4), torch.zeros(4))])
        transport.close()
        transport.close()
        with pytest.raises(TransferError, match="closed"):
            program.run()
