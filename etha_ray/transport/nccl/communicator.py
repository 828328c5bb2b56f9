"""What the network transport asks of NCCL: communicators of two, on which messages go one way.

Nothing here waits, but for `Communicator.abort`: whoever uses a communicator looks again and again whether it got on, so that a peer's
death, a time limit or a cancellation is never waited for behind a call into a library. One thread uses a communicator at a time.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TypeAlias

from etha_ray.accelerator import Lane

Message: TypeAlias = tuple[int, int]
"""Address in the device's memory, and bytes. What one end sends in a message, the other receives in one."""

SENDER, RECEIVER = 0, 1
"""The two ranks. The sender's process makes the unique id, and the receiver connects to it."""


class Communicator(ABC):
    """One end. Groups of messages arrive in the order in which they are sent; both ends give the same groups."""

    @abstractmethod
    def send(self, messages: Sequence[Message], lane: Lane) -> None:
        """Hand a group over to ``lane``: its memory is read when the lane gets there. Only when `ready`.

        Raises:
            CommunicatorError: as `ready`.
        """

    @abstractmethod
    def receive(self, messages: Sequence[Message], lane: Lane) -> None:
        """As `send`, for memory to be written."""

    @abstractmethod
    def ready(self) -> bool:
        """Whether it has been joined by both, and has handed over to the lane what it was given last. Does not wait.

        Raises:
            CommunicatorError: it failed, in the words of its library; it can only be aborted then.
        """

    @abstractmethod
    def abort(self) -> None:
        """End it, and what is under way on it: its lane does not wait for the other end any more. May be called twice, at any time.

        What had been handed over and has not arrived never does. Nothing is said to the other end.
        """


class Communicators(ABC):
    """Makes communicators on one device. From any thread, which must be that of all calls on what it makes, one at a time."""

    @abstractmethod
    def unique_id(self) -> bytes:
        """What the two ends of a new communicator know it by, made in the sender's process. Up to 1 KiB.

        Raises:
            CommunicatorError: there is no network interface that could be used.
        """

    @abstractmethod
    def join(self, unique_id: bytes, rank: int) -> Communicator:
        """Begin to join one; it is joined when it is `Communicator.ready`.

        Raises:
            CommunicatorError: it cannot be.
        """
