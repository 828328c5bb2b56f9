"""Receivers that pass on to one another what several of them want (`etha_ray.plan.relays`). Owned by the agent's loop.

A receiver that gets something through a *relay* tells it so, when its own senders have announced (`RelayWanted`), and reads from the
relay's tensors, stage by stage, as it hears that they are there (`RelayAnswer`). The relay's receive is over only when those that read
from it are done, so that its worker does not write meanwhile; having read, they ask whether what they read stood (`RelayRead`), as they
ask their senders, and are answered once the relay itself is certain. All of them hear from the senders, and answer them, as if there
were no relays: nothing that was taken back is taken for good, whichever way it came, and what a relay does not pass on is read from the
senders instead. What a relay has to read again, its readers read again.

So nobody waits for one that does not come. A receiver gives a relay that is not receiving `_PATIENCE` seconds; and a relay that has all
keeps its tensors for those that have not asked for as long as its own bytes took to move, within `_LINGER`.
"""

from __future__ import annotations

import time
from typing import Literal, TypeAlias

from etha_ray.tensor_bus.bus import Member
from etha_ray.tensor_bus.feeding import Feed, Upto
from etha_ray.tensor_bus.messages import RelayAnswer, RelayRead, RelayWanted
from etha_ray.tensor_bus.transfer_state import TransferState

_PATIENCE = 1.0
_LINGER = (0.02, 1.0)

Sends: TypeAlias = dict[str, int]
"""The number of each sender's last send, by registration."""

State: TypeAlias = Literal["coming", "ready", "stands", "over"]


class Relaying:
    """The relays that ``member`` reads from in the receive under way; what they said last is in ``states``."""

    def __init__(self, member: Member) -> None:
        self._member = member
        self._question = 0
        self._sends: Sends | None = None
        self._until = 0.0
        self.states: dict[str, Literal["asked", "coming", "ready"]] = {}
        self.upto: dict[str, Upto] = {}

    def begin(self, sends: Sends) -> None:
        """What is to be received now: ask the relays for it, if they have not been."""
        if sends == self._sends:
            return
        self._sends, self._question = sends, self._question + 1
        self._until = time.monotonic() + _PATIENCE
        member = self._member
        self.states, self.upto = dict.fromkeys(member.registered.relays, "asked"), {}
        for relay, peer in member.registered.relays.items():
            wanted = {source: sends[source] for source in member.registered.instead[relay]}
            member.bus.tell(
                peer.member.agent,
                RelayWanted(batch_id=member.batch_id, relay=relay, target=member.registration, sends=wanted, question=self._question),
            )

    @property
    def settled(self) -> bool:
        """Whether each relay has said that it receives what is wanted, or will be done without."""
        return "asked" not in self.states.values()

    def has(self, feed: Feed, stage: int) -> bool:
        """Whether relays have all that is read through them in this stage."""
        coming = (relay for relay, state in self.states.items() if state == "coming")
        return not any(feed.needs(stage, relay, self.upto.get(relay, {})) for relay in coming)

    @property
    def deadline(self) -> float | None:
        """Until when relays that have not said anything are waited for."""
        return self._until if "asked" in self.states.values() else None

    def expire(self) -> None:
        """Do without those that have not said anything."""
        for relay, state in list(self.states.items()):
            if state == "asked":
                self.drop(relay)

    def hears(self, message: RelayAnswer) -> bool:
        """Whether an answer is about what is received now."""
        return message.relay in self.states and message.question == self._question

    def drop(self, relay: str, *, tell: bool = True) -> None:
        """This relay is not read from any more."""
        if self.states.pop(relay, None) is not None and tell:
            self.ask(relay)

    def ask(self, relay: str) -> None:
        """This relay has been read from: does that stand?"""
        member = self._member
        peer = member.registered.relays[relay]
        message = RelayRead(batch_id=member.batch_id, relay=relay, target=member.registration, question=self._question)
        member.bus.tell(peer.member.agent, message)

    def end(self) -> None:
        """The receive is over."""
        for relay in list(self.states):
            self.drop(relay)
        self._sends = None


