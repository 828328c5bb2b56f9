"""The receiving side of a batch: the receive under way of what its senders announced (`announcements`). Owned by the agent's loop.

In place, bytes go straight into the worker's tensors: they are torn from before the first byte changes until all senders on other
hosts have said that what was read still stood. An atomic receive reads into memory of the agent instead; once all is there and
certain, its senders are let go and the tensors are written from there, by a copy within this host: only then are they torn, and only
if the agent is killed in the midst of it. Until then they hold what they held. So data that was taken back while it was read for an
atomic receive is no error of it: it waits for the next.
"""

from __future__ import annotations

import time
from functools import partial

from etha_ray.config import FAILURE_TIMEOUT
from etha_ray.errors import (
    AgentFailedError,
    BatchTornError,
    EthaRayError,
    IntegrityError,
    PeerLostError,
    TransferCancelledError,
    TransferTimeoutError,
    VersionMismatchError,
)
from etha_ray.tensor_bus.announcements import Announcements
from etha_ray.tensor_bus.bus import Member, tell
from etha_ray.tensor_bus.feeding import Feed, Reading
from etha_ray.tensor_bus.history import Flow, flow_key
from etha_ray.tensor_bus.jobs import Job
from etha_ray.tensor_bus.messages import DataRead, DataRevoked, DataStands, DataTaken, RelayAnswer, RelayRead, RelayWanted
from etha_ray.tensor_bus.registered import torn_positions
from etha_ray.tensor_bus.relaying import Lending, Relaying
from etha_ray.tensor_bus.transfer_state import TransferState, UnderWay
from etha_ray.tensor_bus.versions import shown_positions
from etha_ray.transport.base import CopyProgram

_ANSWER_TIMEOUT = 3 * FAILURE_TIMEOUT
"""Seconds in which the loop of an agent that lives answers, however busy its host is."""


