"""The contracts of kernels and of transports, on a GPU."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest
import torch

from etha_ray.accelerator import CudaAccelerator
from etha_ray.transport import MappedTransport, OneSidedTransport
from etha_ray.transport.kernels import KernelTransport
from tests.contracts.kernels import KernelsContract, moved
from tests.contracts.transport import OneSidedTransportContract


class TestKernels(KernelsContract):
    @pytest.fixture(scope="class")
    @classmethod
    def accelerator(cls, cuda: CudaAccelerator) -> CudaAccelerator:
        return cuda

    def test_more_units_than_a_region_has(self, accelerator: CudaAccelerator) -> None:
        if torch.cuda.mem_get_info(accelerator.device)[0] < 8 << 30:
            pytest.skip("the GPU has less than 8 GiB free")
        source = torch.randint(0, 256, ((1 << 31) + 4321,), dtype=torch.uint8, device=accelerator.device)
        target = torch.zeros(len(source) + 1, dtype=torch.uint8, device=accelerator.device)[1:]
        assert len(moved(accelerator, source, target)) > 1
        assert torch.equal(source, target)


@pytest.fixture
def on_the_gpu(cuda: CudaAccelerator) -> Iterator[None]:
    torch.set_default_device(cuda.device)
    yield
    torch.set_default_device(None)


@pytest.mark.usefixtures("on_the_gpu")
class TestTransportByKernels(OneSidedTransportContract):
    @pytest.fixture
    def transport(self, cuda: CudaAccelerator) -> Iterator[OneSidedTransport]:
        with contextlib.closing(KernelTransport(cuda, MappedTransport(1))) as transport:
            yield transport


@pytest.mark.usefixtures("on_the_gpu")
class TestTransportByTorch(OneSidedTransportContract):
    @pytest.fixture
    def transport(self, cuda: CudaAccelerator) -> Iterator[OneSidedTransport]:
        with contextlib.closing(KernelTransport(cuda, MappedTransport(1), kernels=False)) as transport:
            yield transport
