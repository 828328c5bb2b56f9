"""What a session asks of whatever carries bytes for it: streams, or a communicator."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Generic, TypeVar

from etha_ray.errors import EthaRayError


class Job:
    """One run of what one program gets of one owner by one path.

    Args:
        finished: called once, when no byte of it is written any more: all is here, or ``error`` says why not.
        describe: what a message, by its number, has of which tensors.
    """

    def __init__(self, program: int, finished: Callable[[Job], None], describe: Callable[[int], str]) -> None:
        self.program = program
        self.finished = finished
        self.describe = describe
        self.error: EthaRayError | None = None


J = TypeVar("J", bound=Job)


class DataPath(ABC, Generic[J]):
    """Carries bytes for one session. All methods may be called from any thread."""

    @abstractmethod
    def submit(self, job: J) -> None:
        """Begin with it, or after those before it."""

    @abstractmethod
    def cancel(self, job: J, error: EthaRayError) -> None:
        """Ask for no more of it, for the reason of ``error``. What was asked for still comes, and then it is finished."""

    @abstractmethod
    def end(self, error: EthaRayError) -> None:
        """The session is over: all jobs fail with ``error``. Does not wait."""

    @abstractmethod
    def wait(self) -> None:
        """Return once its threads have ended; after `end`."""
