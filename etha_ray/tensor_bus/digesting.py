"""Digests of a batch's tensors, made by all ranks of a side together. Owned by the agent's loop.

Each rank's worker asks its agent once. The agent adds up what its worker holds, beside the loop, and offers that to the other ranks of the
side. A rank whose worker waits answers an offer, and has to be answered to use it: so every part of a digest was added up for a call that
was under way together with this rank's, however messages cross. Two others' parts may be of calls that did not meet, if a timeout came
between: docs/guarantees.md.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from etha_ray.errors import AgentFailedError, EthaRayError, LayoutError, TransferInProgressError, TransferTimeoutError
from etha_ray.tensor_bus.bus import Member
from etha_ray.tensor_bus.commands import MakeDigest
from etha_ray.tensor_bus.digested import Digested
from etha_ray.tensor_bus.jobs import Job
from etha_ray.tensor_bus.messages import DigestPart
from etha_ray.tensor_bus.waits import Waits
from etha_ray.transport.base import CopyProgram


class _AddingUp(CopyProgram):
    """Copies nothing: it is run where copies are, beside the loop."""

    def __init__(self, digested: Sequence[Digested]) -> None:
        self._digested = digested
        self.parts: dict[str, bytes] = {}

    @property
    def nbytes(self) -> int:
        return 0

    def run(self) -> int:
        self.parts = {each.pair_name: each.added_up() for each in self._digested}
        return 0


@dataclass(frozen=True, slots=True)
class _Offer:
    """What another rank has added up, for its try of this number."""

    number: int
    parts: dict[str, bytes]


class Digesting:
    """The digests of ``member``'s tensors, one round at a time."""

    def __init__(self, member: Member) -> None:
        self._member = member
        self.waits: Waits[MakeDigest] = Waits(member.bus.answer, member.bus.refuse)
        self._number = 0
        self._said: dict[str, bytes] | None = None
        self._offers: dict[str, _Offer] = {}
        self._usable: dict[str, _Offer] = {}  # for the try under way, by whom

    def ask(self, command: MakeDigest) -> None:
        """Answer with the digests, by place, once all ranks of the side have asked.

        Raises:
            TransferInProgressError: a digest is being made, or tensors are being received.
            LayoutError: a tensor is Partial.
        """
        member = self._member
        where = f"batch {member.batch_id!r}"
        if self.waits.waiting:
            raise TransferInProgressError(f"{where}: a digest is being made; wait for it before the next")
        if member.transfer is not None and member.transfer.command.transfer_type == "recv":
            raise TransferInProgressError(f"{where}: its tensors are being received; wait for that before asking for their digests")
        for each in member.registered.digested:
            if (place := each.partial()) is not None:
                raise LayoutError(
                    f"{where}: tensor {place} is Partial on this side: its ranks hold contributions, and no value that had a digest;"
                    " ask the side that receives it"
                )
        self.waits.add(command, time.monotonic())
        program = _AddingUp(member.registered.digested)
        member.bus.move(program, partial(self._added_up, program, command.command_id))

    def _added_up(self, program: _AddingUp, command_id: int, job: Job[int]) -> None:
        if not any(command.command_id == command_id for command, _ in self.waits.waiting):
            return  # given up
        if job.error is not None:
            self.waits.fail(job.error)
            return
        self._number = secrets.randbits(62) + 1  # no counter: an agent that starts anew must not take up numbers that it has given
        self._said = program.parts
        self._offers, self._usable = self._usable | self._offers, {}  # an offer that a try of ours did not come to use still stands
        for registration in self._member.registered.side:
            self._tell(registration, program.parts)
        self._end_if_all()

    def on_part(self, message: DigestPart) -> None:
        """Another rank of the side offers what it added up, answers what this one offered, or takes back its own."""
        source, number = message.source, message.number
        if message.parts is None and not message.answers:
            for known in (self._offers, self._usable):
                if source in known and known[source].number == number:
                    del known[source]
            return
        if message.parts is not None:
            self._offers[source] = _Offer(number, message.parts)
            if self._said is not None and source not in self._usable:  # whose own try still needs this one's
                self._tell(source, None)
        if self._said is None or message.answers != self._number:
            return
        if source in self._offers and self._offers[source].number == number:
            self._usable[source] = self._offers.pop(source)
            self._end_if_all()

    def give_up(self, command_id: int) -> None:
        """Its worker does not wait any more for this command."""
        if any(command.command_id == command_id for command, _ in self.waits.waiting):
            self.waits.drop(command_id)
            self._take_back()

    def fail(self, error: EthaRayError) -> None:
        """A rank of the side is gone, or the batch is."""
        self.waits.fail(error)
        self._said = None

    def expire(self, now: float) -> None:
        """End what waits and whose time is up."""
        deadline = self.waits.deadline
        if deadline is None or now < deadline:
            return
        missing = sorted(self._member.name(each) for each in self._missing())
        who = f"{', '.join(missing)} did not ask for one" if self._said is not None else "its tensors are still being read"
        self._take_back()  # first: others must not add to this what they are asked for once its worker knows
        self.waits.fail(
            TransferTimeoutError(f"batch {self._member.batch_id!r}: no digest in time: {who}; call digest() on every rank of this side")
        )

    def _missing(self) -> list[str]:
        """The ranks that have not answered what was offered last."""
        return [each for each in self._member.registered.side if each not in self._usable]

    def _end_if_all(self) -> None:
        member, said = self._member, self._said
        if said is None or self._missing():
            return
        parts = {member.registration: said, **{each: offer.parts for each, offer in self._usable.items()}}
        self._said, self._usable = None, {}
        found: dict[int, str] = {}
        try:
            for each in member.registered.digested:
                found.update(each.digests({name: parts[name][each.pair_name] for name in each.members}, member.registration))
        except LayoutError as error:
            self.waits.fail(LayoutError(f"batch {member.batch_id!r}, {error}"))
            return
        except (KeyError, ValueError) as error:
            self.waits.fail(AgentFailedError(f"batch {member.batch_id!r}: a rank of this side added up for other tensors ({error!r})"))
            return
        self.waits.done([found[place] for place in sorted(found)])

    def _take_back(self) -> None:
        if self._said is None:
            return
        self._said = None
        for registration in self._member.registered.side:
            self._tell(registration, None, take_back=True)

    def _tell(self, registration: str, parts: dict[str, bytes] | None, take_back: bool = False) -> None:
        member, offer = self._member, self._offers.get(registration)
        message = DigestPart(
            batch_id=member.batch_id,
            source=member.registration,
            target=registration,
            number=self._number,
            answers=0 if offer is None or take_back else offer.number,
            parts=parts,
        )
        member.bus.tell(member.registered.others[registration].member.agent, message)