class Receiving:
    """The receives of ``member``, one at a time. ``announced``: what may be read now, by the sender's registration."""

    def __init__(self, member: Member) -> None:
        self._member = member
        self.announced = Announcements(member)
        self._questions = 0
        self._relaying, self._lending = Relaying(member), Lending(member)

    # ----------------------------------------------------------------------------------------------------- steps

    def advance(self, transfer: UnderWay) -> None:
        """Begin to read, once every sender has announced, if they all mean the same version, and every relay has it or is done without."""
        member = self._member
        if transfer.state is not TransferState.WAITING or not self.announced.complete:
            return
        sources = member.registered.sources
        try:
            version = self.announced.agreed()
        except VersionMismatchError as mismatch:
            member.finish(mismatch)
            return
        if version is None:
            return
        transfer.version = version
        sends = {registration: self.announced[registration].sequence for registration in sources}
        self._lending.begin(sends)
        self._relaying.begin(sends)
        if not self._relaying.settled or not self._relaying.has(self._feed(transfer), 0):
            return
        transfer.state = TransferState.MOVING
        transfer.reading = {registration: self.announced[registration] for registration in member.registered.sources}
        transfer.moving_since = time.monotonic()
        if not transfer.command.atomic:
            self._tear(f"version {transfer.version} is being received, or its agent was killed")
        self._next_stage(transfer)
        if not transfer.command.atomic:
            member.bus.received(member, 0)

    def _feed(self, transfer: UnderWay) -> Feed:
        registered = self._member.registered
        return registered.staging.read if transfer.command.atomic else registered.feed

    def _next_stage(self, transfer: UnderWay) -> None:
        """Go on, if nothing moves and relays have what is read through them next."""
        feed = self._feed(transfer)
        if not transfer.moves and self._relaying.has(feed, transfer.stage):
            through = {relay for relay in self._relaying.states if feed.places(transfer.stage, relay)}
            transfer.through |= through
            self._move(transfer, feed.reading(transfer.stage, through))

    def _move(self, transfer: UnderWay, reading: Reading) -> None:
        transfer.moves = True
        self._member.bus.move(reading, partial(self._moved, transfer, reading))

    def _moved(self, transfer: UnderWay, reading: Reading, job: Job[int]) -> None:
        feed = self._feed(transfer)
        assert transfer.state is TransferState.MOVING
        transfer.moved = time.monotonic() - transfer.moving_since
        self._spoil_unheard(transfer)
        transfer.moves = False
        for relay in reading.lost:
            self._relaying.drop(relay)
        if isinstance(job.error, IntegrityError) and not transfer.spoilt:
            # A sender's worker may have written what its agent had taken back, and this not be known here yet.
            transfer.failed = reading, job.error
            self._ask(transfer)
            return
        if job.error is not None or transfer.spoilt:
            self._fail(transfer, reading, job.error)
            return
        if transfer.stage < feed.stages:
            transfer.stage += 1
            if not transfer.command.atomic and transfer.through <= self._relaying.states.keys():
                self._lending.progress(feed.upto(transfer.stage))
        if transfer.stage < feed.stages:
            self._next_stage(transfer)
            return
        if self._read_without(transfer, transfer.through - self._relaying.states.keys()):
            return
        self._ask(transfer)
        for relay in sorted(transfer.through):
            self._relaying.ask(relay)

    def _ask(self, transfer: UnderWay) -> None:
        """Ask senders on other hosts whether what was read stands.

        On this host a DataRevoked is in the queue before anything can be written, and was handled before this. That of another host
        may be on its way still, but its answer comes after it.
        """
        member = self._member
        transfer.state = TransferState.ASKING
        transfer.deadline = time.monotonic() + _ANSWER_TIMEOUT
        asked = {registration for registration, peer in member.registered.sources.items() if peer.remote}
        transfer.outstanding = asked if transfer.failed else asked | transfer.through
        self._questions += 1
        for registration in sorted(asked):
            sequence = transfer.reading[registration].sequence
            peer = member.registered.sources[registration]
            tell(member, peer, DataRead, registration, member.registration, sequence, question=self._questions)
        self._take_if_certain(transfer)

    def _read_without(self, transfer: UnderWay, relays: set[str]) -> bool:
        """Read from the senders what these relays have not kept; whether there was anything."""
        if not relays:
            return False
        transfer.through -= relays
        transfer.state = TransferState.MOVING
        self._lending.retract()  # some of it may have been passed on
        self._move(transfer, self._feed(transfer).again(relays))
        return True

    def _spoil_unheard(self, transfer: UnderWay) -> None:
        """What agents of this host announced does not stand if they were killed or stood still since, which they could not say."""
        member = self._member
        local = {registration: peer for registration, peer in member.registered.sources.items() if not peer.remote}
        agents = {peer.member.agent.incarnation: peer.member.agent for peer in local.values()}
        gone = {incarnation: member.bus.gone(agent) for incarnation, agent in agents.items()}
        for registration, peer in local.items():
            reason = gone[peer.member.agent.incarnation]
            if reason:
                lost = PeerLostError(f"batch {member.batch_id!r}: {peer.name} is gone ({reason})")
                self.spoil(transfer, registration, f"{peer.name} went away ({reason}) while its data was being read", lost)

    def _take_if_certain(self, transfer: UnderWay) -> None:
        if transfer.outstanding:
            return
        if transfer.failed:
            self._fail(transfer, *transfer.failed)
            return
        member = self._member
        sources = member.registered.sources
        givers = transfer.givers(member.registered)
        transfer.flows = tuple(
            Flow(flow_key(registration, member.registration, transfer.reading[registration].sequence), *givers[registration])
            for registration in sources
            if registration in givers
        )
        transfer.taken = tuple(transfer.reading[registration].send for registration in sources)
        for registration, peer in sources.items():
            taken, more = transfer.reading[registration], {"version": transfer.version, "seconds": transfer.moved}
            if self.announced.get(registration) is taken:  # else it has given that up since, and perhaps announced the next
                del self.announced[registration]
            tell(member, peer, DataTaken, registration, member.registration, taken.sequence, **more)
        if not transfer.command.atomic:
            self._lend(transfer)
            return
        transfer.state = TransferState.SWAPPING
        transfer.swapping_since = time.monotonic()
        self._tear(f"version {transfer.version} is being swapped in, or its agent was killed")
        member.bus.move(member.registered.staging.swap, partial(self._swapped, transfer))
        member.bus.received(member, 0)

    def _swapped(self, transfer: UnderWay, job: Job[int]) -> None:
        if job.error is None:
            self._lend(transfer)
        else:
            transfer.spoilt[""] = f"swapping in failed midway: {job.error}"
            kind = IntegrityError if isinstance(job.error, IntegrityError) else BatchTornError
            self._fail_torn(transfer, self._member.registered.received, kind)

    def _lend(self, transfer: UnderWay) -> None:
        """All is there; let others that this one passes on to read it."""
        transfer.state, transfer.deadline = TransferState.LENDING, transfer.latest
        transfer.lending_since = time.monotonic()
        self._lending.offer(transfer.moved)
        self._end_if_read(transfer)

    def _end_if_read(self, transfer: UnderWay | None) -> None:
        if transfer is not None and transfer.state is TransferState.LENDING and self._lending.done:
            self._member.finish(None)

    # ---------------------------------------------------------------------------------------------------- relays

    def relays_deadline(self, transfer: UnderWay) -> float | None:
        """When `relays_expired` has something to do."""
        if transfer.state is TransferState.WAITING:
            return self._relaying.deadline
        return self._lending.deadline if transfer.state is TransferState.LENDING else None

    def relays_expired(self, transfer: UnderWay) -> None:
        """Wait no more for relays that do not say anything, nor for receivers that do not come."""
        if transfer.state is TransferState.WAITING:
            self._relaying.expire()
            self.advance(transfer)
        self._end_if_read(transfer)

    def on_relay(self, message: RelayAnswer) -> None:
        """A relay says something of what it passes on."""
        transfer = self._member.transfer
        if transfer is None or not self._relaying.hears(message):
            return
        if message.state == "over":
            self._without(transfer, message.relay)
        elif message.state == "stands":
            if transfer.state is TransferState.ASKING and message.relay in transfer.outstanding:
                self._relaying.drop(message.relay, tell=False)
                transfer.outstanding.discard(message.relay)
                transfer.through.discard(message.relay)
                transfer.relayed.add(message.relay)
                self._take_if_certain(transfer)
        else:
            self._relaying.states[message.relay] = message.state
            self._relaying.upto[message.relay] = message.upto
            self._go_on(transfer)

    def on_taker(self, message: RelayWanted | RelayRead) -> None:
        """A receiver that this one passes on to says something."""
        if isinstance(message, RelayWanted):
            self._lending.on_wanted(message)
        else:
            self._lending.on_read(message)
        self._end_if_read(self._member.transfer)

    def lost(self, registration: str) -> None:
        """Another member is gone."""
        transfer = self._member.transfer
        self._lending.lost(registration)
        if transfer is not None and registration in self._relaying.states:
            self._without(transfer, registration)
        self._end_if_read(self._member.transfer)

    def over(self, *, received: bool) -> None:
        """The transfer is over, and ``received`` what was sent: whoever still reads from here does so no more."""
        self._relaying.end()
        self._lending.end(received=received)

    def _without(self, transfer: UnderWay, relay: str) -> None:
        """This relay keeps nothing for this receiver, or not any more. While bytes move, `_moved` sees to it."""
        self._relaying.drop(relay, tell=False)
        self._go_on(transfer)
        if transfer.state is TransferState.ASKING and relay in transfer.through and not transfer.failed:
            self._read_without(transfer, {relay})

    def _go_on(self, transfer: UnderWay) -> None:
        """A relay has said something."""
        if transfer.state is TransferState.MOVING:
            self._next_stage(transfer)
        else:
            self.advance(transfer)

    # --------------------------------------------------------------------------------------------------- failing

    def spoil(self, transfer: UnderWay, source: str, why: str, error: EthaRayError | None = None) -> None:
        """What ``source`` announced does not stand any more. ``error``: it will announce nothing more; an atomic receive fails so."""
        if source not in self._member.registered.sources:
            return
        asking = transfer.state is TransferState.ASKING
        # What relays have not confirmed may have to be read from the senders, so all of these are needed until then.
        if transfer.state is TransferState.MOVING or (asking and (source in transfer.outstanding or transfer.through)):
            transfer.spoilt[source] = why
            transfer.lost = transfer.lost or error
        if transfer.spoilt and (transfer.state is TransferState.ASKING or (transfer.state is TransferState.MOVING and not transfer.moves)):
            self.announced.pop(source, None)
            self._fail(transfer, *(transfer.failed or (None, None)))

    def not_answered(self, transfer: UnderWay) -> None:
        """The senders have not said in time whether what was read still stood.

        What was announced stays so: should they answer after all, receiving again takes it.
        """
        if transfer.outstanding <= transfer.through and not transfer.failed:  # they live, and may still receive themselves
            transfer.deadline = time.monotonic() + _ANSWER_TIMEOUT
            return
        names = ", ".join(sorted(self._member.name(source) for source in transfer.outstanding))
        why = f"{names} did not say whether their data still stood when it had been read"
        transfer.spoilt = dict.fromkeys(transfer.outstanding, why)
        transfer.lost = TransferTimeoutError(f"batch {self._member.batch_id!r}: {why}")
        self._fail(transfer, *(transfer.failed or (None, None)))

    def _fail(self, transfer: UnderWay, program: CopyProgram | None, error: BaseException | None) -> None:
        """``program`` ended with ``error``, if there is one, or what it read does not stand."""
        member = self._member
        written = bool(transfer.spoilt) and isinstance(error, IntegrityError)  # by those who took it back: no fault of what moved it
        if transfer.given_up and (error is None or written):
            transfer.lost = transfer.lost or TransferCancelledError("its worker gave up waiting")
        if not transfer.command.atomic:
            if error is not None and not written:
                transfer.spoilt.setdefault("", f"the copy failed midway: {error}")
            unfinished = program.unfinished() if program is not None and error is not None else frozenset[int]()
            if unfinished is not None:  # what relays have not confirmed may be anything
                feed = self._feed(transfer)
                left = feed.after(transfer.stage if program is not None else transfer.stage - 1)
                unfinished = unfinished.union(left, *(feed.passed_on(relay) for relay in transfer.through))
            # Nor do those on other hosts that have not said whether what was read of them stood then.
            remote = {registration for registration, peer in member.registered.sources.items() if peer.remote}
            unsure = transfer.outstanding if transfer.state is TransferState.ASKING else remote
            torn = torn_positions(member.registered, transfer.spoilt.keys() | unsure, unfinished)
            self._fail_torn(transfer, torn, IntegrityError if isinstance(error, IntegrityError) and not written else BatchTornError)
        elif (error is None or written) and transfer.lost is None:
            transfer.wait_again()
            self._relaying.end()
            self.advance(transfer)
        else:
            cause = transfer.lost or error
            kind = type(cause) if isinstance(cause, EthaRayError) else AgentFailedError
            held = f"its tensors still hold version {member.holding.version}" if member.holding.version else "nothing of it was written"
            member.finish(kind(f"{cause} (batch {member.batch_id!r}, received atomically: {held})"))

    def _fail_torn(self, transfer: UnderWay, torn: tuple[int, ...], kind: type[EthaRayError]) -> None:
        member = self._member
        why = "; ".join(dict.fromkeys(transfer.spoilt.values()))
        self._tear(why, torn)
        whole = [position for position in member.registered.received if position not in set(torn)]
        shown = f"torn: {shown_positions(torn)}" + (f"; whole, at version {transfer.version}: {shown_positions(whole)}" if whole else "")
        member.finish(kind(f"batch {member.batch_id!r}: {why}, so tensors may hold bytes of two versions ({shown}): receive again"))

    def _tear(self, why: str, torn: tuple[int, ...] | None = None) -> None:
        member = self._member
        member.hold(member.holding.tear(member.registered.received if torn is None else torn, why))

    # -------------------------------------------------------------------------------------------- senders' messages

    def on_stands(self, message: DataStands) -> None:
        """A sender on another host says that what was read stood until then."""
        transfer = self._member.transfer
        if transfer is not None and transfer.state is TransferState.ASKING and message.question == self._questions:
            transfer.outstanding.discard(message.source)
            self._take_if_certain(transfer)

    def on_revoked(self, message: DataRevoked) -> None:
        """A sender takes back what it announced."""
        known, transfer = self.announced.get(message.source), self._member.transfer
        if known is None or known.sequence != message.sequence:
            return
        asking = transfer is not None and transfer.state is TransferState.ASKING
        if transfer is not None and asking and not transfer.through and message.source not in transfer.outstanding:
            return  # it had been read, and stood
        del self.announced[message.source]
        if transfer is not None:
            self.spoil(transfer, message.source, f"{self._member.name(message.source)} gave up waiting while its data was being read")
