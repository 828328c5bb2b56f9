"""Which members a batch has lost, and what becomes of a transfer then."""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from etha_ray.errors import EthaRayError

Returns: TypeAlias = Literal["no", "perhaps", "soon"]
"""Whether a member comes back by itself: "no" if its worker closed the batch, "perhaps" if the worker left or died, "soon" if only
its agent did, which somebody restarts, or if it registers again."""

_NAMED = 16
"""Of many that are gone so many are named, beside the first."""


@dataclass(frozen=True)
class Loss:
    """One member that is gone; ``completed`` is how many transfers of the batch it had completed. This agent itself has no ``name``."""

    error: EthaRayError
    completed: int
    returns: Returns
    name: str = ""


@dataclass
class Losses:
    """The members that a batch has lost since it was ready, by registration, since ``since`` by the monotonic clock."""

    members: dict[str, Loss] = field(default_factory=dict)
    since: float = 0.0
    trouble: EthaRayError | None = None
    """Why the batch could not be registered again, where it could not."""

    def __bool__(self) -> bool:
        return bool(self.members) or self.trouble is not None

    def add(self, registration: str, loss: Loss, now: float) -> None:
        """Another member is gone; what is known of one stays."""
        if not self:
            self.since = now
        self.members.setdefault(registration, loss)

    @property
    def first(self) -> EthaRayError | None:
        """What to say of it."""
        return self.trouble or self._told(list(self.members.values()))

    @property
    def final(self) -> EthaRayError | None:
        """Why a transfer that needs all members is refused at once; None if it waits, as all that are gone come back soon."""
        return self.trouble or self._told([loss for loss in self.members.values() if loss.returns != "soon"])

    def blamed(self, completed: int) -> EthaRayError | None:
        """Why the transfer after ``completed`` cannot be any more: not for those who had what they wanted of it before they left."""
        final = [loss for loss in self.members.values() if loss.returns != "soon"]
        return self.trouble or self._told([loss for loss in final if loss.completed <= completed]) or self.final

    def _told(self, losses: list[Loss]) -> EthaRayError | None:
        """The first of these, and who else is gone."""
        if not losses:
            return None
        others = [loss.name for loss in self.members.values() if loss.name and loss is not losses[0]]
        more = [f"{len(others) - _NAMED} more"] if len(others) > _NAMED else []
        error = losses[0].error
        return type(error)(f"{error}; also gone: {', '.join(others[:_NAMED] + more)}") if others else error

    def leaves_room_for(self, needed: Container[str], completed: int) -> bool:
        """Whether those ``needed`` are there, and the others had completed the transfer that comes after ``completed``."""
        return all(loss.completed > completed and registration not in needed for registration, loss in self.members.items())
