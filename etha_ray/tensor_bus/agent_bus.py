"""What batches ask of their agent, done by it. On the agent's loop only; what takes time runs on threads of its own, and ends there."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from etha_ray.cuda.marks import MarksOfOthers
from etha_ray.errors import EthaRayError, WrongDeviceError
from etha_ray.tensor_bus.bus import Member
from etha_ray.tensor_bus.commands import BaseCommand
from etha_ray.tensor_bus.history import History, PastTransfer
from etha_ray.tensor_bus.jobs import Cancellation, Job, Jobs
from etha_ray.tensor_bus.links import Links
from etha_ray.tensor_bus.messages import Message
from etha_ray.tensor_bus.outcomes import Outcomes
from etha_ray.tensor_bus.records import AgentRecord
from etha_ray.tensor_bus.replicas import Replicas
from etha_ray.tensor_bus.state_file import StateFile, holding_key
from etha_ray.tensor_bus.versions import Holding
from etha_ray.transport.base import CopyProgram

_MOVERS = 8
"""Transfers that may copy at the same time; each uses the transport's threads."""

_FIRST_LOOK, _LAST_LOOK = 20e-6, 1e-3
"""Seconds between two looks at a GPU that is waited for, at first and at last."""


class AgentBus:
    """The `Bus` of one agent's batches.

    Args:
        record: who the agent is.
        links, outcomes, jobs, state, history, replicas: the agent's.
        gpu: which GPU of this process the agent is on, if it is on one.
    """

    def __init__(
        self,
        record: AgentRecord,
        links: Links,
        outcomes: Outcomes,
        jobs: Jobs,
        state: StateFile,
        history: History,
        replicas: Replicas,
        gpu: int | None,
    ) -> None:
        self._record = record
        self._links = links
        self._outcomes = outcomes
        self._jobs = jobs
        self._state = state
        self._history = history
        self._replicas = replicas
        self._marks = None if gpu is None else MarksOfOthers(gpu)
        self._movers = ThreadPoolExecutor(_MOVERS, thread_name_prefix="etha-ray move")

    def tell(self, agent: AgentRecord, message: Message) -> None:
        """Send a message to an agent."""
        self._links.tell(agent, message)

    def remind(self, agent: AgentRecord, message: Message) -> None:
        """Send a message to an agent that was lost, if it may only stand still."""
        self._links.remind(agent, message)

    def gone(self, agent: AgentRecord) -> str:
        """Why an agent that shares memory with this one may have failed its workers; empty if it has not."""
        return self._links.gone(agent)

    def answer(self, command: BaseCommand, value: object) -> None:
        """A command succeeded."""
        self._outcomes.ok(command, value)

    def refuse(self, command: BaseCommand, error: BaseException) -> None:
        """A command failed."""
        self._outcomes.failed(command, error)

    def soon(self, call: Callable[[], None]) -> None:
        """Have the loop call this, after what it does now and what stands in the queue."""
        self._jobs.post(call)

    def move(self, program: CopyProgram, done: Callable[[Job[int]], None]) -> None:
        """Run a program beside the loop."""

        def run() -> None:
            job: Job[int] = Job()
            try:
                job.value = program.run()
            except Exception as error:  # becomes the transfer's outcome
                job.error = error
            self._jobs.post(partial(done, job))

        self._movers.submit(run)

    def when_passed(self, mark: bytes, done: Callable[[Job[None]], None]) -> Job[None]:
        """Wait beside the loop until a worker's GPU has passed a mark."""
        marks = self._marks

        def wait(cancellation: Cancellation) -> None:
            if marks is None:
                raise WrongDeviceError(f"agent {self._record.rank} is on {self._record.device}, and its worker sends from a GPU")
            pause = _FIRST_LOOK
            try:
                while not marks.passed(mark):
                    cancellation.pause(pause)
                    pause = min(1.5 * pause, _LAST_LOOK)
            except EthaRayError:
                marks.forget(mark)  # its batch may have forgotten it before this looked last
                raise

        return self._jobs.start("wait for a GPU", wait, done)

    def forget_mark(self, mark: bytes) -> None:
        """Nothing waits for this mark again."""
        if self._marks is not None:
            self._marks.forget(mark)

    def note(self, past: PastTransfer) -> None:
        """A transfer is over."""
        self._history.note(past)

    def hold(self, client_id: str, batch_id: str, holding: Holding) -> None:
        """Write down what a client's batch holds, for its worker to read."""
        self._state.put(holding_key(client_id, batch_id), holding.encode())

    def received(self, member: Member, version: int) -> None:
        """A member's tensors were received at this version; 0: they are being written, or are torn."""
        self._replicas.holds(member, version)

    def close(self) -> None:
        """Wait for the copies under way; their ends have been posted then."""
        self._movers.shutdown(wait=True)
