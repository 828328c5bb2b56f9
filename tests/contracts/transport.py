"""What every one-sided transport promises. A test class inherits `OneSidedTransportContract` and gives a `transport`."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
import torch

from etha_ray.errors import TensorMismatchError, TransferError, WrongDeviceError
from etha_ray.transport import CopyProgram, OneSidedTransport

# float4 and the sub-byte integers too: a transport moves bits and computes nothing.
DTYPES = sorted(
    {v for v in vars(torch).values() if isinstance(v, torch.dtype) and "q" not in str(v)},
    key=str,
)


def random_bytes(nbytes: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (nbytes,), dtype=torch.uint8, generator=generator)


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
    return bytes(as_int.contiguous().numpy().tobytes())


class OneSidedTransportContract:
    @pytest.fixture
    def transport(self) -> Iterator[OneSidedTransport]:
        raise NotImplementedError  # a subclass yields one, and closes it after

    def check(self, transport: OneSidedTransport, source: torch.Tensor, target: torch.Tensor) -> CopyProgram:
        wanted = bits(source)
        program = transport.prepare([(source, target)])
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
        transport.prepare([(source, target)]).run()
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
        program = transport.prepare(list(zip(sources, targets, strict=True)))
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
        program = transport.prepare([(source, target)])
        assert not target.any()  # preparing moves nothing
        for version in range(1, 6):
            source.fill_(version)
            program.run()
            assert bits(target) == bits(source)

    def test_programs_on_several_threads(self, transport: OneSidedTransport) -> None:
        """Also two that read the same source."""
        source = random_tensor((1500, 1500))
        targets = [torch.zeros(1500, 1500, dtype=torch.bfloat16) for _ in range(6)]
        programs = [transport.prepare([(source[:, :700], t[:, :700]), (source[:, 700:], t[:, 700:])]) for t in targets]
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
        good = (torch.zeros(2), torch.zeros(2))
        with pytest.raises(TensorMismatchError, match=r"copy 1: source is \(2, 3\) torch.float32, target is \(3, 2\)"):
            transport.prepare([good, (torch.zeros(2, 3), torch.zeros(3, 2))])
        with pytest.raises(TensorMismatchError, match=r"copy 0.*torch.float32.*torch.float16"):
            transport.prepare([(torch.zeros(2), torch.zeros(2, dtype=torch.float16))])
        with pytest.raises(TensorMismatchError, match=r"share memory.*contiguous"):
            transport.prepare([(torch.zeros(4, 3), torch.zeros(3).expand(4, 3))])
        with pytest.raises(TensorMismatchError, match="resolve_conj"):
            transport.prepare([(torch.zeros(4, dtype=torch.complex64).conj(), torch.zeros(4, dtype=torch.complex64))])

    def test_wrong_device(self, transport: OneSidedTransport) -> None:
        with pytest.raises(WrongDeviceError, match="copy 0: a meta tensor"):
            transport.prepare([(torch.zeros(4, device="meta"), torch.zeros(4))])

    def test_closed(self, transport: OneSidedTransport) -> None:
        program = transport.prepare([(torch.ones(4), torch.zeros(4))])
        transport.close()
        transport.close()
        with pytest.raises(TransferError, match="closed"):
            program.run()
