"""What was done to whom, and which errors of calls that explains, as docs/failures.md has it."""

from __future__ import annotations

import bisect
import math
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from etha_ray.config import FAILURE_TIMEOUT
from tests.chaos.journal import Entry

KILL_WORKER, KILL_AGENT, KILL_TWO, KILL_ETCD = (f"SIGKILL of {whom}" for whom in ("a worker", "an agent", "two at once", "etcd"))
STOP_WORKER, STOP_AGENT, STOP_ETCD = (f"SIGSTOP of {whom}" for whom in ("a worker", "an agent", "etcd"))
CUT, CUT_OFF = "link down", "host cut off"

DETECTION = FAILURE_TIMEOUT + 3.0
"""Seconds after which nobody learns any more of what is over: who stood still is missed after `FAILURE_TIMEOUT`, the rest is for a
machine that has other things to do."""

_OTHER_GONE = frozenset(
    {
        "PeerLostError",
        "BatchTornError",
        "BatchUnmatchedError",
        "PairTimeoutError",
        "TransferTimeoutError",
        "VersionMismatchError",  # one of several senders gave up a send that others have completed
    }
)
"""How calls may end where a process of another member is killed or stands still, or cannot be reached."""

_OWN_AGENT_GONE = frozenset({"AgentDiedError", "AgentNotFoundError"})

_STORE_AWAY = frozenset({"StoreUnavailableError", "PairTimeoutError", "BatchUnmatchedError", "TransferTimeoutError"})
"""How calls may end where the store does not answer: theirs, or those of members that they wait for."""

LEAVING = 15.0
"""Seconds that sessions of publish and pull may still wait for one that is gone to answer to their goodbye."""

_OTHER_CLOSED = frozenset({"BatchClosedError", "BatchTornError", "VersionMismatchError"})
"""How transfers may end where another member closes its batch, as each does now and then."""

_HELD_UP = frozenset({"QueueHeldError"})
"""How calls may end where a process of their host stands still, as that may have been in the midst of a write to their agent's queue."""

_TOGETHER = _OTHER_GONE | _OTHER_CLOSED
"""How pushes and updates may end where another member is struck or leaves: sessions end with it, and each rank hears of it when it
looks."""

EXPECTED = _OTHER_GONE | _OWN_AGENT_GONE | _STORE_AWAY | _OTHER_CLOSED | _HELD_UP
"""All of them."""

_DIED = re.compile(r"worker pid (\d+) died|agent \d+ \(pid (\d+)\) died")

_CLOSED = re.compile(r"batch '\w+': (\w+)\[(\d+)\] is gone ")


@dataclass
class Strike:
    """One blow: what was done to whom during which call, and the seconds from its end to the next version that all receivers have."""

    kind: str
    victims: list[str]
    during: str
    begin: float
    end: float
    kills: int = 0
    relays: list[str] = field(default_factory=list)
    """Which of the victims passed on to others what it received."""
    caller: str = ""
    """Who was in that call."""
    struck_caller: bool = False
    """Whether it, or its agent, is a victim."""
    recovery: float | None = None
    over: float | None = None
    """When all had gone on, where that was waited for."""


@dataclass(frozen=True)
class Seats:
    """Who sits where: each player's agent, and the host of both, by the player's name. The store is on host 0."""

    agents: Mapping[str, str]
    hosts: Mapping[str, int]

    def neighbours(self, who: str) -> set[str]:
        """The players and agents of that player's host."""
        here = [other for other, host in self.hosts.items() if host == self.hosts[who]]
        return {*here, *(self.agents[other] for other in here)}


@dataclass(frozen=True)
class Acts:
    """What was done while the players played.

    Attributes:
        strikes: in the order of time.
        begin, end: from when to when players were left to themselves and the strikes. Before and after that they start and leave, and an
            error needs no strike.
        dead: the processes that died.
    """

    strikes: Sequence[Strike]
    begin: float
    end: float
    dead: Collection[int] = ()


