"""Digests of a batch's tensors, made by all ranks of a side together. Owned by the agent's loop.

Each rank's worker asks its agent once. The agent adds up what its worker holds, beside the loop, and tells the other ranks of the side; who
has heard from all answers. Rounds are counted, so that a rank that asks again before another has heard everything confuses nobody; one
that gives up takes back what it said, and its next try is the same round.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import partial

from etha_ray.errors import EthaRayError, LayoutError, TransferInProgressError, TransferTimeoutError
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


class Digesting:
    """The digests of ``member``'s tensors, one round at a time."""

    def __init__(self, member: Member) -> None:
        self._member = member
        self.waits: Waits[MakeDigest] = Waits(member.bus.answer, member.bus.refuse)
        self._round = 0
        self._said: dict[str, bytes] | None = None
        self._heard: dict[tuple[int, str], dict[str, bytes]] = {}

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
        self._round += 1
        self._said = program.parts
        self._tell(program.parts)
        self._end_if_all()

    def on_part(self, message: DigestPart) -> None:
        """Another rank of the side says what it added up, or takes it back."""
        key = message.number, message.source
        if message.parts:
            self._heard[key] = message.parts
        else:
            self._heard.pop(key, None)
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
        missing = sorted(self._member.name(each) for each in self._member.registered.side if (self._round, each) not in self._heard)
        who = f"{', '.join(missing)} did not ask for one" if self._said is not None else "its tensors are still being read"
        self._take_back()  # first: others must not add to this what they are asked for once its worker knows
        self.waits.fail(
            TransferTimeoutError(f"batch {self._member.batch_id!r}: no digest in time: {who}; call digest() on every rank of this side")
        )

    def _end_if_all(self) -> None:
        member, said = self._member, self._said
        side = member.registered.side
        if said is None or any((self._round, each) not in self._heard for each in side):
            return
        parts = {member.registration: said, **{each: self._heard.pop((self._round, each)) for each in side}}
        self._said = None
        found: dict[int, str] = {}
        try:
            for each in member.registered.digested:
                found.update(each.digests({name: parts[name][each.pair_name] for name in each.members}, member.registration))
        except LayoutError as error:
            self.waits.fail(LayoutError(f"batch {member.batch_id!r}, {error}"))
            return
        self.waits.done([found[place] for place in sorted(found)])

    def _take_back(self) -> None:
        if self._said is not None:
            self._tell({})
            self._said = None
            self._round -= 1

    def _tell(self, parts: dict[str, bytes]) -> None:
        member = self._member
        for registration in member.registered.side:
            agent = member.registered.others[registration].member.agent
            message = DigestPart(batch_id=member.batch_id, source=member.registration, target=registration, number=self._round, parts=parts)
            member.bus.tell(agent, message)
