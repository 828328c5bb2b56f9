"""Commands that an agent answers later: once what they wait for is there, or their time is up. On the agent's loop only."""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, TypeVar

from etha_ray.errors import BatchUnmatchedError
from etha_ray.tensor_bus.commands import BaseCommand, WaitReady

C = TypeVar("C", bound=BaseCommand)


class Waits(Generic[C]):
    """Commands that wait for the same thing.

    Args:
        answer, refuse: end a command with a value or an error.
    """

    def __init__(self, answer: Callable[[BaseCommand, object], None], refuse: Callable[[BaseCommand, BaseException], None]) -> None:
        self.answer = answer
        self.refuse = refuse
        self.waiting: list[tuple[C, float]] = []
        """Each with when it was asked, by the monotonic clock."""

    def add(self, command: C, now: float) -> None:
        """Keep a command until its time is up, by the monotonic clock."""
        self.waiting.append((command, now))

    @property
    def deadline(self) -> float | None:
        """When the next one expires."""
        return min((asked + command.timeout for command, asked in self.waiting if command.timeout is not None), default=None)

    def done(self, value: object) -> None:
        """It is there."""
        for command in self._take(lambda *_: True):
            self.answer(command, value)

    def fail(self, error: BaseException) -> None:
        """It will not come any more."""
        for command in self._take(lambda *_: True):
            self.refuse(command, error)

    def drop(self, command_id: int) -> None:
        """Nobody waits for this one any more."""
        self._take(lambda command, _: command.command_id == command_id)

    def _expired(self, now: float) -> list[C]:
        return self._take(lambda command, asked: command.timeout is not None and asked + command.timeout <= now)

    def _take(self, wanted: Callable[[C, float], bool]) -> list[C]:
        found = [command for command, asked in self.waiting if wanted(command, asked)]
        if found:
            self.waiting = [(command, asked) for command, asked in self.waiting if not wanted(command, asked)]
        return found


class ReadyWaits(Waits[WaitReady]):
    """Commands that are answered once a batch is ready."""

    def expire(self, now: float, state: str) -> None:
        """Answer those whose time is up; ``state`` says who is missing."""
        for command in self._expired(now):
            self.refuse(command, BatchUnmatchedError(f"{state}; that has not changed within {command.timeout:g} s"))
