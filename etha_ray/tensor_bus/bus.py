"""What a batch needs of its agent, and what its two sides need of the batch."""

from __future__ import annotations

import enum
from collections.abc import Callable
from typing import Any, Protocol

from etha_ray.tensor_bus.commands import BaseCommand
from etha_ray.tensor_bus.history import PastTransfer
from etha_ray.tensor_bus.jobs import Job
from etha_ray.tensor_bus.messages import Message, SenderMessage
from etha_ray.tensor_bus.records import AgentRecord
from etha_ray.tensor_bus.registered import Peer, Registered
from etha_ray.tensor_bus.transfer_state import UnderWay
from etha_ray.tensor_bus.versions import Holding
from etha_ray.transport.base import CopyProgram


class BatchState(enum.Enum):
    """Drawn at the top of `batch`."""

    REGISTERING = "registering"
    READY = "ready"
    LOST = "lost"
    CLOSED = "closed"


class Bus(Protocol):
    """What a batch needs of its agent."""

    def tell(self, agent: AgentRecord, message: Message) -> None:
        """Send a message to an agent."""

    def remind(self, agent: AgentRecord, message: Message) -> None:
        """Send a message to an agent that was lost, if it may only stand still."""

    def gone(self, agent: AgentRecord) -> str:
        """Why an agent that shares memory with this one may have failed its workers; empty if it has not."""

    def answer(self, command: BaseCommand, value: object) -> None:
        """A command succeeded."""

    def refuse(self, command: BaseCommand, error: BaseException) -> None:
        """A command failed."""

    def soon(self, call: Callable[[], None]) -> None:
        """Have the loop call this, after what it does now and what stands in the queue."""

    def move(self, program: CopyProgram, done: Callable[[Job[int]], None]) -> None:
        """Run a program beside the loop."""

    def when_passed(self, mark: bytes, done: Callable[[Job[None]], None]) -> Job[None]:
        """Wait beside the loop until a worker's GPU has passed a mark."""

    def forget_mark(self, mark: bytes) -> None:
        """Nothing waits for this mark again."""

    def note(self, past: PastTransfer) -> None:
        """A transfer is over."""

    def hold(self, client_id: str, batch_id: str, holding: Holding) -> None:
        """Write down what a client's batch holds, for its worker to read."""

    def received(self, member: Member, version: int) -> None:
        """A member's tensors were received at this version; 0: they are being written, or are torn."""


class Member(Protocol):
    """What the two sides of a batch need of it: one worker's registration, and the transfer under way."""

    bus: Bus
    batch_id: str
    registration: str
    registered: Registered
    transfer: UnderWay | None
    holding: Holding
    used: int

    def name(self, registration: str) -> str:
        """Another member, for messages."""

    def number(self, transfer: UnderWay) -> None:
        """A send is announced for the first time."""

    def hold(self, holding: Holding) -> None:
        """Note what the tensors hold from now on."""

    def finish(self, error: BaseException | None) -> None:
        """The transfer under way is over."""


def tell(member: Member, peer: Peer, what: type[SenderMessage], source: str, target: str, sequence: int, **more: Any) -> None:
    """Send a message about the transfer number ``sequence`` to ``peer``'s agent."""
    member.bus.tell(peer.member.agent, what(batch_id=member.batch_id, source=source, target=target, sequence=sequence, **more))
