from __future__ import annotations

import os
import resource
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import psutil
import pytest
import torch
from torch.distributed.tensor import DTensor, Replicate

from etha_ray import shared_files
from etha_ray.errors import (
    HandleExpiredError,
    MemoryHandleError,
    NotShareableError,
    SharedMemoryFullError,
    WrongDeviceError,
)
from etha_ray.memory import (
    TensorHandle,
    decode_handle,
    encode_handle,
    export_tensors,
    open_tensors,
)
from etha_ray.testing import eventually
from tests.contracts.transport import DTYPES, bits, random_tensor
from tests.memory.programs import kill, line_of, names_of, open_descriptors, python


class TestHandle:
    def test_survives_the_wire(self) -> None:
        handle = export_tensors([torch.zeros(3, 4)[:, 1:]]).handles[0]
        assert handle.kind == "shm"
        assert decode_handle(encode_handle(handle)) == handle
        assert (handle.dtype, handle.shape, handle.stride, handle.storage_offset, handle.nbytes) == ("float32", (3, 3), (4, 1), 1, 48)

    def test_can_be_a_field(self) -> None:
        handle = export_tensors([torch.zeros(3)]).handles[0]
        data = msgspec.msgpack.encode({"handles": [handle]})
        assert msgspec.msgpack.decode(data, type=dict[str, list[TensorHandle]]) == {"handles": [handle]}

    @pytest.mark.parametrize("data", [b"", b"\xc1", b"\x90", msgspec.msgpack.encode(["cuda"]), msgspec.msgpack.encode(["shm", "pid"])])
    def test_garbage(self, data: bytes) -> None:
        with pytest.raises(MemoryHandleError, match="not a tensor handle"):
            decode_handle(data)


class TestExport:
    def test_storage_moves_in_place(self) -> None:
        weight = torch.nn.Parameter(torch.randn(40, 30))
        view, before = weight.detach()[3:7].t(), weight.detach().clone()
        optimizer = torch.optim.SGD([weight], lr=0.5)
        exported = export_tensors([weight])
        assert torch.equal(weight, before)
        opened = open_tensors(exported.handles).tensors[0]
        weight.sum().backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        assert torch.equal(opened, before - 0.5)
        view.zero_()
        assert opened[3:7].eq(0).all()
        opened.fill_(7)
        assert weight.eq(7).all()

    def test_storages_are_shared_once(self) -> None:
        weight = torch.zeros(1000)
        before = open_descriptors()
        exported = export_tensors([weight, weight[5:], weight.view(10, 100).t(), torch.nn.Parameter(weight)])
        assert open_descriptors() == before + 1
        assert len({(handle.path, handle.inode) for handle in exported.handles}) == 1
        assert exported.nbytes == 4000
        again = export_tensors([weight])
        assert again.handles[0] == exported.handles[0]
        assert open_descriptors() == before + 1
        assert repr(exported) == "ExportedTensors(4 tensors, 1 storages, 4000 bytes)"

    def test_memory_lives_until_close(self) -> None:
        before = open_descriptors()
        exported = export_tensors([torch.arange(10)])
        assert open_tensors(exported.handles).tensors[0].sum() == 45
        exported.close()
        exported.close()
        assert open_descriptors() == before
        with pytest.raises(HandleExpiredError):
            open_tensors(exported.handles)

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_every_dtype(self, dtype: torch.dtype) -> None:
        tensor = random_tensor((5, 8), dtype)[1:, ::3]
        opened = open_tensors(export_tensors([tensor]).handles).tensors[0]
        assert (opened.dtype, opened.stride()) == (dtype, tensor.stride())
        assert bits(opened) == bits(tensor)

    @pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2), (1,), (1, 1)])
    def test_small_shapes(self, shape: tuple[int, ...]) -> None:
        before = open_descriptors()
        tensor = torch.ones(shape)
        exported = export_tensors([tensor])
        opened = open_tensors(exported.handles)
        assert opened.tensors[0].shape == shape
        assert torch.equal(opened.tensors[0], tensor)
        assert open_descriptors() == before + (1 if tensor.numel() else 0)

    def test_empty_view_of_a_full_storage(self) -> None:
        exported = export_tensors([torch.ones(4, 5)[2:2], torch.ones(3).expand(6, 3)])
        opened = open_tensors(exported.handles)
        assert [tuple(tensor.shape) for tensor in opened.tensors] == [(0, 5), (6, 3)]

    def test_nothing(self) -> None:
        assert open_tensors(export_tensors([]).handles).tensors == []

    def test_dtensor_stands_for_its_local_tensor(self, tmp_path: Path) -> None:
        torch.distributed.init_process_group("gloo", store=torch.distributed.FileStore(str(tmp_path / "s"), 1), rank=0, world_size=1)
        try:
            mesh = torch.distributed.init_device_mesh("cpu", (1,))
            local = torch.arange(12.0).view(3, 4)
            sharded = torch.nn.Parameter(DTensor.from_local(local, mesh, [Replicate()]))
            opened = open_tensors(export_tensors([sharded]).handles).tensors[0]
        finally:
            torch.distributed.destroy_process_group()
        assert type(opened) is torch.Tensor
        assert torch.equal(opened, local)
        opened.zero_()
        assert not local.any()

    def test_already_shared_memory_is_not_moved(self, tmp_path: Path) -> None:
        by_torch = torch.arange(5).share_memory_()
        address = by_torch.data_ptr()
        named = torch.arange(5000)
        shared_files.share_by_name(named.untyped_storage())
        for tensor in (by_torch, named, named[1000:]):
            opened = open_tensors(export_tensors([tensor]).handles).tensors[0]
            tensor[0] = 77
            assert torch.equal(opened, tensor)
        assert by_torch.data_ptr() == address

    def test_shared_memory_of_python(self) -> None:
        """A tensor over a block of multiprocessing.shared_memory keeps its place: others read that block too."""
        from multiprocessing.shared_memory import SharedMemory

        block = SharedMemory(create=True, size=10_000)
        try:
            array = np.frombuffer(block.buf, dtype=np.uint8, offset=100)
            tensor = torch.from_numpy(array)
            opened = open_tensors(export_tensors([tensor]).handles).tensors[0]
            array[7] = 200
            assert opened[7] == 200
            del array, tensor, opened
        finally:
            block.close()
            block.unlink()

    def test_checkpoint_mapped_by_torch_load(self, tmp_path: Path) -> None:
        torch.save(torch.arange(2000), tmp_path / "w.pt")
        exported = export_tensors([torch.load(tmp_path / "w.pt", mmap=True)])
        opened = open_tensors(exported.handles).tensors[0]
        assert torch.equal(opened, torch.arange(2000))

    def test_threads(self) -> None:
        from concurrent.futures import ThreadPoolExecutor

        tensors = [torch.full((1000,), float(index)) for index in range(40)]
        with ThreadPoolExecutor(8) as pool:
            exports = list(pool.map(lambda index: export_tensors([tensors[index % 40]]), range(160)))
        for index, exported in enumerate(exports):
            assert open_tensors(exported.handles).tensors[0].eq(index % 40).all()