class Lending:
    """Those to whom ``member`` passes on what it receives."""

    def __init__(self, member: Member) -> None:
        self._member = member
        self._wants: dict[str, RelayWanted] = {}
        self._lent: dict[str, int] = {}
        self._asked: dict[str, RelayRead] = {}
        self._upto: Upto = {}
        self._seen: set[str] = set()
        self._sends: Sends = {}
        self._last: Sends = {}
        self._until = 0.0

    def begin(self, sends: Sends) -> None:
        """This is received now."""
        if sends == self._sends:
            return
        self._sends, self._seen, self._upto = sends, set(), {}
        for message in list(self._wants.values()):
            self._consider(message)

    def progress(self, upto: Upto) -> None:
        """So much is in the worker's tensors now, and can be read."""
        self._upto = upto
        for message in list(self._wants.values()):
            if self._matches(message):
                self._consider(message)

    def retract(self) -> None:
        """What others have read here may not have been right, and is read again."""
        self._finish_all()

    def offer(self, moved: float) -> None:
        """All has been received, in ``moved`` seconds, and is certain. Keep it for others until `done`."""
        self._until = time.monotonic() + min(max(moved, _LINGER[0]), _LINGER[1])
        for message in list(self._wants.values()):
            self._consider(message)
        for asked in list(self._asked.values()):
            self.on_read(asked)

    @property
    def done(self) -> bool:
        """Whether nobody reads from here, and nobody may come."""
        return not self._lent and (time.monotonic() >= self._until or self._member.registered.takers <= self._seen)

    @property
    def deadline(self) -> float | None:
        """When `done` may have become true by itself."""
        return None if self._lent else self._until

    def on_wanted(self, message: RelayWanted) -> None:
        """Another receiver wants what is received here."""
        self._lent.pop(message.target, None)
        self._asked.pop(message.target, None)
        self._wants[message.target] = message
        self._consider(message)

    def on_read(self, message: RelayRead) -> None:
        """Another receiver has read from here, or will not."""
        transfer = self._member.transfer
        stands = self._lent.get(message.target) == message.question
        if stands and transfer is not None and transfer.state is not TransferState.LENDING:
            self._asked[message.target] = message  # it is told when that is certain
            return
        self._asked.pop(message.target, None)
        wanted = self._wants.get(message.target)
        if wanted is not None and wanted.question == message.question:
            del self._wants[message.target]
            self._lent.pop(message.target, None)
        self._answer(message, "stands" if stands else "over")

    def lost(self, registration: str) -> None:
        """Another receiver is gone."""
        for table in (self._wants, self._lent, self._asked):
            table.pop(registration, None)
        self._seen.add(registration)

    def end(self, *, received: bool) -> None:
        """The receive is over: from now on the tensors may change."""
        if received:
            self._last = {**self._last, **self._sends}
        self._finish_all()
        self._sends = {}

    def _finish_all(self) -> None:
        for message in list(self._wants.values()):
            if self._matches(message):
                del self._wants[message.target]
                self._answer(message, "over")
        self._lent.clear()
        self._asked.clear()

    def _consider(self, message: RelayWanted) -> None:
        transfer = self._member.transfer
        if self._matches(message) and transfer is not None:
            self._seen.add(message.target)
            if transfer.state is TransferState.LENDING:
                self._lent[message.target] = message.question
                self._answer(message, "ready")
            else:
                if self._upto:
                    self._lent[message.target] = message.question
                self._answer(message, "coming", self._upto)
        elif any(self._last.get(source, 0) >= sequence for source, sequence in message.sends.items()):
            del self._wants[message.target]
            self._answer(message, "over")

    def _matches(self, message: RelayWanted) -> bool:
        return all(self._sends.get(source) == sequence for source, sequence in message.sends.items())

    def _answer(self, message: RelayWanted | RelayRead, state: State, upto: Upto | None = None) -> None:
        member = self._member
        peer = member.registered.others.get(message.target)
        if peer is not None:
            member.bus.tell(
                peer.member.agent,
                RelayAnswer(
                    batch_id=member.batch_id,
                    relay=member.registration,
                    target=message.target,
                    question=message.question,
                    state=state,
                    upto=upto or {},
                ),
            )
