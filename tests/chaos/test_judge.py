"""The judge of the chaos: what it must not let pass, and what is no fault."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.chaos.journal import Entry
from tests.chaos.judge import longest, told, violations

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
        ([replace(SEND, outcome="PeerLostError")], ""),
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
    found = violations(entries)
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
    assert ["old data" in sentence for sentence in violations(entries)] == ([] if again else [True])


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