class TestNotShareable:
    def check(self, tensor: torch.Tensor, *words: str, error: type[MemoryHandleError] = NotShareableError) -> None:
        good = torch.ones(3)
        with pytest.raises(error) as caught:
            export_tensors([good, tensor], ["weight", "layer.3 of batch 'w'"])
        for word in ("layer.3 of batch 'w'", *words):
            assert word in str(caught.value)
        assert not good.is_shared()  # nothing was moved

    def test_other_layouts(self) -> None:
        self.check(torch.eye(3).to_sparse(), "sparse_coo", "to_dense()")
        self.check(torch.eye(3).to_sparse_csr(), "sparse_csr")
        self.check(torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]), "nested")

    def test_meta(self) -> None:
        self.check(torch.ones(3, device="meta"), "meta", "to_empty")

    def test_other_device(self) -> None:
        class Elsewhere(torch.Tensor):
            device = torch.device("cuda", 1)  # type: ignore[assignment]

        self.check(torch.ones(3).as_subclass(Elsewhere), "cuda:1 tensor on a CPU agent", ".cpu()", error=WrongDeviceError)

    @pytest.mark.filterwarnings("ignore")
    def test_quantized(self) -> None:
        self.check(torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8), "quantized", "int_repr")

    def test_lazy_views(self) -> None:
        self.check(torch.ones(3, dtype=torch.complex64).conj(), "resolve_conj")

    def test_subclass_without_memory(self) -> None:
        class Wrapper(torch.Tensor):
            @staticmethod
            def __new__(cls) -> Wrapper:
                return torch.Tensor._make_wrapper_subclass(cls, (3,))  # type: ignore[attr-defined, no-any-return]

            __torch_dispatch__ = None  # type: ignore[assignment]

        self.check(Wrapper(), "Wrapper")

    def test_private_file_mappings(self, tmp_path: Path) -> None:
        path = tmp_path / "weights"
        path.write_bytes(bytes(4096))
        self.check(torch.from_file(str(path), shared=False, size=1024), "privately mapped", ".clone()")

    def test_files_outside_shared_memory(self, tmp_path: Path) -> None:
        path = tmp_path / "weights"
        path.write_bytes(bytes(4096))
        self.check(torch.from_file(str(path), shared=True, size=1024), str(path), ".clone()")

    def test_labels_must_fit(self) -> None:
        with pytest.raises(ValueError, match="1 labels for 2 tensors"):
            export_tensors([torch.ones(1), torch.ones(1)], ["a"])


