"""The whole contract of transports, over kernels that run on the CPU and over torch's calls."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest
import torch

from etha_ray.errors import TransferError
from etha_ray.transport import Copy, CopyProgram, MappedTransport, OneSidedTransport
from etha_ray.transport.kernels import KernelTransport
from tests.accelerator.host import HostAccelerator, HostLane
from tests.contracts.transport import OneSidedTransportContract, bits, random_tensor


class TestKernels(OneSidedTransportContract):
    @pytest.fixture
    def transport(self) -> Iterator[OneSidedTransport]:
        with contextlib.closing(KernelTransport(HostAccelerator(), MappedTransport(1))) as transport:
            yield transport


class TestTorch(OneSidedTransportContract):
    @pytest.fixture
    def transport(self) -> Iterator[OneSidedTransport]:
        with contextlib.closing(KernelTransport(HostAccelerator(), MappedTransport(1), kernels=False)) as transport:
            yield transport


def sides(count: int = 5) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    sources = [random_tensor((40 + number, 70), torch.bfloat16, number)[:, 3:60] for number in range(count)]
    return sources, [torch.zeros(source.shape, dtype=source.dtype) for source in sources]


def test_all_regions_and_casts_are_one_launch() -> None:
    accelerator = HostAccelerator()
    transport = KernelTransport(accelerator, MappedTransport(1))
    sources, targets = sides()
    copies = [Copy((source,), target) for source, target in zip(sources, targets, strict=True)]
    copies.append(Copy((torch.ones(70),), torch.zeros(70, dtype=torch.bfloat16)))
    program = transport.prepare(copies)
    assert accelerator.launched == []
    program.run()
    program.run()
    assert accelerator.launched == ["copy_regions"] * 2
    assert "0 calls of torch and 0 copies on the CPU" in repr(program)
    assert all(bits(copy.sources[0].to(copy.target.dtype)) == bits(copy.target) for copy in copies)


def test_what_kernels_do_not_know_is_torchs() -> None:
    accelerator = HostAccelerator()
    transport = KernelTransport(accelerator, MappedTransport(1))
    one = torch.ones(70)
    copies = [Copy((one,), torch.zeros(70, dtype=torch.int8)), Copy((one, one), torch.zeros(70), "sum")]
    program = transport.prepare(copies)
    program.run()
    assert accelerator.launched == []
    assert "0 regions, 2 calls of torch" in repr(program)
    assert copies[0].target.sum() == 70
    assert copies[1].target.sum() == 140


def test_without_kernels_torch_does_everything() -> None:
    accelerator = HostAccelerator()
    accelerator.launches = False
    transport = KernelTransport(accelerator, MappedTransport(1))
    sources, targets = sides()
    program = transport.prepare([Copy((source,), target) for source, target in zip(sources, targets, strict=True)])
    program.run()
    assert accelerator.launched == []
    assert "0 regions, 5 calls of torch" in repr(program)
    assert "by torch" in repr(transport)
    assert [bits(target) for target in targets] == [bits(source) for source in sources]


def test_enqueue_hands_over_to_a_lane() -> None:
    accelerator = HostAccelerator()
    transport = KernelTransport(accelerator, MappedTransport(1))
    sources, targets = sides()
    program = transport.prepare([Copy((source,), target) for source, target in zip(sources, targets, strict=True)])
    program.enqueue(HostLane())
    assert [bits(target) for target in targets] == [bits(source) for source in sources]
    transport.close()
    with pytest.raises(TransferError, match="closed"):
        program.enqueue(HostLane())


class BrokenLane(HostLane):
    """Of a device that fails once it is broken."""

    broken = False

    def wait(self) -> None:
        if self.broken:
            raise TransferError("the device failed")


class BrokenAccelerator(HostAccelerator):
    device = torch.device("meta")  # so that what is on the CPU is the host's

    def lane(self) -> BrokenLane:
        return BrokenLane()


def test_what_a_failure_leaves_half_written(monkeypatch: pytest.MonkeyPatch) -> None:
    transport = KernelTransport(BrokenAccelerator(), MappedTransport(1), kernels=False)
    host, device = Copy((torch.ones(4),), torch.zeros(4)), Copy((torch.ones(4, device="meta"),), torch.zeros(4, device="meta"))
    program = transport.prepare([host, device, host])
    monkeypatch.setattr(BrokenLane, "broken", True)
    with pytest.raises(TransferError, match="the device failed"):
        program.run()
    assert program.unfinished() == frozenset({1})
    assert host.target.sum() == 4
    transport.close()
    with pytest.raises(TransferError, match="closed"):
        program.run()
    assert program.unfinished() == frozenset()


def test_a_failure_on_the_host_waits_for_the_device() -> None:
    class Failing(MappedTransport):
        def prepare(self, copies: object) -> CopyProgram:  # type: ignore[override]
            class Program(CopyProgram):
                nbytes = 0

                def run(self) -> int:
                    raise TransferError("the host failed")

            return Program()

    class Waited(HostLane):
        waits = 0

        def wait(self) -> None:
            type(self).waits += 1

    class Accelerator(BrokenAccelerator):
        def lane(self) -> Waited:  # type: ignore[override]
            return Waited()

    program = KernelTransport(Accelerator(), Failing(1), kernels=False).prepare([Copy((torch.ones(4),), torch.zeros(4))])
    with pytest.raises(TransferError, match="the host failed"):
        program.run()
    assert Waited.waits == 1
    assert program.unfinished() == frozenset({0})
