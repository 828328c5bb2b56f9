from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from etha_ray.errors import (
    HandleExpiredError,
    MemoryHandleError,
)
from etha_ray.memory import ExportedTensors, SharedHandle, encode_handle, export_tensors, open_tensors
from etha_ray.testing import eventually
from tests.contracts.transport import DTYPES
from tests.memory.programs import Owner, changed, names_of, open_and_set, open_descriptors
from tests.tensor_bus.cluster import Worker


class TestOpen:
    def test_in_another_process(self, owner: Owner) -> None:
        before = open_descriptors()
        opened = open_tensors(owner.handles)
        assert open_descriptors() == before
        whole, part = opened.tensors
        assert torch.equal(whole, torch.arange(100_000, dtype=torch.int32))
        assert whole.untyped_storage()._cdata == part.untyped_storage()._cdata  # mapped once
        part.zero_()
        assert owner.sum() == sum(range(100_000)) - sum(range(10, 20))
        assert repr(opened) == "OpenedTensors(2 tensors, 400000 bytes)"

    def test_close_unmaps(self, owner: Owner) -> None:
        handle = owner.handles[0]
        assert isinstance(handle, SharedHandle)
        file = f"{os.major(handle.device):02x}:{os.minor(handle.device):02x} {handle.inode} "
        opened = open_tensors(owner.handles)
        assert file in Path("/proc/self/maps").read_text()
        opened.close()
        opened.close()
        assert file not in Path("/proc/self/maps").read_text()

    def test_owner_died(self, owner: Owner) -> None:
        opened = open_tensors(owner.handles)
        owner.kill()
        assert opened.tensors[0][99_999] == 99_999  # what is open stays readable
        with pytest.raises(HandleExpiredError, match=rf"w: process {owner.pid} .*register it again"):
            open_tensors(owner.handles, ["w", "v"])

    def test_owner_let_go(self, owner: Owner) -> None:
        owner.let_go()
        with pytest.raises(HandleExpiredError, match=f"process {owner.pid}"):
            open_tensors(owner.handles)

    def test_reused_pid(self, owner: Owner) -> None:
        with pytest.raises(HandleExpiredError, match="that process is gone"):
            open_tensors([changed(owner.handles[0], start_time=owner.handles[0].start_time - 1)])

    def test_reused_descriptor(self) -> None:
        exported = export_tensors([torch.ones(1000)])
        fd = int(exported.handles[0].path.rpartition("/")[2])
        other = export_tensors([torch.zeros(1000)])
        os.dup2(int(other.handles[0].path.rpartition("/")[2]), fd)  # the kernel gives a number that was closed to the next file
        with pytest.raises(HandleExpiredError, match="another file"):
            open_tensors(exported.handles)

    def test_by_name(self, named: None) -> None:
        tensor = torch.arange(3000.0)
        exported = export_tensors([tensor, tensor[7:]])
        assert exported.handles[0].path.startswith("/dev/shm/torch_")
        opened = open_tensors(exported.handles)
        tensor[8] = -3
        assert torch.equal(opened.tensors[0], tensor)
        assert torch.equal(opened.tensors[1], tensor[7:])
        assert export_tensors([tensor]).handles[0] == exported.handles[0]
        path = exported.handles[0].path
        exported.close()
        del tensor
        eventually(lambda: not os.path.exists(path))
        assert opened.tensors[0][8] == -3
        with pytest.raises(HandleExpiredError):
            open_tensors(exported.handles)


class TestKilled:
    """SIGKILL leaves no name in /dev/shm, whoever is killed."""

    @pytest.mark.parametrize("named", [False, True], ids=["by descriptor", "by name"])
    def test_owner_and_opener(self, named: bool) -> None:
        owner, opener = Owner(named), Worker()
        try:
            assert len(names_of(owner.pid)) == named
            opened = open_tensors(owner.handles)
            opener.call(open_and_set, encode_handle(owner.handles[0]), 5)
            opener.process.kill()
            opener.process.join()
            assert names_of(opener.pid) == set()
            assert owner.sum() == sum(range(100_000)) + 5  # the owner goes on
        finally:
            opener.process.kill()
            owner.kill()
        eventually(lambda: not names_of(owner.pid))
        assert opened.tensors[0].sum() == sum(range(100_000)) + 5  # and so does who has it open


