"""NCCL by cupy as far as it goes without a GPU: cupy's own objects where it is installed, and a stand-in for what they answer."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch

from etha_ray.errors import CommunicatorError, OptionalDependencyError
from etha_ray.transport.nccl.communicator import RECEIVER, SENDER
from etha_ray.transport.nccl.cupy_nccl import CupyCommunicators, _Config, configuration, load_nccl
from tests.accelerator.host import HostAccelerator, HostLane

IN_PROGRESS = 7


class NcclError(RuntimeError):
    """Like cupy's, which has no name for "in progress"."""

    def __init__(self, status: int) -> None:
        self.status = status
        super().__init__({1: "NCCL_ERROR_UNHANDLED_CUDA_ERROR", 6: "NCCL_ERROR_REMOTE_ERROR: remote process exited"}[status])


class StandIn:
    """cupy's module, whose calls answer one status after the other: success when there are no more."""

    NCCL_UINT8 = 1
    NcclError = NcclError

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.answers: list[int] = []

    def answer(self, *call: Any) -> None:
        self.calls.append(call)
        if self.answers and (status := self.answers.pop(0)):
            raise NcclError(status)

    def groupStart(self) -> None:
        self.answer("groupStart")

    def groupEnd(self) -> None:
        self.answer("groupEnd")

    def get_unique_id(self) -> bytes:
        self.answer("get_unique_id")
        return bytes(128)

    @property
    def NcclCommunicator(self) -> type:
        module = self

        class NcclCommunicator:
            def __init__(self, *arguments: Any) -> None:
                module.answer("init", *arguments)

            def __getattr__(self, name: str) -> Callable[..., None]:
                return lambda *arguments: module.answer(name, *arguments)

        return NcclCommunicator


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> StandIn:
    module = StandIn()
    monkeypatch.setattr("etha_ray.transport.nccl.cupy_nccl.load_nccl", lambda: module)
    monkeypatch.setattr("etha_ray.transport.nccl.cupy_nccl.configuration", lambda _: "not blocking")
    return module


def test_in_progress_is_no_error_and_is_looked_at_again(module: StandIn) -> None:
    communicators = CupyCommunicators(HostAccelerator())
    unique_id = communicators.unique_id()
    module.answers = [IN_PROGRESS, IN_PROGRESS, IN_PROGRESS, 0]
    communicator = communicators.join(unique_id, RECEIVER)
    assert module.calls[-1] == ("init", 2, unique_id, RECEIVER, "not blocking")
    assert [communicator.ready() for _ in range(3)] == [False, False, True]
    module.calls.clear()
    module.answers = [0, 0, 0, IN_PROGRESS, IN_PROGRESS]
    communicator.receive([(4096, 10), (8192, 20)], HostLane())
    peer = SENDER
    assert module.calls == [("groupStart",), ("recv", 4096, 10, 1, peer, 0), ("recv", 8192, 20, 1, peer, 0), ("groupEnd",)]
    assert [communicator.ready() for _ in range(2)] == [False, True]
    communicator.abort()
    communicator.abort()
    assert module.calls[-1] == ("abort",)
    assert module.calls.count(("abort",)) == 1
    with pytest.raises(CommunicatorError, match="aborted"):
        communicator.ready()


def test_errors_are_in_nccls_words_and_a_group_is_closed_after_them(module: StandIn) -> None:
    communicators = CupyCommunicators(HostAccelerator())
    module.answers = [1]
    with pytest.raises(CommunicatorError, match="no unique id can be made: NCCL_ERROR_UNHANDLED_CUDA_ERROR"):
        communicators.unique_id()
    communicator = communicators.join(bytes(128), SENDER)
    module.calls.clear()
    module.answers = [0, 0, 6]
    with pytest.raises(CommunicatorError, match="a message was not taken: NCCL_ERROR_REMOTE_ERROR: remote process exited"):
        communicator.send([(4096, 10)] * 3, HostLane())
    assert [name for name, *_ in module.calls] == ["groupStart", "send", "send", "groupEnd"]
    module.answers = [6]
    with pytest.raises(CommunicatorError, match="it failed: NCCL_ERROR_REMOTE_ERROR"):
        communicator.ready()
    module.answers = [99]  # a status that this cupy has no name for
    with pytest.raises(CommunicatorError, match="it failed: NCCL answered 99"):
        communicator.ready()


def test_one_that_fails_while_it_is_joined_is_aborted(module: StandIn) -> None:
    """Or cupy destroys it, on any thread, where NCCL does not take that."""
    communicators = CupyCommunicators(HostAccelerator())
    module.answers = [6]
    with pytest.raises(CommunicatorError, match="it cannot be joined: NCCL_ERROR_REMOTE_ERROR"):
        communicators.join(bytes(128), SENDER)
    assert [name for name, *_ in module.calls] == ["init", "abort"]


def test_without_cupy_the_install_line_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cupy", None)
    monkeypatch.setitem(sys.modules, "cupy.cuda", None)
    with pytest.raises(OptionalDependencyError, match=r"there is no NCCL.*pip install 'etha-ray\[gpu-cuda13\]'"):
        load_nccl()


def test_a_cupy_that_is_laid_out_in_another_way_is_refused() -> None:
    class Other:
        @staticmethod
        def NcclConfig() -> object:
            return object()

        @staticmethod
        def get_build_version() -> int:
            return 99999

    with pytest.raises(OptionalDependencyError, match=r"made for NCCL 99999, cannot be set to not blocking.*pip install"):
        configuration(Other)


class TestCupyItself:
    """What is assumed of cupy's objects."""

    @pytest.fixture
    def nccl(self) -> Any:
        pytest.importorskip("cupy.cuda.nccl")
        with contextlib.suppress(OptionalDependencyError):
            return load_nccl()
        pytest.skip("cupy is here without NCCL")

    def test_its_config_can_be_set(self, nccl: Any) -> None:
        config = configuration(nccl)
        assert config.split_share == 0
        fields = _Config.from_address(id(config) + type(config).__basicsize__ - _size(nccl))
        assert (fields.blocking, fields.max_ctas) == (0, 16)
        assert fields.version == nccl.get_build_version()

    def test_it_has_no_name_for_in_progress(self, nccl: Any) -> None:
        with contextlib.suppress(KeyError):
            assert nccl.NcclError(IN_PROGRESS).status == IN_PROGRESS

    def test_unique_ids_are_bytes(self, nccl: Any) -> None:
        first, second = (CupyCommunicators(HostAccelerator()).unique_id() for _ in range(2))
        assert isinstance(first, bytes)
        assert len(first) == len(second) == 128
        assert first != second

    def test_a_failed_join_is_said(self, nccl: Any) -> None:
        if torch.cuda.is_available():
            pytest.skip("on a GPU it waits for the other end")
        communicators = CupyCommunicators(HostAccelerator())
        with pytest.raises(CommunicatorError, match="it cannot be joined: NCCL_ERROR"):
            communicators.join(communicators.unique_id(), SENDER)


def _size(nccl: Any) -> int:
    """Of the C structure in an `NcclConfig`."""
    config = nccl.NcclConfig()
    return next(
        fields.size
        for offset in range(object.__basicsize__, type(config).__basicsize__, 8)
        if (fields := _Config.from_address(id(config) + offset)).magic == 0xCAFEBEEF
    )
