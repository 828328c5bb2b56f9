"""The last transfers of all agents as a trace, for https://ui.perfetto.dev or chrome://tracing.

In the trace-event format: a process row an agent, a thread row for each worker and batch, a slice for each transfer with its spans
within, and an arrow from each send to what it became. Times are the hosts' own clocks.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from typing import Any

from etha_ray.status.syncs import Part, Sync, syncs
from etha_ray.tensor_bus.inspection import SeenAgent

Event = dict[str, Any]


def trace_events(agents: Sequence[SeenAgent]) -> dict[str, Any]:
    """The trace as one JSON object."""
    rows: dict[tuple[int, str, str], int] = {}
    events: list[Event] = []
    for sync in syncs(agents):
        for part in sync.parts:
            row = part.agent, part.past.client_id, part.past.batch_id
            events += _slices(part, rows.setdefault(row, len(rows) + 1))
        events += _arrows(sync, rows)
    return {
        "displayTimeUnit": "ms",
        "otherData": {"source": "etha-ray trace", "clock": "seconds since the epoch, of each host"},
        "traceEvents": [*_names(agents, rows), *events],
    }


def _names(agents: Sequence[SeenAgent], rows: dict[tuple[int, str, str], int]) -> Iterator[Event]:
    for agent in agents:
        where = f" ({agent.record.device} on {agent.record.hostname}, pid {agent.record.pid})" if agent.record is not None else ""
        yield _meta("process_name", agent.rank, name=f"agent {agent.rank}{where}")
        yield _meta("process_sort_index", agent.rank, sort_index=agent.rank)
    for (rank, client_id, batch_id), row in rows.items():
        yield _meta("thread_name", rank, row, name=f"{batch_id} (worker {client_id.partition('-')[0]})")


def _meta(kind: str, pid: int, tid: int = 0, **args: Any) -> Event:
    return {"ph": "M", "name": kind, "pid": pid, "tid": tid, "ts": 0, "args": args}


def _slices(part: Part, row: int) -> Iterator[Event]:
    past, report = part.past, part.past.report

    def slice_of(category: str, name: str, start: float, seconds: float, args: dict[str, Any]) -> Event:
        # Start and end are rounded alike, so that what is within another stays so.
        begin, end = _microseconds(start), _microseconds(start + seconds)
        return {"ph": "X", "cat": category, "name": name, "ts": begin, "dur": end - begin, "pid": part.agent, "tid": row, "args": args}

    args: dict[str, Any] = {"batch": past.batch_id}
    if report is None:
        args |= {"error": past.kind, "message": past.message}
    else:
        args |= {"version": report.version, "bytes": report.bytes, "GB/s": round(report.gb_per_s, 3), "peers": dict(report.peers)}
    name = f"{past.direction} {past.batch_id}" + ("" if report is not None else " failed")
    yield slice_of(past.direction, name, past.began, past.seconds, args)
    for span in report.spans if report is not None else ():
        start = past.began + span.start
        yield slice_of("span", span.name, start, max(0.0, min(span.seconds, past.began + past.seconds - start)), {})


def _arrows(sync: Sync, rows: dict[tuple[int, str, str], int]) -> Iterator[Event]:
    """From within each send to where its bytes began to move; both ends are known by the same key."""
    given = {flow.key: part for part in sync.parts if part.past.direction == "send" for flow in part.past.flows}
    for part in sync.parts:
        report = part.past.report
        if part.past.direction != "recv" or report is None:
            continue
        moved = next((span.start for span in report.spans if span.name == "move"), 0.0)
        for flow in part.past.flows:
            sender = given.get(flow.key)
            if sender is None:
                continue
            common = {"cat": "bytes", "name": flow.key, "id": _number(flow.key)}
            for kind, end, at in (("s", sender, sender.past.began), ("f", part, part.past.began + moved)):
                row = rows[end.agent, end.past.client_id, end.past.batch_id]
                yield {"ph": kind, **common, "ts": _microseconds(at), "pid": end.agent, "tid": row, **({"bp": "e"} if kind == "f" else {})}


def _number(key: str) -> int:
    """48 bits that stand for a flow: readers of the format take numbers up to what a double holds."""
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=6).digest(), "big")


def _microseconds(seconds: float) -> int:
    return round(seconds * 1e6)
