"""A GPU's memory between processes, by CUDA's own driver."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator

import pytest
import torch

from etha_ray.cuda.gpus import find_gpu, uuid_of
from etha_ray.errors import HandleExpiredError, MemoryHandleError
from etha_ray.memory import CudaHandle, ForAgent, decode_handle, encode_handle, export_tensors, open_tensors
from etha_ray.memory.mappings import _mappings
from etha_ray.processes import permit_tracing
from tests.contracts.transport import DTYPES, bits, random_tensor
from tests.gpu import workers
from tests.memory.programs import changed, open_descriptors
from tests.tensor_bus.cluster import Worker


@pytest.fixture
def start() -> Iterator[Callable[..., Worker]]:
    """Processes that use the GPU."""
    made: list[Worker] = []

    def started() -> Worker:
        made.append(Worker())
        made[-1].start(workers.begin)
        made[-1].result(120)
        return made[-1]

    yield started
    for worker in made:
        worker.close()


def expandable(worker: Worker) -> Worker:
    worker.call(workers.use_expandable)
    return worker


@pytest.fixture(params=["cudaMalloc", "expandable"])
def owner(request: pytest.FixtureRequest, start: Callable[..., Worker]) -> Worker:
    """A process that allocates in one way or the other."""
    worker = start()
    return expandable(worker) if request.param == "expandable" else worker


def test_a_gpu_is_known_by_its_uuid(start: Callable[..., Worker]) -> None:
    found = find_gpu(0)
    assert found.trouble == ""
    assert str(torch.cuda.get_device_properties(0).uuid) in found.uuid
    assert find_gpu(torch.cuda.device_count()).uuid == ""


def test_both_see_what_either_writes(owner: Worker) -> None:
    owner.call(workers.make, 1000, 100, 2.0)
    handles = [decode_handle(handle) for handle in owner.call(workers.export)]
    opened = open_tensors(handles, gpu=0)
    whole, rows = opened.tensors
    assert whole.device == torch.device("cuda", 0)
    assert whole.eq(2).all()
    rows.fill_(5)
    torch.cuda.synchronize()
    assert owner.call(workers.sum_of) == 2 * 100_000 + 3 * 200
    assert whole.untyped_storage().data_ptr() == rows.untyped_storage().data_ptr()


def test_what_is_closed_is_unmapped(owner: Worker) -> None:
    owner.call(workers.make, 1000, 100, 2.0)
    handles = [decode_handle(handle) for handle in owner.call(workers.export)]
    open_tensors(handles, gpu=0).close()  # what CUDA itself opens then, once, stays open
    gc.collect()
    mappings, descriptors = len(_mappings), open_descriptors()
    for _ in range(3):
        first, second = open_tensors(handles, gpu=0), open_tensors(handles[:1], gpu=0)
        assert len(_mappings) == mappings + 1
        first.close()
        assert second.tensors[0].eq(2).all()
        second.close()
        gc.collect()
        assert len(_mappings) == mappings
        assert open_descriptors() == descriptors


def test_large_memory_of_many_chunks(start: Callable[..., Worker]) -> None:
    owner = expandable(start())
    owner.call(workers.make, 1 << 20, 100, 1.0)  # 400 MiB
    handles = [decode_handle(handle) for handle in owner.call(workers.export)]
    assert isinstance(handles[0], CudaHandle)
    assert len(handles[0].chunks) > 1
    assert open_tensors(handles, gpu=0).tensors[0].double().sum().item() == 100 << 20


def test_who_has_it_open_passes_it_on(owner: Worker, start: Callable[..., Worker]) -> None:
    owner.call(workers.make, 100, 100, 3.0)
    opened = open_tensors([decode_handle(handle) for handle in owner.call(workers.export)], gpu=0)
    third = start()
    permit_tracing()  # as an agent does
    assert third.call(workers.open_sum, [encode_handle(handle) for handle in opened.handles], 1.0) == 30_000
    third.call(workers.close_opened)
    assert opened.tensors[0].eq(1).all()


def test_the_owner_died(owner: Worker) -> None:
    owner.call(workers.make, 100, 100, 3.0)
    handles = [decode_handle(handle) for handle in owner.call(workers.export)]
    owner.process.kill()
    owner.process.join()
    with pytest.raises(HandleExpiredError, match=f"process {owner.pid}"):
        open_tensors(handles, gpu=0)


def test_the_same_process() -> None:
    tensor = torch.arange(1000.0, device="cuda:0").view(10, 100)
    exported = export_tensors([tensor, tensor[3]], agent=ForAgent("cuda:0", uuid_of(0)))
    opened = open_tensors(exported.handles, gpu=0)
    assert opened.tensors[0].data_ptr() == tensor.data_ptr()
    opened.tensors[1].zero_()
    assert tensor[3].eq(0).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype(dtype: torch.dtype) -> None:
    tensor = random_tensor((5, 8), dtype)
    raw = tensor.contiguous().untyped_storage()
    there = torch.empty(0, dtype=dtype, device="cuda:0").set_(raw.cuda(), 0, (5, 8), (8, 1))
    exported = export_tensors([there[1:, ::3]], agent=ForAgent("cuda:0", uuid_of(0)))
    opened = open_tensors(exported.handles, gpu=0).tensors[0]
    host = torch.empty(0, dtype=dtype).set_(opened.untyped_storage().cpu(), opened.storage_offset(), opened.shape, opened.stride())
    assert bits(host) == bits(tensor.contiguous()[1:, ::3])


def test_no_lie_harms_the_gpu(owner: Worker) -> None:
    owner.call(workers.make, 100, 100, 3.0)
    handles = [decode_handle(handle) for handle in owner.call(workers.export)]
    for lie in ({"size": 1 << 40}, {"data_offset": 1 << 40}, {"nbytes": 1 << 40}, {"ipc": b"x" * 64, "chunks": ()}, {"ipc": b""}):
        if lie == {"ipc": b""} and isinstance(handles[0], CudaHandle) and handles[0].chunks:
            continue
        with pytest.raises(MemoryHandleError, match=r"^w: "):
            open_tensors([changed(handles[0], **lie)], ["w"], gpu=0)
    assert open_tensors(handles, gpu=0).tensors[0].eq(3).all()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_another_gpu_that_the_owner_sees_alone(start: Callable[..., Worker]) -> None:
    owner = Worker()
    try:
        owner.start(workers.see, "1")
        assert owner.result(120) == uuid_of(1)
        owner.call(workers.make, 100, 100, 3.0)
        handles = [decode_handle(handle) for handle in owner.call(workers.export)]
        assert open_tensors(handles, gpu=0).tensors[0].eq(3).all()  # by peer access, on this process's first
    finally:
        owner.close()