def unexplained(entries: Iterable[Entry], acts: Acts, seats: Seats) -> Iterator[str]:
    """Errors of calls that nothing which was done then explains, each in a sentence."""
    entries = sorted(entries, key=lambda entry: (entry.who, entry.life, entry.number))
    overs, closed = _overs(acts.strikes), _closed(entries)
    begins = [strike.begin for strike in acts.strikes]
    for entry in entries:
        end = entry.end
        if end is None or entry.outcome in (None, "ok"):
            continue
        if entry.outcome not in EXPECTED:
            yield f"{name(entry)}: {entry.detail}"
            continue
        if (pid := _said_dead(entry)) is not None and pid not in acts.dead:
            yield f"{name(entry)}: process {pid} had not died: {entry.detail}"
        if entry.begin < acts.begin or end > acts.end:
            continue
        late = 0.0 if entry.who == entry.process else LEAVING
        meanwhile = [
            strike
            for strike, over in zip(acts.strikes[: bisect.bisect(begins, end)], overs, strict=False)
            if entry.begin < over + DETECTION + late
        ]
        fits = any(entry.outcome in explained(strike, entry, seats) for strike in meanwhile)
        fits |= entry.outcome in (_OTHER_CLOSED if entry.who == entry.process else _TOGETHER) and any(
            begin < end and entry.begin < again + DETECTION + late for who, begin, again in closed if _may_mean(who, entry)
        )
        if not fits:
            done = ", ".join(f"{strike.kind} ({' and '.join(strike.victims)})" for strike in meanwhile) or "nothing"
            yield f"{name(entry)} at {entry.begin:.2f} to {end:.2f} is not explained by {done}: {entry.detail}"


def explained(strike: Strike, entry: Entry, seats: Seats) -> frozenset[str]:
    """How a call may end by this strike."""
    others = _OTHER_GONE if entry.who == entry.process else _TOGETHER
    found = frozenset[str]()
    for victim in strike.victims:
        if victim == "etcd":
            found |= _STORE_AWAY
        elif victim.startswith("cable"):
            found |= others | (_STORE_AWAY if "hosts 0 " in victim else frozenset())
        else:
            found |= others
            # Who stands still in the midst of a write to a queue holds up all who use it, an agent of its host among them.
            stopped = strike.kind in (STOP_WORKER, STOP_AGENT)
            near = stopped and victim in seats.neighbours(entry.process)
            if victim == seats.agents[entry.process] or near:
                found |= _OWN_AGENT_GONE | (_HELD_UP if near else frozenset())
    return found


def _overs(strikes: Sequence[Strike]) -> list[float]:
    """For each strike the moment at which all had gone on: after it, or after a later one where that was not waited for."""
    over, found = math.inf, list[float]()
    for strike in reversed(strikes):
        over = over if strike.over is None else strike.over
        found.append(over)
    return found[::-1]


def _closed(entries: Iterable[Entry]) -> list[tuple[str, float, float]]:
    """Who has no batch that it had, from when to when."""
    found = []
    since: dict[str, float] = {}
    for entry in sorted(entries, key=lambda entry: (entry.who, entry.begin)):
        if entry.call in ("close", "leave"):
            since.setdefault(entry.who, entry.begin)
        elif entry.call in ("register", "publish", "pull") and entry.outcome == "ok" and entry.who in since:
            found.append((entry.who, since.pop(entry.who), entry.end or entry.begin))
    return [*found, *((who, begin, math.inf) for who, begin in since.items())]


def _may_mean(closer: str, entry: Entry) -> bool:
    """Whether the error can be about this player's batch that was closed: it names one, or may be about anybody's."""
    named = _CLOSED.match(entry.detail) if entry.outcome == "BatchClosedError" else None
    if (closer[0] in "pq") != (entry.who[0] in "pq"):
        return False
    return closer != entry.who and (named is None or closer == named[1] + named[2])


def _said_dead(entry: Entry) -> int | None:
    found = _DIED.search(entry.detail)
    return None if found is None else int(found[1] or found[2])


def name(entry: Entry) -> str:
    """A call, in words."""
    return f"{entry.who} life {entry.life} call {entry.number} ({entry.call}, {entry.outcome})"