class TestLimits:
    def test_full_shared_memory(self, monkeypatch: pytest.MonkeyPatch) -> None:
        real = os.statvfs("/dev/shm")
        fields = list(real)
        fields[4] = 3  # f_bavail
        monkeypatch.setattr(os, "statvfs", lambda path: os.statvfs_result(fields))
        tensors = [torch.ones(1024), torch.ones(1), torch.ones(1025)]
        shared = torch.ones(1 << 20).share_memory_()
        assert export_tensors([shared, *tensors[:2]]).handles  # what is shared already needs no room
        with pytest.raises(SharedMemoryFullError, match=rf"{3 * real.f_frsize} bytes free .* need 16384 .*--shm-size.*remount"):
            export_tensors([torch.ones(1024), torch.ones(1), fresh := torch.ones(1025)])
        assert not fresh.is_shared()

    def test_file_left_by_torch_is_removed(self) -> None:
        """When room runs out while torch makes a file (others fill it at the same time), torch leaves the name."""
        path = Path(f"/dev/shm/torch_{os.getpid()}_123_4")
        path.touch()
        text = f"unable to allocate shared memory(shm) for file </{path.name}>: No space left on device (28)"
        shared_files.remove_unfinished(RuntimeError(text))
        assert not path.exists()
        shared_files.remove_unfinished(RuntimeError(text))
        assert isinstance(shared_files.translated(RuntimeError(text), "w", 10), SharedMemoryFullError)

    def test_a_manager_that_stands_still(self, named: None, monkeypatch: pytest.MonkeyPatch) -> None:
        """torch waits for its answer for one second, and a busy machine may take longer."""
        export_tensors([torch.ones(3)])
        (manager,) = (each for each in psutil.Process().children() if each.name() == "torch_shm_manager")
        manager.suspend()
        try:
            with monkeypatch.context() as patch:
                patch.setattr(shared_files, "_MANAGER_TRIES", 1)
                with pytest.raises(MemoryHandleError, match=r"w: torch's shared-memory manager .*within 1 s.*register again"):
                    export_tensors([tensor := torch.ones(3)], ["w"])
            assert not tensor.is_shared()
            real, failed = torch.UntypedStorage._share_filename_cpu_, []

            def slow(storage: torch.UntypedStorage) -> Any:
                try:
                    return real(storage)
                except RuntimeError as error:
                    failed.append(error)
                    manager.resume()
                    raise

            monkeypatch.setattr(torch.UntypedStorage, "_share_filename_cpu_", slow)
            opened = open_tensors(export_tensors([tensor]).handles).tensors[0]
            assert len(failed) == 1
            tensor.fill_(7)
            assert opened.eq(7).all()
        finally:
            manager.resume()

    def test_mappings(self, monkeypatch: pytest.MonkeyPatch) -> None:
        handles = export_tensors([torch.ones(1)]).handles
        monkeypatch.setattr(shared_files, "mapping_limit", lambda: 1100)
        with pytest.raises(MemoryHandleError, match=r"vm.max_map_count"):
            open_tensors(handles)
        with pytest.raises(MemoryHandleError, match=r"1 storages need a memory mapping each.*at most 1100.*sysctl"):
            export_tensors([tensor := torch.ones(1)])
        assert not tensor.is_shared()

    @pytest.mark.parametrize(
        ("message", "words"),
        [("unable to mmap 8 bytes: Cannot allocate memory (12)", "max_map_count"), ("Too many open files (24)", "ulimit -n"), ("?", "?")],
    )
    def test_refusals_are_translated(self, message: str, words: str) -> None:
        error = shared_files.translated(RuntimeError(message), "tensor 3 of batch 'w'", 8)
        assert "tensor 3 of batch 'w'" in str(error)
        assert words in str(error)

    @pytest.mark.parametrize("hard", [1024, 200_000])
    def test_ten_thousand_tensors(self, hard: int) -> None:
        """Under a low hard limit by names beside descriptors; else the soft limit is raised."""
        hard = min(hard, resource.getrlimit(resource.RLIMIT_NOFILE)[1])
        process = python(f"""
            resource.setrlimit(resource.RLIMIT_NOFILE, (512, {hard}))
            tensors = [torch.full((16,), float(index)) for index in range(10_000)]
            exported = export_tensors(tensors)
            descriptors = len(os.listdir("/proc/self/fd"))
            opened = open_tensors(exported.handles)
            assert len(os.listdir("/proc/self/fd")) == descriptors
            assert torch.equal(torch.stack(opened.tensors), torch.stack(tensors))
            tensors[9_999].fill_(-1)
            assert opened.tensors[9_999].eq(-1).all()
            print(descriptors, sum(handle.path.startswith("/proc") for handle in exported.handles), flush=True)
            time.sleep(100)
        """)
        try:
            descriptors, by_descriptor = map(int, line_of(process).split())
        finally:
            kill(process)
        assert descriptors < hard - 200
        assert 500 < by_descriptor <= 10_000
        assert (by_descriptor == 10_000) == (hard > 10_300)
        eventually(lambda: not names_of(process.pid))
