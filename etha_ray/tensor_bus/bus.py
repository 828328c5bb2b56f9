"""What a batch needs of its agent."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from etha_ray.tensor_bus.commands import BaseCommand, Message
from etha_ray.tensor_bus.history import PastTransfer
from etha_ray.tensor_bus.jobs import Job
from etha_ray.tensor_bus.records import AgentRecord
from etha_ray.tensor_bus.versions import Holding
from etha_ray.transport.base import CopyProgram


class Bus(Protocol):
    """What a batch needs of its agent."""

    def tell(self, agent: AgentRecord, message: Message) -> None:
        """Send a message to an agent."""

    def answer(self, command: BaseCommand, value: object) -> None:
        """A command succeeded."""

    def refuse(self, command: BaseCommand, error: BaseException) -> None:
        """A command failed."""

    def move(self, program: CopyProgram, done: Callable[[Job[int]], None]) -> None:
        """Run a program beside the loop."""

    def note(self, past: PastTransfer) -> None:
        """A transfer is over."""

    def hold(self, client_id: str, batch_id: str, holding: Holding) -> None:
        """Write down what a client's batch holds, for its worker to read."""
