"""What is asked of CUDA's driver, of one that only acts as if there were GPUs (`fake_cuda.c`)."""

from __future__ import annotations

import os
import threading

import pytest

from etha_ray.cuda import driver as room
from etha_ray.cuda.driver import Driver, DriverError
from etha_ray.cuda.gpus import find_gpu, see_only
from tests.cuda.fake import FakeGpus, install, library, uuid


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> FakeGpus:
    monkeypatch.setenv("FAKE_CUDA_DEVICES", "")
    monkeypatch.setattr(room, "_driver", None)
    return install("3,1", patch=monkeypatch.setattr)


def test_uuids_do_not_depend_on_what_a_process_sees(gpus: FakeGpus) -> None:
    assert [gpus.driver.uuid(ordinal) for ordinal in range(gpus.driver.count())] == [uuid(3), uuid(1)]
    assert uuid(3) == "GPU-a3a3a3a3-a3a3-a3a3-a3a3-a3a3a3a3a3a3"


def test_errors_have_the_names_that_the_driver_gives_them(gpus: FakeGpus) -> None:
    with pytest.raises(DriverError, match=r"^cuDeviceGet: CUDA_ERROR_INVALID_DEVICE$"):
        gpus.driver.uuid(2)
    gpus.fail("cuDeviceGetCount", 12345)
    with pytest.raises(DriverError, match=r"^cuDeviceGetCount: CUDA error 12345$"):
        gpus.driver.count()
    assert gpus.driver.count() == 2


def test_a_context_is_current_within_and_not_after(gpus: FakeGpus) -> None:
    address = gpus.allocate(1000, ordinal=1)

    def ask() -> None:
        with pytest.raises(DriverError, match="CUDA_ERROR_INVALID_CONTEXT"):
            gpus.driver.range_of(address)
        with gpus.driver.current(1):
            assert gpus.driver.range_of(address + 999) == (address, 1000)
            with gpus.driver.current(0):
                assert gpus.driver.is_ipc_capable(address)
            assert gpus.driver.buffer_id(address) > 0
        with pytest.raises(DriverError, match="CUDA_ERROR_INVALID_CONTEXT"):
            gpus.driver.range_of(address)

    ask()
    thread = threading.Thread(target=ask)
    thread.start()
    thread.join()


def test_a_driver_that_lacks_a_call_says_which(gpus: FakeGpus) -> None:
    with pytest.raises(DriverError, match=r"cuFuture: not in this driver, which is too old"):
        gpus.driver._call("cuFuture")


def test_no_driver() -> None:
    with pytest.raises(OSError, match="no-such-library"):
        Driver("no-such-library.so")


class TestFindGpu:
    def test_by_number(self, gpus: FakeGpus) -> None:
        assert find_gpu(1) == (uuid(1), "")

    def test_one_that_is_not_there(self, gpus: FakeGpus, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7")
        assert find_gpu(2) == ("", "it sees 2 GPUs, with CUDA_VISIBLE_DEVICES='7'")

    def test_no_cuda_in_torch(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("torch.version.cuda", None)
        found = find_gpu(0)
        assert found.uuid == ""
        assert "has no CUDA; install a build that has" in found.trouble

    def test_no_driver_on_the_machine(self, gpus: FakeGpus, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(room, "_driver", None)
        monkeypatch.setattr(room, "LIBRARY", "libcuda-that-is-not-there.so")
        monkeypatch.setattr(room.Driver.__init__, "__defaults__", ("libcuda-that-is-not-there.so",))
        assert "CUDA's driver does not answer (loading it: libcuda-that-is-not-there.so" in find_gpu(0).trouble


def test_the_fake_is_compiled_once() -> None:
    assert library() == library()


def test_an_agent_sees_one_gpu_and_has_all_its_queues(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3")
    monkeypatch.setenv("CUDA_DEVICE_MAX_CONNECTIONS", "1")  # as Megatron's launchers do
    monkeypatch.setenv("NCCL_COMM_BLOCKING", "1")
    monkeypatch.setenv("CUDA_LAUNCH_BLOCKING", "1")
    assert see_only("cuda:3") == 0
    assert not {"NCCL_COMM_BLOCKING", "CUDA_LAUNCH_BLOCKING"} & os.environ.keys()
    assert (os.environ["CUDA_VISIBLE_DEVICES"], os.environ["CUDA_DEVICE_MAX_CONNECTIONS"]) == ("3", "32")
