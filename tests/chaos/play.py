"""Strikes until so many processes were killed, and what came of it: ``python -m tests.chaos`` shows it."""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from tests.chaos.judge import longest, outcomes, told, violations
from tests.chaos.monkey import Monkey
from tests.chaos.ray_stage import ray_stage
from tests.chaos.stage import stage
from tests.chaos.strikes import Strike

LIMIT = 10.0
"""Seconds after which a call has hung: it is given 8."""


def play(kills: int, seed: int, folder: Path, limit: float = LIMIT, progress: bool = False, with_ray: bool = False) -> dict[str, Any]:
    """Strike until so many processes were killed, and in every way of the stage; what happened, as JSON has it."""
    begin = time.monotonic()
    with ray_stage(folder) if with_ray else stage(folder) as made:
        monkey = Monkey(made, seed, limit)
        monkey.settle()
        while (killed := sum(strike.kills for strike in monkey.strikes)) < kills or monkey.left:
            strike = monkey.strike()
            if progress:
                after = "" if strike.recovery is None else f", all went on after {strike.recovery:.2f} s"
                print(f"{killed + strike.kills}/{kills} {strike.kind} ({' and '.join(strike.victims)}) during {strike.during}{after}")
        still = monkey.settled()
        monkey.rest()
        acts = monkey.acts
    made.reader.poll()
    entries = made.reader.entries.values()
    (folder / "acts.json").write_text(json.dumps(asdict(replace(acts, dead=sorted(acts.dead)))))
    times = longest(entries, monkey.pauses)
    long = [f"a call took {seconds:.1f} s: {call}" for call, seconds in times.items() if seconds > limit]
    bad = (
        violations(entries, acts, made.seats)
        + long
        + monkey.hangs
        + made.odd_ends
        + made.faults()
        + [f"left behind: {name}" for name in made.left()]
    )
    return {
        "kills": sum(strike.kills for strike in monkey.strikes),
        "seed": seed,
        "minutes": (time.monotonic() - begin) / 60,
        "kinds": monkey.kinds,
        "strikes": _by_kind(monkey.strikes),
        "told": {
            kind: {"calls": len(times), "p50": statistics.median(times), "p99": _at_99(times), "max": times[-1]}
            for kind, times in told(((strike.kind, strike.begin) for strike in monkey.strikes), entries).items()
        },
        "in_its_own_call": sum(strike.struck_caller for strike in monkey.strikes),
        "during": {call: sum(s.during == call for s in monkey.strikes) for call in sorted({s.during for s in monkey.strikes})},
        "passed_on": sum(bool(entry.through) for entry in entries),
        "outcomes": {call: dict(counts.most_common()) for call, counts in sorted(outcomes(entries).items())},
        "longest": times,
        "bad": bad if still else [*bad, "when the strikes were over, nothing crossed any more"],
    }


def _by_kind(strikes: list[Strike]) -> dict[str, dict[str, Any]]:
    table = {}
    for kind in sorted({strike.kind for strike in strikes}):
        own = [strike for strike in strikes if strike.kind == kind]
        times = sorted(strike.recovery for strike in own if strike.recovery is not None)
        table[kind] = {
            "strikes": len(own),
            "kills": sum(strike.kills for strike in own),
            "relays": sum(bool(strike.relays) for strike in own),
        }
        if times:
            table[kind] |= {"recovery_p50": statistics.median(times), "recovery_p99": _at_99(times), "recovery_max": times[-1]}
    return table


def _at_99(ascending: list[float]) -> float:
    return ascending[min(len(ascending) - 1, int(0.99 * len(ascending)))]


def _show(result: dict[str, Any]) -> None:
    console = Console()
    columns = ("strike", "how often", "hit a relay", "processes killed", "recovery p50", "p99", "longest")
    table = Table(*columns, title="seconds until all receivers went on")
    for kind, row in result["strikes"].items():
        times = [f"{row[key]:.2f}" if key in row else "" for key in ("recovery_p50", "recovery_p99", "recovery_max")]
        table.add_row(kind, str(row["strikes"]), str(row["relays"]), str(row["kills"]), *times)
    console.print(table)
    table = Table("strike", "calls", "p50", "p99", "longest", title="seconds until calls under way were told who is gone")
    for kind, row in result["told"].items():
        table.add_row(kind, str(row["calls"]), *(f"{row[key]:.2f}" for key in ("p50", "p99", "max")))
    console.print(table)
    table = Table("call", "how it ended", "longest, s", title="calls of the players")
    for call, counts in result["outcomes"].items():
        ended = ", ".join(f"{count} {outcome}" for outcome, count in counts.items())
        table.add_row(call, ended, f"{result['longest'].get(call, 0.0):.2f}")
    console.print(table)
    console.print(f"{result['kills']} kills in {result['minutes']:.1f} min, seed {result['seed']}; during {result['during']}")
    console.print(f"{result['in_its_own_call']} of the strikes hit the very caller, or its agent")
    console.print(f"{result['passed_on']} receives had something passed on to them by others that received it")
    for sentence in result["bad"]:
        console.print(sentence, style="red", markup=False)


def main() -> None:
    """The command line. Exits with 1 if anything happened that never must."""
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description="Kill, stop and cut off while weights cross.")
    parser.add_argument("--kills", type=int, default=500)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--ray", action="store_true", help="agents and players are Ray actors on one host, which Ray starts again")
    parser.add_argument("--folder", type=Path, help="where journals and logs go; default: a temporary one, printed")
    parser.add_argument("--json", action="store_true", help="print one object")
    options = parser.parse_args()
    folder = options.folder or Path(tempfile.mkdtemp(prefix="chaos-"))
    print(f"journals and logs: {folder}", file=sys.stderr)
    result = play(options.kills, options.seed, folder, progress=not options.json, with_ray=options.ray)
    if options.json:
        print(json.dumps(result))
    else:
        _show(result)
    sys.exit(bool(result["bad"]))
