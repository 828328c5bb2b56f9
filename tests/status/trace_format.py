"""What the trace-event format demands of what we write: complete, metadata and flow events.

After "Trace Event Format" (Google, the document that chrome://tracing and Perfetto's JSON importer follow).
"""

from __future__ import annotations

import json
from collections import defaultdict
from typing import Any


def check(text: str) -> list[dict[str, Any]]:
    """Assert that ``text`` is a trace in the JSON object form, and return its events."""
    trace = json.loads(text)
    assert isinstance(trace["traceEvents"], list)
    assert trace.get("displayTimeUnit") in ("ms", "ns")
    slices: dict[tuple[int, int], list[tuple[int, int]]] = defaultdict(list)
    flows: dict[tuple[str, str, int], list[dict[str, Any]]] = defaultdict(list)
    for event in trace["traceEvents"]:
        assert isinstance(event["name"], str)
        assert isinstance(event["pid"], int)
        assert isinstance(event["tid"], int)
        assert isinstance(event["ts"], int)
        assert 0 <= event["ts"] < 2**53
        assert isinstance(event.get("args", {}), dict)
        if event["ph"] == "M":
            assert event["name"] in ("process_name", "process_sort_index", "thread_name")
            assert ("sort_index" if event["name"].endswith("index") else "name") in event["args"]
        elif event["ph"] == "X":
            assert isinstance(event["dur"], int)
            assert event["dur"] >= 0
            slices[event["pid"], event["tid"]].append((event["ts"], event["ts"] + event["dur"]))
        else:
            assert event["ph"] in ("s", "f"), event
            assert event["ph"] == "s" or event["bp"] == "e", "without bp an arrow ends at the next slice"
            flows[event["cat"], event["name"], event["id"]].append(event)
    for row in slices.values():
        _check_nesting(row)
    for ends in flows.values():
        assert sorted(event["ph"] for event in ends) == ["f", "s"], "an arrow has one start and one end"
        for event in ends:
            around = slices[event["pid"], event["tid"]]
            assert any(start <= event["ts"] <= stop for start, stop in around), "an arrow hangs on a slice of its row"
    named = {(event["pid"], event["tid"]) for event in trace["traceEvents"] if event["name"] == "thread_name"}
    assert slices.keys() == named, "every row has a name"
    return list(trace["traceEvents"])


def _check_nesting(row: list[tuple[int, int]]) -> None:
    """Slices of one row lie within one another or apart."""
    under_way: list[tuple[int, int]] = []
    for start, stop in sorted(row, key=lambda each: (each[0], -each[1])):
        while under_way and under_way[-1][1] <= start:
            under_way.pop()
        assert not under_way or stop <= under_way[-1][1], "slices of a row overlap"
        under_way.append((start, stop))
