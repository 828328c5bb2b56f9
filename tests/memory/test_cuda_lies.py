"""A handle of a GPU's memory is another process's word. No lie reads outside that memory, or leaves anything mapped."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator

import pytest

from etha_ray.errors import MemoryHandleError
from etha_ray.memory import CudaHandle, decode_handle, encode_handle, open_tensors
from etha_ray.memory.handles import Chunk
from tests.cuda.fake import FakeGpus
from tests.memory.gpu_owner import GpuOwner
from tests.memory.programs import changed, open_descriptors
from tests.security.mutations import mutated

COUNT = int(os.environ.get("ETHA_RAY_FUZZ", "1500"))


@pytest.fixture(scope="module")
def handles() -> Iterator[tuple[CudaHandle, CudaHandle]]:
    """Of an allocation of 4000 bytes, and of two chunks."""
    owner = GpuOwner("[gpus.empty(1000).fill_(3), gpus.tensor(gpus.expandable(2), (20000,)).fill_(3)]")
    plain, growing = owner.handles
    assert isinstance(plain, CudaHandle)
    assert isinstance(growing, CudaHandle)
    yield plain, growing
    owner.kill()


class TestLies:
    """A handle is another process's word."""

    @pytest.mark.parametrize(
        "lie",
        [
            {"nbytes": 4004, "size": 4004},
            {"size": 1 << 40},
            {"size": 0},
            {"size": -1},
            {"data_offset": 4},
            {"data_offset": -4},
            {"data_offset": 1 << 62},
            {"nbytes": 1 << 40},
            {"shape": (1001,)},
            {"stride": (2,)},
            {"storage_offset": 1},
            {"dtype": "float64"},
            {"ipc": b""},
            {"ipc": b"x" * 64},
            {"ipc": b"x" * 63},
            {"chunks": (Chunk(4000, 1, 3),)},
            {"start_time": 1.0},
            {"pid": 1 << 40},
        ],
        ids=str,
    )
    def test_about_an_allocation(self, gpus: FakeGpus, handles: tuple[CudaHandle, CudaHandle], lie: dict[str, object]) -> None:
        with pytest.raises(MemoryHandleError, match=r"^w: "):
            open_tensors([changed(handles[0], **lie)], ["w"], gpu=0)
        assert gpus.held == 0
        assert open_tensors(handles, gpu=0).tensors[0].eq(3).all()

    def test_about_chunks(self, gpus: FakeGpus, handles: tuple[CudaHandle, CudaHandle]) -> None:
        one, two = handles[1].chunks
        lies = [
            (one,),
            (one, two, two),
            (one, Chunk(two.size, two.serial, 0)),  # a pipe
            (one, Chunk(two.size, two.serial, 987_654)),
            (one, Chunk(two.size, two.serial, -2)),
            (one, Chunk(two.size, two.serial, 1 << 40)),
            (one, Chunk(two.size, two.serial, two.fd, b"x" * 64)),
            (one, Chunk(two.size, two.serial, -1, b"x" * 64)),
            (one, Chunk(two.size, two.serial, -1, b"x")),
            (Chunk(2 * one.size, 1, one.fd), Chunk(0, 2, two.fd)),
            (Chunk(3 * one.size, 1, one.fd), Chunk(-one.size, 2, two.fd)),
            (Chunk(one.size - 4, 1, one.fd), Chunk(one.size + 4, 2, two.fd)),
        ]
        for chunks in lies:
            with pytest.raises(MemoryHandleError, match=r"^w: "):
                open_tensors([changed(handles[1], chunks=chunks)], ["w"], gpu=0)
            assert gpus.held == 0
        assert open_tensors(handles, gpu=0).tensors[1].eq(3).all()

    def test_the_wire(self, handles: tuple[CudaHandle, CudaHandle]) -> None:
        for handle in handles:
            assert decode_handle(encode_handle(handle)) == handle

    def test_nearly_right_ones(self, gpus: FakeGpus, handles: tuple[CudaHandle, CudaHandle]) -> None:
        rng, opened = random.Random(11), 0
        descriptors = open_descriptors()
        for number in range(COUNT // 2):
            data = mutated(encode_handle(handles[number % 2]), rng)
            try:
                tensor = open_tensors([decode_handle(data)], gpu=0).tensors[0]
            except MemoryHandleError:
                continue
            opened += 1
            assert tensor.isnan().sum() >= 0  # it may be read, all of it
            del tensor
        assert 0 < opened < COUNT // 2
        assert (gpus.held, open_descriptors()) == (0, descriptors)
