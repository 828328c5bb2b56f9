"""The trace is in the trace-event format, and says what happened."""

from __future__ import annotations

import json
import random

from etha_ray.status import trace_events
from tests.status import trace_format
from tests.status.seen import BEGAN, agent, failure, pool, transfer


def test_a_pool_is_a_trace_with_a_row_per_worker_and_arrows_from_send_to_receive() -> None:
    events = trace_format.check(json.dumps(trace_events(pool())))
    names = {event["args"]["name"] for event in events if event["name"] == "process_name"}
    assert names == {f"agent {rank} (cpu on host<1>, pid {100 + rank})" for rank in range(4)}
    assert sum(event["name"] == "thread_name" for event in events) == 5  # the receive that failed was another worker's
    arrows = [(event["ph"], event["pid"]) for event in events if event["ph"] in "sf"]
    assert sorted(arrows) == sorted(2 * [(kind, rank + first) for kind, first in (("s", 0), ("f", 2)) for rank in (0, 0, 1, 1)])
    receive = next(event for event in events if event["name"] == "recv policy" and event["pid"] == 2)
    assert (receive["ts"], receive["dur"]) == (round((BEGAN + 2.1) * 1e6), 750_000)
    assert receive["args"] == {"batch": "policy", "version": 1, "bytes": 2000, "GB/s": 0.0, "peers": {"t0": 1000, "t1": 1000}}
    moved = [event for event in events if event["name"] == "move" and event["pid"] == 2]
    assert [event["ts"] for event in moved] == [round((BEGAN + at) * 1e6) for at in (2.35, 4.35)]


def test_a_failure_is_a_slice_with_its_error() -> None:
    events = trace_format.check(json.dumps(trace_events([agent(0, failure("g"))])))
    (failed,) = (event for event in events if event["ph"] == "X")
    assert failed["name"] == "recv policy failed"
    assert failed["args"] == {"batch": "policy", "error": "TransferTimeoutError", "message": "t0 did <not> send"}


def test_times_that_round_badly_still_nest() -> None:
    chance = random.Random(7)
    past, at = [], 0.0
    for step in range(60):
        waited, moved = chance.random() * 1e-5, chance.random() * 1e-5
        past.append(transfer("recv", "g", ["t"], sequence=step, began=at, waited=waited, moved=moved))
        at += waited + moved + 2e-6
    assert len(trace_format.check(json.dumps(trace_events([agent(0, *past)])))) == 3 * 60 + 3


def test_of_a_send_whose_receiver_is_not_known_no_arrow_is_drawn() -> None:
    events = trace_format.check(json.dumps(trace_events([agent(0, transfer("send", "a", ["b"]))])))
    assert not [event for event in events if event["ph"] in "sf"]
