"""Interprocess events of CUDA's own: what another process, and this one, sees of a mark."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest
import torch

from etha_ray.cuda.marks import Mark, MarksOfOthers
from etha_ray.errors import TransferError
from etha_ray.testing import eventually
from tests.gpu import workers
from tests.tensor_bus.cluster import Worker

LATE = 5 * workers.LONG_TIME


@pytest.fixture
def worker() -> Iterator[Worker]:
    torch.zeros(1, device="cuda:0")  # this process's context takes as long as the GPU is to be late
    with contextlib.closing(Worker()) as worker:
        worker.start(workers.begin)
        worker.result(120)
        yield worker


def test_another_process_sees_when_it_is_passed(worker: Worker) -> None:
    others, handle = MarksOfOthers(0), worker.call(workers.set_mark, 1)
    assert len(handle) == 64
    eventually(lambda: others.passed(handle))
    for _ in range(3):  # set again, and opened once
        assert worker.call(workers.set_mark, LATE) == handle
        assert not others.passed(handle)
        eventually(lambda: others.passed(handle))
    others.forget(handle)
    assert worker.call(workers.set_mark, LATE) == handle
    assert not others.passed(handle)
    eventually(lambda: others.passed(handle))


def test_one_that_is_late_is_seen_by_who_comes_late(worker: Worker) -> None:
    """Nobody has opened it before it is set."""
    handle = worker.call(workers.set_mark, LATE)
    others = MarksOfOthers(0)
    assert not others.passed(handle)
    eventually(lambda: others.passed(handle))


def test_a_mark_of_this_process() -> None:
    mark, others = Mark(0), MarksOfOthers(0)
    torch.cuda._sleep(LATE)
    handle = mark.set()
    assert not others.passed(handle)
    torch.cuda.synchronize()
    assert others.passed(handle)


def test_what_is_no_mark() -> None:
    for handle in (b"short", bytes(64)):
        with pytest.raises(TransferError, match="cannot be waited for"):
            MarksOfOthers(0).passed(handle)


def test_a_worker_that_dies_before_it_is_passed(worker: Worker) -> None:
    """Whatever CUDA says of it then, it says it: nobody is held up, and this process's GPU works."""
    others, handle = MarksOfOthers(0), worker.call(workers.set_mark, LATE)
    others.passed(handle)
    worker.process.kill()
    worker.process.join()
    with contextlib.suppress(TransferError):
        others.passed(handle)
    others.forget(handle)
    assert torch.ones(3, device="cuda:0").sum().item() == 3
