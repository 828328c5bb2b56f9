"""What a worker asks of its batch and is answered later: a version, that it is ready, digests. Owned by the agent's loop."""

from __future__ import annotations

import time
from typing import Protocol

from etha_ray.errors import BatchUnmatchedError, EthaRayError
from etha_ray.tensor_bus.agreement import Direction
from etha_ray.tensor_bus.bus import BatchState, Member
from etha_ray.tensor_bus.commands import MakeDigest, WaitReady, WaitVersion
from etha_ray.tensor_bus.digesting import Digesting
from etha_ray.tensor_bus.jobs import Job
from etha_ray.tensor_bus.messages import DigestPart
from etha_ray.tensor_bus.receiving import Receiving
from etha_ray.tensor_bus.registered import Registered
from etha_ray.tensor_bus.transfer_state import silent_senders
from etha_ray.tensor_bus.versions import VersionWaits
from etha_ray.tensor_bus.waits import ReadyWaits


class Asked(Member, Protocol):
    """What this needs of a batch beside what its two sides need."""

    state: BatchState
    job: Job[Registered] | None
    closed: EthaRayError | None
    receiving: Receiving

    @property
    def loss(self) -> EthaRayError | None:
        """What to say of the members that are gone."""

    def refusal(self, direction: Direction) -> EthaRayError | None:
        """Why a transfer cannot begin, or go on."""

    def want(self) -> None:
        """Its worker wants to go on."""


class Questions:
    """Those that ``member``'s worker waits for an answer to."""

    def __init__(self, member: Asked) -> None:
        self._member = member
        self._versions = VersionWaits(member.bus.answer, member.bus.refuse)
        self._ready = ReadyWaits(member.bus.answer, member.bus.refuse)
        self._digesting = Digesting(member)

    # ------------------------------------------------------------------------------------------------------- asking

    def wait_version(self, command: WaitVersion) -> None:
        """Answer once the tensors hold this version or a later one."""
        self._versions.add(command, time.monotonic())
        if self._member.holding.version:
            self._versions.reach(self._member.holding.version)
        self.end_versions()

    def wait_ready(self, command: WaitReady) -> None:
        """Answer once all members are there, and the batch is ready for transfers."""
        if self._member.state is BatchState.READY:
            self._member.bus.answer(command, None)
        else:
            self._ready.add(command, time.monotonic())
            self._member.want()

    def make_digest(self, command: MakeDigest) -> None:
        """Answer with the tensors' digests; the batch must be ready. Raises as `Digesting.ask`."""
        if self._member.state is not BatchState.READY:
            raise self._member.closed or self._member.loss or BatchUnmatchedError(self._not_ready())
        self._digesting.ask(command)

    def give_up(self, command_id: int) -> None:
        """The worker does not wait any more for this command."""
        self._versions.drop(command_id)
        self._ready.drop(command_id)
        self._digesting.give_up(command_id)

    # ---------------------------------------------------------------------------------------------------- answering

    def reached(self, version: int) -> None:
        """The tensors hold this version now."""
        self._versions.reach(version)

    def ready(self) -> None:
        """The batch is ready."""
        self._ready.done(None)

    def on_part(self, message: DigestPart) -> None:
        """Another rank of the side says what it added up for digests."""
        self._digesting.on_part(message)

    def lost(self, error: EthaRayError) -> None:
        """A member is gone."""
        self.end_versions()
        self._digesting.fail(error)

    def end_versions(self) -> None:
        """End waiting for versions where no receive can bring them."""
        refusal = None if self._member.transfer is not None else self._member.refusal("recv")
        if refusal is not None:
            self._versions.fail(refusal)

    def not_registered(self, error: EthaRayError, *, tries_again: bool) -> None:
        """The registration failed. One that ``tries_again`` may be ready later."""
        self._versions.fail(error)
        if not tries_again:
            self._ready.fail(error)

    def renewed(self) -> None:
        """The batch registers again: what its side offered for digests is of before."""
        self._digesting = Digesting(self._member)

    def fail(self, error: EthaRayError) -> None:
        """The batch is closed."""
        for waits in (self._versions, self._ready, self._digesting):
            waits.fail(error)

    # --------------------------------------------------------------------------------------------------------- time

    @property
    def waiting(self) -> bool:
        """Whether anything waits that may have a `deadline`."""
        return bool(self._versions.waiting or self._ready.waiting or self._digesting.waits.waiting)

    @property
    def deadline(self) -> float | None:
        """When `expire` has something to do, by the monotonic clock."""
        deadlines = self._versions.deadline, self._ready.deadline, self._digesting.waits.deadline
        return min((deadline for deadline in deadlines if deadline is not None), default=None)

    def expire(self, now: float) -> None:
        """Answer what waits and whose time is up."""
        if self._versions.waiting:
            self._versions.expire(now, self._held())
        if self._ready.waiting:
            self._ready.expire(now, self._not_ready())
        self._digesting.expire(now)

    def _held(self) -> str:
        member = self._member
        held, transfer, batch = member.holding, member.transfer, f"batch {member.batch_id!r}"
        what = f"{batch} is torn ({held.why})" if held.torn else f"{batch} holds version {held.version}"
        if member.state is BatchState.REGISTERING:
            return f"{what}: the other side has not registered it"
        missing = silent_senders(member.registered, member.receiving.announced)
        if missing:
            return f"{what}: {missing} did not send a newer one"
        if transfer is None or transfer.command.transfer_type == "send":
            return f"{what}: a newer one was sent, call transfer('recv') for it" if member.registered.sources else what
        return f"{what}: {transfer.version} is being received"

    def _not_ready(self) -> str:
        job = self._member.job
        who = job.cancellation.waits_for if job is not None else ""
        return f"batch {self._member.batch_id!r} is not ready: {who or self._member.loss or 'it is being registered'}"
