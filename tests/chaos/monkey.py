"""Kills, stops and cuts off, while players are in the midst of something; and measures how long it takes until all goes on."""

from __future__ import annotations

import random
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TypeVar

from tests.chaos.journal import Entry
from tests.chaos.judge import Pause, lasted
from tests.chaos.ray_stage import RayPart, RayStage
from tests.chaos.stage import SEATS, Part, Stage
from tests.chaos.strikes import (
    CUT,
    CUT_OFF,
    DETECTION,
    KILL_AGENT,
    KILL_ETCD,
    KILL_TWO,
    KILL_WORKER,
    STOP_AGENT,
    STOP_ETCD,
    STOP_WORKER,
    Acts,
    Strike,
)
from tests.tensor_bus.cluster import LONG

P = TypeVar("P", Part, RayPart, "Part | RayPart")

PATIENCE = 60.0
"""Seconds within which everybody must have gone on after a strike."""

_GIVES = {"recv": "send", "update": "push"}
"""The call that gives, by the one that takes."""

_CALLS = ("connect", "init_pair", "register", "send", "recv", "close", "publish", "pull", "push", "update", "leave")

STEADY = _CALLS[1:]
"""Those that every player comes to again and again, also if nobody is struck."""

_PATIENCE_FOR_A_CALL = 4.0
"""Seconds that one is waited for in order to strike in its midst: a player registers anew every few seconds."""

_CALM = 5.0
"""Seconds in which nobody is struck and all have heard of the last strike: no call may fail."""

_BETWEEN_CALMS = 60
"""Strikes."""


