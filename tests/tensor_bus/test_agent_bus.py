"""What an agent does for its batches beside its loop: programs that move or fail, and GPUs that are waited for."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from etha_ray.errors import TransferCancelledError, TransferError, WrongDeviceError
from etha_ray.tensor_bus.agent_bus import AgentBus
from etha_ray.tensor_bus.jobs import Job, Jobs
from etha_ray.tensor_bus.records import AgentRecord
from etha_ray.testing import eventually
from etha_ray.transport.base import NoProgram

NOTHING: Any = None
RECORD = AgentRecord(3, "incarnation", 1, 0.0, "host", "host", "", "", "", "", "cpu")


class Broken(NoProgram):
    def run(self) -> int:
        raise OSError("the cable was cut")


class Marks:
    """One mark that is passed when it is looked at for the third time; any other is not known."""

    def __init__(self) -> None:
        self.looks = 0
        self.forgotten: list[bytes] = []

    def passed(self, mark: bytes) -> bool:
        if mark == b"unknown":
            raise TransferError("there is no such mark")
        self.looks += 1
        return mark == b"third" and self.looks >= 3

    def forget(self, mark: bytes) -> None:
        self.forgotten.append(mark)


@pytest.fixture
def jobs() -> Iterator[Jobs]:
    jobs = Jobs(lambda: None)
    yield jobs
    jobs.close()


@pytest.fixture
def bus(jobs: Jobs) -> Iterator[AgentBus]:
    bus = AgentBus(RECORD, NOTHING, NOTHING, jobs, NOTHING, NOTHING, NOTHING, None)
    yield bus
    bus.close()


def ended(jobs: Jobs, over: list[Job[Any]]) -> Job[Any]:
    eventually(lambda: (jobs.run(jobs.take()), over)[1])
    return over.pop()


def test_the_end_of_a_program_comes_to_the_loop_however_it_ends(bus: AgentBus, jobs: Jobs) -> None:
    over: list[Job[int]] = []
    bus.move(NoProgram(), over.append)
    assert ended(jobs, over).value == 0
    bus.move(Broken(), over.append)
    job = ended(jobs, over)
    assert job.value is None
    assert isinstance(job.error, OSError)
    bus.move(Broken(), over.append)
    bus.close()
    jobs.run(jobs.take())
    assert over, "what was under way has ended then"


def test_a_mark_is_waited_for_until_it_is_passed_or_nobody_waits(bus: AgentBus, jobs: Jobs, monkeypatch: pytest.MonkeyPatch) -> None:
    over: list[Job[None]] = []
    bus.when_passed(b"third", over.append)
    assert isinstance(ended(jobs, over).error, WrongDeviceError), "this agent has no GPU"
    bus.forget_mark(b"third")
    marks = Marks()
    monkeypatch.setattr(bus, "_marks", marks)
    bus.when_passed(b"third", over.append)
    assert ended(jobs, over).error is None
    assert (marks.looks, marks.forgotten) == (3, [])
    bus.when_passed(b"never", over.append).cancellation.cancel("the transfer is over")
    assert isinstance(ended(jobs, over).error, TransferCancelledError)
    bus.when_passed(b"unknown", over.append)
    assert isinstance(ended(jobs, over).error, TransferError)
    assert marks.forgotten == [b"never", b"unknown"]
