"""The judge of the chaos: what it must not let pass, and what is no fault."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.chaos.journal import Entry
from tests.chaos.judge import longest, told, violations
from tests.chaos.strikes import (
    CUT,
    DETECTION,
    EXPECTED,
    KILL_AGENT,
    KILL_ETCD,
    KILL_TWO,
    KILL_WORKER,
    LEAVING,
    STOP_AGENT,
    STOP_WORKER,
    Acts,
    Seats,
    Strike,
    explained,
)

SEATS = Seats({"a0": "agent 0", "a1": "agent 1", "b0": "agent 2", "b1": "agent 3"}, {"a0": 0, "a1": 1, "b0": 0, "b1": 1})
NOTHING = Acts([], 0.0, 1000.0)

REGISTER = Entry("b0", 1, 7, 1, "register", 0.0, 0.1, "ok")
SEND = Entry("a0", 1, 8, 1, "send", 1.0, 2.0, "ok", version=1, nonce=5)
RECV = Entry("b0", 1, 7, 2, "recv", 1.0, 1.9, "ok", version=1, taken=[5])
NEXT = [replace(SEND, number=2, begin=3.0, end=4.0, version=2, nonce=6), replace(RECV, number=3, begin=3.0, end=3.9, version=2, taken=[6])]


@pytest.mark.parametrize(
    ("entries", "words"),
    [
        ([REGISTER, SEND, RECV, *NEXT], ""),
        ([SEND, replace(RECV, wrong="numbers of another place")], "numbers of another place"),
        ([SEND, replace(RECV, taken=[4])], "sender 0 never sent 4"),
        ([SEND, replace(RECV, version=2)], "version 2 of what"),
        ([SEND, NEXT[0], replace(RECV, begin=2.5, end=3.0)], "without this receiver"),
        ([SEND, RECV, NEXT[0], replace(RECV, number=3, begin=3.0, end=3.9)], "old data of sender 0: 5 after 5"),
        ([NEXT[0], NEXT[1], SEND, replace(RECV, number=4)], "old data of sender 0: 5 after 6"),
        ([SEND], ""),
        ([replace(SEND, outcome="PeerLostError", detail="b[0] is gone")], "not explained by nothing: b[0] is gone"),
        ([replace(SEND, outcome="AgentFailedError", detail="KeyError: 'x'")], "KeyError: 'x'"),
        ([SEND, RECV, NEXT[0], replace(RECV, number=3, begin=3.0, end=3.9)], "received something else meanwhile"),
    ],
    ids=[
        "all is well",
        "wrong",
        "never sent",
        "version",
        "too late",
        "twice",
        "older",
        "nobody there",
        "peer lost",
        "agent failed",
        "something else",
    ],
)
def test_what_must_never_happen(entries: list[Entry], words: str) -> None:
    found = violations(entries, NOTHING, SEATS)
    assert any(words in sentence for sentence in found) if words else not found


PULL = replace(REGISTER, who="q0", call="pull")
PUSH = replace(SEND, who="p0", call="push", reached=["q0"])
UPDATE = replace(RECV, who="q0", call="update")
LATER = [replace(PUSH, number=2, begin=3.0, end=4.0, nonce=6), replace(UPDATE, number=3, begin=3.0, end=3.9, version=2, taken=[6])]


@pytest.mark.parametrize(
    ("entries", "words"),
    [
        ([PULL, PUSH, UPDATE, SEND, RECV], ""),
        ([SEND, PUSH, replace(UPDATE, taken=[4])], "sender 0 never sent 4"),
        ([PULL, PUSH, UPDATE, *LATER], "version 2 of what"),
        ([PULL, UPDATE, replace(PUSH, reached=["q0", "q1"])], "q1 has received something else"),
        ([PULL, UPDATE, replace(PUSH, reached=[], failed=["PeerLostError"])], ""),
        ([PULL, UPDATE, replace(PUSH, failed=["CoordinateTakenError"], detail="q1")], "CoordinateTakenError, of q1"),
    ],
    ids=["all is well", "never sent", "version", "not reached", "reported", "reported, and not expected"],
)
def test_what_must_never_happen_to_weights(entries: list[Entry], words: str) -> None:
    """They are nothing to what is sent beside them."""
    test_what_must_never_happen(entries, words)


@pytest.mark.parametrize("again", [False, True])
def test_what_is_still_under_way_may_come_into_tensors_that_were_registered_meanwhile(again: bool) -> None:
    sent = replace(SEND, end=5.0)
    entries = [REGISTER, sent, RECV, replace(RECV, number=4, begin=3.0, end=4.0)]
    if again:
        entries.append(replace(REGISTER, number=3, begin=2.0, end=2.9))
    assert ["old data" in sentence for sentence in violations(entries, NOTHING, SEATS)] == ([] if again else [True])


def test_the_longest_calls_without_what_stood_still() -> None:
    entries = [SEND, replace(SEND, number=2, begin=2.0, end=9.0), RECV, replace(RECV, number=5, begin=8.0, end=None)]
    pauses = [("a0", 1.5, 4.0), ("a0", 8.0, 20.0), ("b0", 3.0, 5.0)]
    assert longest(entries, pauses) == {"send": 4.0, "recv": pytest.approx(0.9)}


def test_who_was_told_after_how_long() -> None:
    lost = replace(SEND, begin=1.0, end=2.5, outcome="PeerLostError")
    entries = [
        lost,
        replace(RECV, begin=1.5, end=2.25, outcome="AgentDiedError"),
        replace(lost, who="a1", end=9.0, detail="they were not back within 8 s"),  # it knew, and waited
        replace(lost, who="a2", outcome="ok"),
        replace(lost, who="a3", begin=2.1),  # after the strike
        replace(lost, who="a4", end=1.9),  # before it
    ]
    assert told([("SIGKILL", 2.0), ("SIGSTOP", 50.0)], entries) == {"SIGKILL": [0.25, 0.5]}


KILLED = Strike(KILL_WORKER, ["b1"], "send", 100.0, 100.1, kills=1, recovery=1.0, over=101.1)
LOST = replace(SEND, begin=99.0, end=100.5, outcome="PeerLostError", detail="b[1] is gone (worker pid 77 died)")


def judged(entry: Entry, *strikes: Strike, others: tuple[Entry, ...] = ()) -> list[str]:
    return violations([entry, *others], Acts(strikes, 10.0, 1000.0, {77}), SEATS)


@pytest.mark.parametrize(
    ("begin", "end", "fits"),
    [
        (99.0, 100.5, True),
        (99.0, 99.9, False),
        (101.1 + DETECTION / 2, 101.2 + DETECTION / 2, True),
        (101.0 + DETECTION, 109.0 + DETECTION, True),
        (101.2 + DETECTION, 109.0 + DETECTION, False),
    ],
    ids=["amid it", "before it", "shortly after", "begun while others may still hear of it", "long after"],
)
def test_an_error_is_explained_by_what_was_done_shortly_before(begin: float, end: float, fits: bool) -> None:
    assert bool(judged(replace(LOST, begin=begin, end=end), KILLED)) != fits


def test_a_strike_is_over_when_all_had_gone_on_after_it_or_after_a_later_one() -> None:
    later = replace(KILLED, begin=150.0, end=150.1, over=151.0)
    entry = replace(LOST, begin=140.0, end=141.0)
    assert "not explained by nothing" in judged(entry, KILLED, later)[0]
    assert not judged(entry, replace(KILLED, over=None), later)
    assert not judged(replace(LOST, begin=900.0, end=901.0), replace(KILLED, over=None)), "nobody went on any more"


@pytest.mark.parametrize("times", [(1.0, 2.0), (9.0, 11.0), (999.0, 1001.0)], ids=["starting", "just started", "leaving"])
def test_who_starts_or_leaves_needs_no_strike(times: tuple[float, float]) -> None:
    entry = replace(LOST, begin=times[0], end=times[1])
    assert not judged(entry)
    assert judged(replace(entry, outcome="AgentFailedError")), "but that is never right"


@pytest.mark.parametrize(
    ("strike", "who", "fits"),
    [
        (KILLED, "a0", {"PeerLostError", "TransferTimeoutError", "BatchTornError"}),
        (replace(KILLED, kind=KILL_AGENT, victims=["agent 0"]), "a0", {"AgentDiedError", "AgentNotFoundError", "PeerLostError"}),
        (replace(KILLED, kind=KILL_AGENT, victims=["agent 0"]), "b0", {"PeerLostError"}),
        (replace(KILLED, kind=KILL_TWO, victims=["a1", "agent 2"]), "b0", {"PeerLostError", "AgentDiedError", "AgentNotFoundError"}),
        (replace(KILLED, kind=STOP_AGENT, victims=["agent 0"]), "b0", {"PeerLostError", "AgentDiedError", "QueueHeldError"}),
        (replace(KILLED, kind=STOP_WORKER, victims=["a0"]), "b0", {"PeerLostError", "AgentDiedError", "QueueHeldError"}),
        (replace(KILLED, kind=STOP_WORKER, victims=["a0"]), "b1", {"PeerLostError"}),
        (replace(KILLED, kind=KILL_ETCD, victims=["etcd"]), "a0", {"StoreUnavailableError", "PairTimeoutError"}),
        (replace(KILLED, kind=CUT, victims=["cable of hosts 0 and 1"]), "a0", {"PeerLostError", "StoreUnavailableError"}),
        (replace(KILLED, kind=CUT, victims=["cable of hosts 1 and 2"]), "a0", {"PeerLostError"}),
    ],
    ids=lambda value: f"{value.kind} ({' and '.join(value.victims)})" if isinstance(value, Strike) else None,
)
def test_an_error_fits_what_was_done(strike: Strike, who: str, fits: set[str]) -> None:
    found = explained(strike, replace(LOST, who=who), SEATS)
    own_agent = {"AgentDiedError", "AgentNotFoundError"}
    assert found >= fits
    assert own_agent & found in (set(), own_agent)
    assert bool(own_agent & fits) == bool(own_agent & found)
    for each in ("StoreUnavailableError", "PeerLostError", "QueueHeldError"):
        assert (each in found) == (each in fits), each
    assert "BatchClosedError" not in found
    for outcome in EXPECTED - {"BatchClosedError"}:
        assert bool(judged(replace(LOST, who=who, outcome=outcome, detail=""), strike)) == (outcome not in found)


@pytest.mark.parametrize(
    ("call", "who", "fits"),
    [("push", "p0", True), ("send", "a0", False)],
)
def test_who_pushes_or_updates_may_hear_of_it_later(call: str, who: str, fits: bool) -> None:
    """When its session, which waited for who is gone, has been left."""
    late = 101.1 + DETECTION + LEAVING / 2
    entry = replace(LOST, who=who, call=call, reached=[], begin=late, end=late + 1.0)
    assert bool(judged(entry, KILLED)) != fits
    assert judged(replace(entry, begin=late + LEAVING, end=late + LEAVING + 1.0), KILLED)


@pytest.mark.parametrize(
    ("closer", "begin", "again", "fits"),
    [
        ("b1", 99.5, 200.0, True),
        ("b1", 90.0, 99.5, True),
        ("a0", 99.5, 200.0, False),
        ("a1", 99.5, 200.0, False),
        ("b1", 100.6, 200.0, False),
        ("b1", 50.0, 98.9 - DETECTION, False),
    ],
    ids=["meanwhile", "not back before", "itself", "not the one that is named", "afterwards", "back long ago"],
)
def test_a_closed_batch_is_one_that_somebody_closed(closer: str, begin: float, again: float, fits: bool) -> None:
    others = (
        Entry(closer, 1, 9, 5, "close", begin, begin + 0.1, "ok"),
        Entry(closer, 1, 9, 6, "register", begin + 0.2, again, "ok"),
    )
    entry = replace(LOST, outcome="BatchClosedError", detail="batch 'batch': b[1] is gone (batch 'batch' was closed): register it again")
    assert bool(judged(entry, others=others)) != fits
    assert judged(entry, KILLED), "who is killed closes nothing"
    # A sender that gives up for that spoils what others of its side have sent, and what receivers were reading.
    for outcome in ("BatchTornError", "VersionMismatchError"):
        assert bool(judged(replace(entry, outcome=outcome), others=others)) != (fits or closer == "a1")


def test_nobody_who_lives_is_said_to_have_died() -> None:
    assert judged(replace(LOST, detail="b[1] is gone (worker pid 78 died)"), KILLED) == [
        "a0 life 1 call 1 (send, PeerLostError): process 78 had not died: b[1] is gone (worker pid 78 died)"
    ]
    assert judged(replace(LOST, outcome="AgentDiedError", detail="agent 0 (pid 78) died"), replace(KILLED, victims=["agent 0"]))