@dataclass
class Monkey:
    """Strikes at random; ``seed`` decides how, but not when processes do what they do."""

    stage: Stage | RayStage
    seed: int
    limit: float
    """Seconds after which a call counts as hanging."""
    strikes: list[Strike] = field(default_factory=list)
    hangs: list[str] = field(default_factory=list)
    pauses: list[Pause] = field(default_factory=list)
    begin: float = 0.0
    """When the first versions had crossed."""
    _told: set[tuple[str, int, int]] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)
        self._blows: dict[str, tuple[Callable[[str], Strike], int]] = {
            KILL_WORKER: (self._kill_player, 34),
            KILL_AGENT: (self._kill_agent, 30),
            KILL_TWO: (self._kill_two, 10),
            STOP_WORKER: (self._stop_player, 6),
            STOP_AGENT: (self._stop_agent, 6),
        }
        if isinstance(self.stage, Stage):
            self._blows |= {
                KILL_ETCD: (self._kill_etcd, 6),
                STOP_ETCD: (self._pause_etcd, 3),
                CUT: (self._cut, 3),
                CUT_OFF: (self._cut_off, 3),
            }
        self.left = self.random.sample(self.kinds, len(self.kinds))
        """Kinds of strikes that come first, as each comes once before any comes by chance."""
        self._calls = self.random.sample(STEADY, len(STEADY))

    @property
    def kinds(self) -> list[str]:
        """All kinds of strikes on this stage."""
        return list(self._blows)

    @property
    def acts(self) -> Acts:
        """All that was done, up to now."""
        return Acts(self.strikes, self.begin, time.monotonic(), self.stage.dead)

    @property
    def _hosts(self) -> Stage:
        assert isinstance(self.stage, Stage)
        return self.stage

    def settle(self) -> None:
        """Wait until the first versions have crossed."""
        assert self.settled(), "nothing crossed, though nobody was touched"
        self.begin = time.monotonic()

    def settled(self) -> bool:
        """Whether versions that are sent from now on cross."""
        done = self._recovered(time.monotonic(), PATIENCE) is not None
        if done and self.strikes:
            self.strikes[-1].over = time.monotonic()
        return done

    def rest(self) -> None:
        """Leave all alone, until what was done explains nothing any more, and a while longer."""
        self._watch(DETECTION + _CALM)

    def strike(self) -> Strike:
        """Once; mostly waits until all goes on, and sometimes only a moment. Now and then all rest before it."""
        if self.strikes and len(self.strikes) % _BETWEEN_CALMS == 0 and self.settled():
            self.rest()
        weights = [weight for _, weight in self._blows.values()]
        kind = self.left.pop() if self.left else self.random.choices(self.kinds, weights)[0]
        done = self._blows[kind][0](kind)
        self.strikes.append(done)
        if self.random.random() < 0.8:
            done.recovery = self._recovered(done.end, PATIENCE)
            if done.recovery is None:
                self.stage.dump()
                self.hangs.append(f"not recovered {PATIENCE:g} s after {done}: {self._state()}")
            else:
                done.over = done.end + done.recovery
        self._watch(self.random.uniform(0.0, 0.5))
        return done

    # ------------------------------------------------------------------------------------------------- blows

    def _kill_player(self, kind: str) -> Strike:
        with self._moment(kind) as strike:
            self._kill(strike, self._victim(strike, self.stage.players))
        return strike

    def _kill_agent(self, kind: str) -> Strike:
        with self._moment(kind) as strike:
            self._kill(strike, self._victim(strike, self.stage.agents))
        return strike

    def _kill_two(self, kind: str) -> Strike:
        with self._moment(kind) as strike:
            for part in self.random.sample(self.stage.parts, 2):
                self._kill(strike, part)
        return strike

    def _stop_player(self, kind: str) -> Strike:
        return self._stop(kind, self.stage.players)

    def _stop_agent(self, kind: str) -> Strike:
        return self._stop(kind, self.stage.agents)

    def _kill_etcd(self, kind: str) -> Strike:
        with self._moment(kind) as strike:
            strike.victims, strike.kills = ["etcd"], 1
            self._hosts.etcd.kill()
            self._watch(self.random.uniform(0.0, 3.0))
            self._hosts.etcd.restart()
        return strike

    def _pause_etcd(self, kind: str) -> Strike:
        with self._moment(kind) as strike:
            strike.victims = ["etcd"]
            self._hosts.etcd.pause()
            self._watch(self.random.uniform(0.5, 6.0))
            self._hosts.etcd.resume()
        return strike

    def _cut(self, kind: str) -> Strike:
        return self._without(kind, [self.random.choice(list(self._hosts.cables))])

    def _cut_off(self, kind: str) -> Strike:
        host = self.random.randrange(1, 3)
        return self._without(kind, [cable for cable in self._hosts.cables if host in cable])

    def _without(self, kind: str, cables: list[tuple[int, int]]) -> Strike:
        ends = [self.random.choice(self._hosts.cables[cable]) for cable in cables]
        with self._moment(kind) as strike:
            strike.victims = [_cable(*cable) for cable in cables]
            for end in ends:
                end.cut()
            self._watch(self.random.uniform(0.5, 8.0))
            for end in ends:
                end.mend()
        return strike

    def _kill(self, strike: Strike, part: Part | RayPart) -> None:
        strike.victims.append(part.name)
        strike.kills += 1
        self.stage.kill(part)

    def _stop(self, kind: str, parts: Sequence[Part | RayPart]) -> Strike:
        with self._moment(kind) as strike:
            part = self._victim(strike, parts)
            strike.victims = [part.name]
            begin = time.monotonic()
            self.stage.signal(part, signal.SIGSTOP)
            pid = part.pid
            self._watch(self.random.uniform(0.5, 7.0), paused=part.name)
            self.stage.signal(part, signal.SIGCONT)
            self.pauses.append((part.name, begin, time.monotonic()))
            assert part.pid == pid, "who stands still was started again"
        return strike

    def _victim(self, strike: Strike, parts: Sequence[P]) -> P:
        """One of the players, or of their agents: in half of the strikes the one whose call it is."""
        names = [player.name for player in self.stage.players]
        if strike.caller and self.random.random() < 0.5:
            return parts[names.index(strike.caller)]
        return self.random.choice(parts)

    @contextmanager
    def _moment(self, kind: str) -> Iterator[Strike]:
        """The midst of a call that is picked at random, if one is made in the next moments; each of `STEADY` comes first."""
        wanted, patience = (self._calls.pop(), LONG) if self._calls else (self.random.choice(_CALLS), _PATIENCE_FOR_A_CALL)
        deadline = time.monotonic() + patience
        during, caller = "whatever", ""
        while time.monotonic() < deadline:
            self.stage.reader.poll()
            callers = [entry.process for entry in self.stage.reader.latest.values() if entry.call == wanted and entry.end is None]
            if callers:
                during, caller = wanted, self.random.choice(callers)
                break
            time.sleep(0.001)
        time.sleep(self.random.choice([0.0, self.random.uniform(0.0, 0.01), self.random.uniform(0.0, 0.1)]))
        strike, pass_on = Strike(kind, [], during, time.monotonic(), 0.0, caller=caller), self._pass_on()
        yield strike
        strike.end = time.monotonic()
        strike.relays = [victim for victim in strike.victims if victim in pass_on]
        names = [player.name for player in self.stage.players]
        strike.struck_caller = caller in names and not {caller, self.stage.agents[names.index(caller)].name}.isdisjoint(strike.victims)

    def _pass_on(self) -> set[str]:
        """The parts and the cables by which receivers get what others received, as of their last good receives."""
        rank, found = {player.name: rank for rank, player in enumerate(self.stage.players)}, set[str]()
        for reader, relays in self.stage.reader.through.items():
            for relay in relays:
                found |= {relay, self.stage.agents[rank[relay]].name}
                if isinstance(self.stage, Stage):
                    found.add(_cable(*sorted(SEATS[rank[who]][2] for who in (relay, reader))))
        return found

    # ------------------------------------------------------------------------------------------------- watching

    def _recovered(self, since: float, patience: float) -> float | None:
        """Seconds until each receiver holds what was sent after ``since``; None if that did not come."""
        deadline = time.monotonic() + patience
        while time.monotonic() < deadline:
            self._watch(0.02)
            entries = self.stage.reader.since(since)
            sent = {(entry.call, int(entry.who[1:]), entry.nonce) for entry in entries if entry.nonce and entry.begin > since}
            got = {}
            for entry in entries:
                fresh = entry.call in _GIVES and entry.outcome == "ok" and entry.end is not None and entry.end > since
                if fresh and all((_GIVES[entry.call], *each) in sent for each in enumerate(entry.taken)):
                    got[entry.who] = min(got.get(entry.who, entry.end or 0.0), entry.end or 0.0)
            if len(got) == 2 * sum(player.name.startswith("b") for player in self.stage.players):
                return max(got.values()) - since
        return None

    def _watch(self, seconds: float, paused: str = "") -> None:
        """Let time pass; whoever has been in a call for too long meanwhile is written down."""
        deadline = time.monotonic() + seconds
        while True:
            self.stage.reader.poll()
            now = time.monotonic()
            for entry in list(self.stage.reader.latest.values()):
                if entry.end is None and entry.process != paused and now - entry.begin > self.limit:
                    self._hanging(entry, now)
            if now >= deadline:
                return
            time.sleep(min(0.02, deadline - now))

    def _hanging(self, entry: Entry, now: float) -> None:
        part = self.stage.part(entry.process)
        seconds = lasted(entry, now, self.pauses)
        key = entry.who, entry.life, entry.number
        if part.lives_still(entry.life) and seconds > self.limit and key not in self._told:
            self._told.add(key)
            self.stage.dump()
            self.hangs.append(f"{entry.who} has been in {entry.call} for {seconds:.1f} s, after {self.strikes[-1:]}")

    def _state(self) -> str:
        reader = self.stage.reader
        failed = (f"; before that {e.who} {e.call} {e.outcome} {e.detail[:300]}" for e in reader.failed.values())
        return "; ".join(f"{e.who} {e.call} {e.outcome} {e.detail[:300]}" for e in reader.latest.values()) + "".join(failed)


def _cable(one: int, other: int) -> str:
    return f"cable of hosts {one} and {other}"
