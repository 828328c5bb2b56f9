"""What the journals of all players prove: that no success was wrong, and how everything ended."""

from __future__ import annotations

import bisect
import math
from collections import Counter, defaultdict
from collections.abc import Iterable

from tests.chaos.journal import Entry
from tests.chaos.strikes import EXPECTED, Acts, Seats, name, unexplained

_GONE = ("PeerLostError", "AgentDiedError")
_AWAITED = ("were not back within", "was not started again within")
_KINDS = (("send", "recv", "register"), ("push", "update", "pull"))
"""The calls that give, that take, and after which what is taken comes into other tensors."""

_LONG = 60.0
"""Seconds that no call takes."""


def violations(entries: Iterable[Entry], acts: Acts, seats: Seats) -> list[str]:
    """What must never happen, each in a sentence: wrong successes, and errors that nothing explains which was done to others."""
    entries = sorted(entries, key=lambda entry: (entry.who, entry.life, entry.number))
    found = [f"{name(entry)}: {entry.wrong}" for entry in entries if entry.wrong]
    found += unexplained(entries, acts, seats)
    found += [f"{name(entry)}: {each}, of {entry.detail}" for entry in entries for each in entry.failed if each not in EXPECTED]
    for sending, receiving, beginning in _KINDS:
        sends = {(int(entry.who[1:]), entry.nonce): entry for entry in entries if entry.call == sending}
        receives = [entry for entry in entries if entry.call == receiving]
        registrations = [entry for entry in entries if entry.call == beginning and entry.outcome == "ok"]
        found += _what_was_taken(sends, receives, registrations)
        found += _what_was_sent(sends, receives)
    return found


def _what_was_taken(sends: dict[tuple[int, int], Entry], receives: list[Entry], registrations: list[Entry]) -> Iterable[str]:
    """A good receive has what was sent under its version, and something newer than the one before.

    Only into tensors that were registered meanwhile may come what that one had: the send is still under way where the sender has not
    heard of it, as the receiver's agent stood still just then.
    """
    last: dict[tuple[str, int, int], tuple[int, int]] = defaultdict(lambda: (0, 0))
    begins: dict[tuple[str, int], list[int]] = defaultdict(list)
    for entry in registrations:
        begins[entry.who, entry.life].append(entry.number)
    for entry in receives:
        registration = bisect.bisect(begins[entry.who, entry.life], entry.number)
        for sender, nonce in enumerate(entry.taken):
            sent = sends.get((sender, nonce))
            if sent is None:
                yield f"{name(entry)}: sender {sender} never sent {nonce}"
            elif sent.outcome == "ok" and sent.version != entry.version:
                yield f"{name(entry)}: version {entry.version} of what {name(sent)} sent as version {sent.version}"
            elif sent.end is not None and sent.end < entry.begin and sent.outcome == "ok":
                yield f"{name(entry)}: took what {name(sent)} had sent successfully before, so without this receiver"
            key = entry.who, entry.life, sender
            before, of = last[key]
            if nonce < before or (nonce == before and registration == of):
                yield f"{name(entry)}: old data of sender {sender}: {nonce} after {before}"
            last[key] = nonce, registration


def _what_was_sent(sends: dict[tuple[int, int], Entry], receives: list[Entry]) -> Iterable[str]:
    """After a good send each receiver has it, or each that a push says it reached; or did not live to say so, or was told of an error."""
    calls = {who: _in_a_row(entry for entry in receives if entry.who == who) for who in {entry.who for entry in receives}}
    for (sender, nonce), sent in sends.items():
        if sent.outcome != "ok" or sent.end is None:
            continue
        reached = calls if sent.reached is None else sent.reached
        for receiver in reached:
            own, begins, ends = calls.get(receiver, ([], [], []))
            meanwhile = own[bisect.bisect_right(ends, sent.begin) : bisect.bisect_left(begins, sent.end)]
            good = [e for e in meanwhile if e.outcome == "ok"]
            if not meanwhile or (len(good) == len(meanwhile) and not any(e.taken[sender] == nonce for e in good)):
                yield f"{name(sent)} succeeded, and {receiver} has received something else meanwhile: {meanwhile}"


def _in_a_row(calls: Iterable[Entry]) -> tuple[list[Entry], list[float], list[float]]:
    """One player's calls with the times at which they begin and end; one that its process did not live to end, when the next begins."""
    own = sorted(calls, key=lambda entry: entry.begin)
    begins = [entry.begin for entry in own]
    ends = [entry.end if entry.end is not None else after for entry, after in zip(own, [*begins[1:], math.inf], strict=True)]
    return own, begins, ends


Pause = tuple[str, float, float]
"""A player that stood still, from when, to when."""


def lasted(entry: Entry, until: float, pauses: Iterable[Pause]) -> float:
    """Seconds from the call's begin, without those in which its own process stood still."""
    still = (min(until, end) - max(entry.begin, begin) for who, begin, end in pauses if who == entry.process)
    return until - entry.begin - sum(seconds for seconds in still if seconds > 0)


def longest(entries: Iterable[Entry], pauses: Iterable[Pause]) -> dict[str, float]:
    """The longest call of each name that its process lived to end, in seconds."""
    pauses, found = list(pauses), dict[str, float]()
    for entry in entries:
        if entry.end is not None:
            found[entry.call] = max(found.get(entry.call, 0.0), lasted(entry, entry.end, pauses))
    return found


def told(strikes: Iterable[tuple[str, float]], entries: Iterable[Entry]) -> dict[str, list[float]]:
    """By kind of strike, the seconds from its begin until calls under way then ended with an error that says who is gone, ascending.

    Calls that wait for one who is gone to be started again, until their own time is up, knew it before, and are left out.
    """
    ended = sorted((entry for entry in entries if entry.end is not None), key=lambda entry: entry.begin)
    begins = [entry.begin for entry in ended]
    found: dict[str, list[float]] = defaultdict(list)
    for kind, moment in strikes:
        for entry in ended[bisect.bisect(begins, moment - _LONG) : bisect.bisect(begins, moment)]:
            if (
                entry.end is not None
                and entry.end > moment
                and entry.outcome in _GONE
                and not any(each in entry.detail for each in _AWAITED)
            ):
                found[kind].append(entry.end - moment)
    return {kind: sorted(seconds) for kind, seconds in found.items()}


def outcomes(entries: Iterable[Entry]) -> dict[str, Counter[str]]:
    """How often each call ended how; "killed" where its process did not live to see it."""
    table: dict[str, Counter[str]] = defaultdict(Counter)
    for entry in entries:
        table[entry.call][entry.outcome or "killed"] += 1
    return dict(table)