class TestLyingHandles:
    """A handle is another process's word. No lie reads outside the memory, makes a file or changes a size."""

    @pytest.fixture
    def exported(self) -> ExportedTensors:
        return export_tensors([torch.ones(10, 10)])

    @pytest.mark.parametrize(
        "lie",
        [
            {"nbytes": 404},
            {"nbytes": 1 << 40},
            {"nbytes": 0},
            {"nbytes": -1},
            {"data_offset": 4},
            {"data_offset": -4},
            {"data_offset": 1 << 62},
            {"shape": (11, 10)},
            {"shape": (10,)},
            {"shape": (-1, 10)},
            {"shape": (2**63, 0)},
            {"shape": (2**40, 2**40), "stride": (0, 0)},
            {"stride": (11, 1)},
            {"stride": (-10, 1)},
            {"stride": (10, 1, 1)},
            {"stride": (2**63, 1), "shape": (1, 10)},
            {"storage_offset": 1},
            {"storage_offset": -1},
            {"storage_offset": 2**64},
            {"dtype": "float64"},
            {"dtype": "float31"},
            {"dtype": "Tensor"},
            {"dtype": "qint8"},
            {"path": ""},
            {"path": "/etc/passwd"},
            {"path": "/proc/self/../self/fd/0"},
            {"path": "/dev/shm/../../etc/passwd"},
            {"path": "/proc/1/fd/0\n"},
        ],
        ids=str,
    )
    def test_is_caught(self, exported: ExportedTensors, lie: dict[str, object]) -> None:
        with pytest.raises(MemoryHandleError, match=r"^w: "):
            open_tensors([changed(exported.handles[0], **lie)], ["w"])
        assert torch.equal(open_tensors(exported.handles).tensors[0], torch.ones(10, 10))

    def test_other_files_are_not_opened(self, exported: ExportedTensors) -> None:
        for path in (f"/proc/{os.getpid()}/fd/0", f"/proc/{os.getpid()}/fd/987654", "/dev/shm/etha-no-such"):
            with pytest.raises(HandleExpiredError):
                open_tensors([changed(exported.handles[0], path=path)])
        assert not os.path.exists("/dev/shm/etha-no-such")

    def test_pipes_are_not_opened(self, exported: ExportedTensors) -> None:
        read, write = os.pipe()
        info = os.fstat(read)
        try:
            with pytest.raises(MemoryHandleError, match="corrupt"):
                open_tensors([changed(exported.handles[0], path=f"/proc/{os.getpid()}/fd/{read}", device=info.st_dev, inode=info.st_ino)])
        finally:
            os.close(read)
            os.close(write)

    def test_sizes_stay(self, exported: ExportedTensors) -> None:
        path = exported.handles[0].path
        size = os.stat(path).st_size
        with pytest.raises(MemoryHandleError):
            open_tensors([changed(exported.handles[0], nbytes=size + 1)])
        assert os.stat(path).st_size == size

    @settings(max_examples=300, deadline=None)
    @given(st.lists(st.tuples(st.integers(-1, 12), st.integers(-1, 120)), max_size=4), st.integers(-2, 110), st.sampled_from(DTYPES))
    def test_layouts_in_bounds_or_refused(self, dims: list[tuple[int, int]], offset: int, dtype: torch.dtype) -> None:
        base = export_tensors([torch.zeros(100, dtype=torch.uint8)])
        shape, stride = tuple(size for size, _ in dims), tuple(step for _, step in dims)
        handle = changed(base.handles[0], dtype=str(dtype)[6:], shape=shape, stride=stride, storage_offset=offset)
        try:
            tensor = open_tensors([handle]).tensors[0]
        except MemoryHandleError:
            return
        assert tensor.shape == shape
        if tensor.numel():
            start = tensor.data_ptr() - tensor.untyped_storage().data_ptr()
            last = sum((size - 1) * step for size, step in zip(shape, stride, strict=True)) * dtype.itemsize
            assert 0 <= start <= start + last + dtype.itemsize <= 100


def test_an_export_names_no_descriptor_that_is_about_to_be_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where worker and agent are one process, one thread shares again what another opens at that moment."""
    low = [os.open(os.devnull, os.O_RDONLY) for _ in range(8)]
    tensor = torch.ones(3)
    first = export_tensors([tensor])
    for descriptor in low:  # what is opened from here on has a lower number than the storage's own
        os.close(descriptor)
    paths: list[str] = []
    again = threading.Thread(target=lambda: paths.append(export_tensors([tensor]).handles[0].path))
    real = torch.UntypedStorage.from_file

    def from_file(*arguments: Any, **more: Any) -> Any:
        again.start()
        again.join(0.5)  # it waits for this opening to be over
        return real(*arguments, **more)

    monkeypatch.setattr(torch.UntypedStorage, "from_file", from_file)
    open_tensors(first.handles)
    again.join()
    assert paths == [first.handles[0].path]
