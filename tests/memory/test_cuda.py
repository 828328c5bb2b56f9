"""A GPU's memory between processes, through the real calls of a driver whose memory is the host's (`tests/cuda/fake_cuda.c`)."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

import pytest
import torch

from etha_ray.cuda.driver import Driver, DriverError
from etha_ray.errors import HandleExpiredError, MemoryHandleError, NotShareableError, WrongDeviceError
from etha_ray.memory import CudaHandle, ForAgent, encode_handle, export_tensors, open_tensors
from tests.contracts.transport import DTYPES, bits, random_tensor
from tests.cuda.fake import CHUNK, FakeGpus, uuid
from tests.memory.gpu_owner import GpuOwner
from tests.memory.programs import changed, open_descriptors

HERE = ForAgent("cuda:0", uuid(0))


@pytest.fixture
def start() -> Iterator[Callable[..., GpuOwner]]:
    owners: list[GpuOwner] = []

    def started(*given: object, **more: object) -> GpuOwner:
        owners.append(GpuOwner(*given, **more))  # type: ignore[arg-type]
        return owners[-1]

    yield started
    for owner in owners:
        owner.kill()


PLAIN = "[t := gpus.empty(100, 100).fill_(3), t[10:20], t.t()]"
GROWING = "[t := gpus.tensor(gpus.expandable(3) + CHUNK - 400, (200,)).fill_(3), t[10:20]]"
FABRIC = "[t := gpus.tensor(gpus.expandable(3, types=8) + CHUNK - 400, (200,)).fill_(3), t[10:20]]"


@pytest.mark.parametrize("tensors", [PLAIN, GROWING, FABRIC], ids=["cudaMalloc", "expandable", "fabric"])
class TestBetweenProcesses:
    def test_both_see_what_either_writes(self, gpus: FakeGpus, start: Callable[..., GpuOwner], tensors: str) -> None:
        owner = start(tensors)
        opened = open_tensors(owner.handles, gpu=0)
        whole, part = opened.tensors[:2]
        assert whole.eq(3).all()
        assert whole.untyped_storage()._cdata == part.untyped_storage()._cdata
        part.zero_()
        assert owner.ask("tensors[0][10:20].abs().sum().item()") == 0
        owner.ask("tensors[0].fill_(5) is None")
        assert part.eq(5).all()

    def test_a_segment_is_mapped_once_until_the_last_is_closed(self, gpus: FakeGpus, start: Callable[..., GpuOwner], tensors: str) -> None:
        owner = start(tensors)
        descriptors = open_descriptors()
        first, second = open_tensors(owner.handles, gpu=0), open_tensors(owner.handles[:1], gpu=0)
        held = gpus.held
        assert held == (1 if tensors == PLAIN else 3)  # a mapping; or addresses, and two chunks there
        assert first.tensors[0].data_ptr() == second.tensors[0].data_ptr()
        first.close()
        assert gpus.held == held
        assert second.tensors[0].eq(3).all()
        kept = second.tensors[0]
        second.close()
        assert kept.eq(3).all()  # who still has a tensor keeps its memory
        del kept
        assert gpus.held == 0
        assert open_descriptors() == descriptors

    def test_what_is_open_outlives_its_owner(self, gpus: FakeGpus, start: Callable[..., GpuOwner], tensors: str) -> None:
        owner = start(tensors)
        opened = open_tensors(owner.handles, gpu=0)
        owner.kill()
        assert opened.tensors[0].eq(3).all()
        opened.close()
        with pytest.raises(HandleExpiredError, match=rf"w: process {owner.pid} .*that process is gone.*register it again"):
            open_tensors(owner.handles[:1], ["w"], gpu=0)
        assert gpus.held == 0

    def test_what_fails_midway_leaves_nothing(self, gpus: FakeGpus, start: Callable[..., GpuOwner], tensors: str) -> None:
        owner = start(tensors)
        descriptors = open_descriptors()
        calls = ["cuIpcOpenMemHandle_v2", "cuMemGetAddressRange_v2"]
        if tensors != PLAIN:
            calls = ["cuMemAddressReserve", "cuMemImportFromShareableHandle", "cuMemMap", "cuMemSetAccess"]
        for call in calls:
            gpus.fail(call, 1)
            with pytest.raises(MemoryHandleError, match=rf"w: .* of process {owner.pid} on GPU-.*{call}: CUDA_ERROR_INVALID_VALUE"):
                open_tensors(owner.handles, ["w", *"vu"[: len(owner.handles) - 1]], gpu=0)
            assert (gpus.held, open_descriptors()) == (0, descriptors)
        assert open_tensors(owner.handles, gpu=0).tensors[0].eq(3).all()

    def test_an_agent_without_a_gpu(self, gpus: FakeGpus, start: Callable[..., GpuOwner], tensors: str) -> None:
        with pytest.raises(WrongDeviceError, match=rf"w is in memory of a GPU \({uuid(0)}\).*start an agent on a GPU"):
            open_tensors(start(tensors).handles[:1], ["w"])


class TestOtherGpus:
    def test_another_number_in_the_worker(self, gpus: FakeGpus, start: Callable[..., GpuOwner]) -> None:
        owner = start("[gpus.empty(10, ordinal=1).fill_(2)]", devices="1,0", gpu=0)
        handle = owner.handles[0]
        assert isinstance(handle, CudaHandle)
        assert handle.gpu == uuid(0)
        assert open_tensors(owner.handles, gpu=0).tensors[0].eq(2).all()

    def test_a_gpu_that_is_not_visible_is_read_by_peer_access(self, gpus: FakeGpus, start: Callable[..., GpuOwner]) -> None:
        owner = start("[gpus.empty(10).fill_(2)]", devices="5", gpu=5)
        assert open_tensors(owner.handles, gpu=1).tensors[0].eq(2).all()

    def test_no_peer_access(self, gpus: FakeGpus, start: Callable[..., GpuOwner], monkeypatch: pytest.MonkeyPatch) -> None:
        owner = start("[gpus.empty(10)]", devices="5", gpu=5)
        monkeypatch.setenv("FAKE_CUDA_NO_PEERS", "1")
        with pytest.raises(MemoryHandleError, match=rf"{uuid(5)}.*cuda:0.*PEER_ACCESS_UNSUPPORTED.*no peer access"):
            open_tensors(owner.handles, gpu=0)

    def test_the_agents_gpu_is_told_from_others(self, gpus: FakeGpus) -> None:
        with pytest.raises(WrongDeviceError, match=rf"w is a cuda:1 tensor \({uuid(1)}\), .*cuda:4 of its node \({uuid(0)}\): register"):
            export_tensors([gpus.empty(3), gpus.empty(3, ordinal=1)], ["v", "w"], ForAgent("cuda:4", uuid(0)))

    def test_an_agent_that_cannot_use_its_own(self, gpus: FakeGpus) -> None:
        with pytest.raises(WrongDeviceError, match=r"w is a cuda:0 tensor, and the agent of cuda:0 cannot use CUDA: no driver"):
            export_tensors([gpus.empty(3)], ["w"], ForAgent("cuda:0", "", "no driver"))

    def test_a_cpu_agent(self, gpus: FakeGpus) -> None:
        with pytest.raises(WrongDeviceError, match=r"w is a cuda:0 tensor on a CPU agent"):
            export_tensors([gpus.empty(3)], ["w"])

    def test_cpu_tensors_beside_those_of_a_gpu(self, gpus: FakeGpus) -> None:
        on_gpu, on_cpu = gpus.empty(3).fill_(1), torch.full((4,), 2.0)
        exported = export_tensors([on_cpu, on_gpu], agent=HERE)
        assert [handle.kind for handle in exported.handles] == ["shm", "cuda"]
        opened = open_tensors(exported.handles, gpu=0)
        assert [tensor.sum().item() for tensor in opened.tensors] == [8, 3]


class TestSameProcess:
    def test_the_memory_itself(self, gpus: FakeGpus) -> None:
        tensor = gpus.empty(10, 10, offset=512).fill_(1)
        exported = export_tensors([tensor, tensor[3]], agent=HERE)
        opened = open_tensors(exported.handles, gpu=0)
        assert opened.tensors[1].data_ptr() == tensor[3].data_ptr()
        assert gpus.held == 0

    def test_only_what_is_exported(self, gpus: FakeGpus) -> None:
        exported = export_tensors([gpus.empty(10)], agent=HERE)
        handle = exported.handles[0]
        for lie in ({"data_offset": 4, "nbytes": 36, "shape": (9,)}, {"base": 4096}):
            with pytest.raises(HandleExpiredError, match="closed"):
                open_tensors([changed(handle, **lie)], gpu=0)
        exported.close()
        exported.close()
        with pytest.raises(HandleExpiredError, match=f"process {os.getpid()} does not hold"):
            open_tensors([handle], gpu=0)

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_every_dtype(self, gpus: FakeGpus, dtype: torch.dtype) -> None:
        tensor = random_tensor((5, 8), dtype)
        there = gpus.empty(5, 8, dtype=dtype)
        there.untyped_storage().copy_(tensor.contiguous().untyped_storage())
        exported = export_tensors([there[1:, ::3]], agent=HERE)
        opened = open_tensors(exported.handles, gpu=0).tensors[0]
        assert (opened.dtype, opened.stride()) == (dtype, there[1:, ::3].stride())
        assert bits(opened) == bits(there[1:, ::3])


class TestChunks:
    def test_a_chunk_has_one_descriptor_however_often_it_is_exported(self, gpus: FakeGpus) -> None:
        base, before = gpus.expandable(3), open_descriptors()
        first = export_tensors([gpus.tensor(base + CHUNK * number + 100, (20,)) for number in range(3)], agent=HERE)
        second = export_tensors([gpus.tensor(base, (CHUNK // 2,))], agent=HERE)
        assert open_descriptors() == before + 3
        assert second.handles[0].chunks == (*first.handles[0].chunks, *first.handles[1].chunks)
        first.close()
        assert open_descriptors() == before + 2
        second.close()
        assert open_descriptors() == before
        again = export_tensors([gpus.tensor(base, (2,))], agent=HERE)
        assert again.handles[0].chunks[0].serial > second.handles[0].chunks[1].serial  # what is mapped of the old one is not taken for it

    def test_no_handles_for_others(self, gpus: FakeGpus) -> None:
        tensor, before = gpus.tensor(gpus.expandable(1, types=0), (20,)), open_descriptors()
        held = gpus.held
        with pytest.raises(NotShareableError, match=r"w is in an expandable segment .*TORCH_CUDA_EXPANDABLE_SEGMENTS_IPC=1.*PYTORCH_CUDA"):
            export_tensors([tensor], ["w"], HERE)
        assert (open_descriptors(), gpus.held) == (before, held)

    def test_memory_of_cuda_malloc_async(self, gpus: FakeGpus) -> None:
        tensor = gpus.tensor(gpus.allocate(80, kind="async"), (20,))
        with pytest.raises(NotShareableError, match=r"w was allocated .*cudaMallocAsync.*CUDA_ERROR_INVALID_VALUE"):
            export_tensors([tensor], ["w"], HERE)

    def test_too_few_descriptors(self, gpus: FakeGpus, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("etha_ray.memory.cuda.reserve_descriptors", lambda count: count - 1)
        with pytest.raises(MemoryHandleError, match=r"3 chunks .*room for 2: raise `ulimit -n`"):
            export_tensors([gpus.tensor(gpus.expandable(3), (3 * CHUNK // 4,))], agent=HERE)

    def test_a_kernel_that_does_not_allow_it(self, gpus: FakeGpus, start: Callable[..., GpuOwner], monkeypatch: pytest.MonkeyPatch) -> None:
        owner = start(GROWING)
        monkeypatch.setattr("etha_ray.memory.descriptors._PIDFD_GETFD", 0xFFFF)  # no such call
        with pytest.raises(MemoryHandleError, match=rf"w: may not take descriptor \d+ of process {owner.pid} .*ptrace_scope.*SYS_PTRACE"):
            open_tensors(owner.handles[:1], ["w"], gpu=0)
        assert gpus.held == 0

    def test_who_has_it_open_passes_it_on(self, gpus: FakeGpus, start: Callable[..., GpuOwner], monkeypatch: pytest.MonkeyPatch) -> None:
        """The owner lets its own agent alone take its descriptors; other agents take them from that one."""
        owner, other = start(GROWING), start("[]")
        opened = open_tensors(owner.handles, gpu=0)
        handle = opened.handles[0]
        assert isinstance(handle, CudaHandle)
        assert handle.pid == os.getpid()
        assert not {chunk.serial for chunk in handle.chunks} & {chunk.serial for chunk in owner.handles[0].chunks}
        owner.kill()
        encoded = [encode_handle(handle) for handle in opened.handles]
        assert other.ask(f"open_tensors([decode_handle(each) for each in {encoded!r}], gpu=0).tensors[0].sum().item()") == 600
        assert open_tensors(opened.handles, gpu=0).tensors[1].eq(3).all()  # here too, as another agent of this process does
        opened.close()
        with pytest.raises(HandleExpiredError):
            open_tensors([handle], gpu=0)
        assert gpus.held == 0

    def test_what_needs_no_descriptor_stays_the_owners(self, gpus: FakeGpus, start: Callable[..., GpuOwner]) -> None:
        owner = start(PLAIN)
        opened = open_tensors(owner.handles, gpu=0)
        assert opened.handles == owner.handles

    def test_a_descriptor_that_was_closed(self, gpus: FakeGpus, start: Callable[..., GpuOwner]) -> None:
        owner = start(GROWING)
        owner.ask("exported.close()")
        with pytest.raises(HandleExpiredError, match=f"process {owner.pid} does not hold"):
            open_tensors(owner.handles[:1], gpu=0)


def test_the_driver_does_not_know_the_memory(gpus: FakeGpus) -> None:
    gpus.fail("cuMemGetAddressRange_v2", 201)
    with pytest.raises(
        MemoryHandleError, match=r"w: CUDA's driver does not say where it is \(cuMemGetAddressRange_v2: CUDA_ERROR_INVALID_"
    ):
        export_tensors([gpus.empty(3)], ["w"], HERE)


def test_storages_without_bytes(gpus: FakeGpus, monkeypatch: pytest.MonkeyPatch) -> None:
    tensor = torch.empty(0, 3)
    monkeypatch.setattr("etha_ray.cuda.arrays.gpu_of", lambda tensor: 0)
    handle = export_tensors([tensor], agent=HERE).handles[0]
    assert (handle.kind, handle.nbytes) == ("cuda", 0)
    assert open_tensors([handle], gpu=0).tensors[0].shape == (0, 3)


def test_a_reused_allocation_is_another_one(gpus: FakeGpus) -> None:
    tensor = gpus.empty(1000)
    first = export_tensors([tensor], agent=HERE).handles[0]
    gpus.free(tensor.data_ptr())
    other = gpus.empty(1000)
    second = export_tensors([other], agent=HERE).handles[0]
    assert isinstance(first, CudaHandle)
    assert isinstance(second, CudaHandle)
    assert first.buffer != second.buffer


def test_an_allocation_in_the_place_of_one_that_is_still_mapped(
    gpus: FakeGpus, start: Callable[..., GpuOwner], monkeypatch: pytest.MonkeyPatch
) -> None:
    """CUDA refuses it until the last one is unmapped."""
    owner, tries, real = start(PLAIN), [0], Driver.ipc_open

    def busy(driver: Driver, handle: bytes) -> int:
        tries[0] += 1
        if tries[0] < refused:
            raise DriverError("cuIpcOpenMemHandle_v2", "CUDA_ERROR_ALREADY_MAPPED")
        return real(driver, handle)

    monkeypatch.setattr(Driver, "ipc_open", busy)
    refused = 4
    assert open_tensors(owner.handles, gpu=0).tensors[0].eq(3).all()
    assert tries == [4]
    refused = 1 << 62
    monkeypatch.setattr("etha_ray.memory.mappings._CLOSE_TIMEOUT", 0.05)
    with pytest.raises(MemoryHandleError, match=r"w: .*cannot be mapped for cuda:0 .*CUDA_ERROR_ALREADY_MAPPED"):
        open_tensors(owner.handles[:1], ["w"], gpu=0)
