"""Marks on a GPU's streams, with events that the test lets pass."""

from __future__ import annotations

import contextlib
import gc
import weakref
from typing import Any

import pytest
import torch

from etha_ray.cuda import marks
from etha_ray.cuda.marks import Mark, MarksOfOthers
from etha_ray.errors import TransferError


class Event:
    """What is asked of torch's."""

    opened: list[bytes] = []  # noqa: RUF012
    fails: Exception | None = None

    def __init__(self, interprocess: bool = False) -> None:
        assert interprocess
        self.recorded: list[str] = []
        self.done = True
        self.waited = 0

    def record(self, stream: str) -> None:
        self.recorded.append(stream)

    def ipc_handle(self) -> bytes:
        assert self.recorded, "torch makes an event when it is recorded first"
        if Event.fails is not None:
            raise Event.fails
        return id(self).to_bytes(8, "little") * 8

    def query(self) -> bool:
        if Event.fails is not None:
            raise Event.fails
        return self.done

    def synchronize(self) -> None:
        self.waited += 1

    @classmethod
    def from_ipc_handle(cls, device: torch.device, handle: bytes) -> Event:
        if len(handle) != 64:
            raise RuntimeError("cudaErrorInvalidValue")
        assert device == torch.device("cuda", 2)
        cls.opened.append(handle)
        return cls(interprocess=True)


@pytest.fixture(autouse=True)
def events(monkeypatch: pytest.MonkeyPatch) -> type[Event]:
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"current stream of {device}")
    monkeypatch.setattr(marks, "_own", weakref.WeakValueDictionary())
    monkeypatch.setattr(Event, "opened", [])
    monkeypatch.setattr(Event, "fails", None)
    return Event


def event_of(mark: Mark) -> Any:
    return mark._event


def test_it_is_set_on_the_current_stream_again_and_again() -> None:
    mark = Mark(1)
    assert mark.set() == mark.set()
    assert event_of(mark).recorded == ["current stream of cuda:1"] * 2
    assert event_of(mark).waited == 0


def test_a_mark_of_this_process_is_not_opened(events: type[Event]) -> None:
    mark, others = Mark(1), MarksOfOthers(2)
    handle = mark.set()
    event_of(mark).done = False
    assert not others.passed(handle)
    event_of(mark).done = True
    assert others.passed(handle)
    assert events.opened == []
    del mark
    gc.collect()
    others.passed(handle)
    assert events.opened == [handle]


def test_others_are_opened_once(events: type[Event]) -> None:
    others, handle = MarksOfOthers(2), b"x" * 64
    assert others.passed(handle)
    assert others.passed(handle)
    assert events.opened == [handle]
    others.forget(handle)
    others.forget(handle)
    assert others.passed(handle)
    assert events.opened == [handle] * 2


def test_what_is_no_mark_and_a_gpu_that_failed(events: type[Event]) -> None:
    others = MarksOfOthers(2)
    with pytest.raises(TransferError, match=r"cannot be waited for: cudaErrorInvalidValue"):
        others.passed(b"short")
    assert others.passed(b"x" * 64)
    events.fails = RuntimeError("CUDA error: an illegal memory access was encountered")
    with pytest.raises(TransferError, match="illegal memory access"):
        others.passed(b"x" * 64)


def test_without_interprocess_events_it_waits_itself(events: type[Event], caplog: pytest.LogCaptureFixture) -> None:
    mark = Mark(1)
    events.fails = RuntimeError("operation not supported")
    assert mark.set() == mark.set() == b""
    assert event_of(mark).waited == 2
    assert caplog.text.count("operation not supported") == 1  # said once
