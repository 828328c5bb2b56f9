"""A pool's overview as one HTML file that needs nothing beside it, in the reader's light or dark colour scheme."""

from __future__ import annotations

import time
from collections.abc import Sequence, Set
from html import escape
from pathlib import Path

from etha_ray.report import format_bytes, format_seconds
from etha_ray.status.overview import Overview
from etha_ray.status.syncs import Part, Sync, syncs
from etha_ray.tensor_bus.inspection import SeenAgent

_STYLE = Path(__file__).with_name("page.css")
_LANES = 32
"""Workers whose part of the last sync is drawn."""

_KINDS = {
    "wait for senders": ("wait", "waits"),
    "wait for receivers": ("wait", "waits"),
    "move": ("move", "moves bytes in"),
    "read by receivers": ("read", "is read by receivers"),
    "ask senders": ("ask", "asks senders whether it stood"),
}


def page(found: Overview, agents: Sequence[SeenAgent]) -> str:
    """The page: what is wrong, the pool in numbers, its last sync drawn, and tables."""
    title = f"etha_ray pool {found.namespace}"
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{escape(title)}</title>
<style>
{_STYLE.read_text(encoding="utf-8")}</style>
</head>
<body>
<main>
{_header(title, found)}
{_last_syncs(found, syncs(agents))}
{_agents(found)}
{_pairs(found)}
{_batches(found)}
{_history(found)}
<footer>Seen {_clock(found.time)} by etha-ray status.</footer>
</main>
</body>
</html>
"""


def _header(title: str, found: Overview) -> str:
    running, last = sum(agent.life == "running" for agent in found.agents), found.syncs[-1] if found.syncs else None
    failed = sum(agent.failed for agent in found.agents)
    tiles = [
        ("Agents running", f"{running} of {len(found.agents)}", "good" if running == len(found.agents) else "bad"),
        ("Workers", str(sum(agent.workers for agent in found.agents)), ""),
        ("Received in all", format_bytes(sum(agent.bytes_received for agent in found.agents)), ""),
        ("Failed transfers", str(failed), "bad" if failed else ""),
    ]
    if last is not None:
        tiles += [("Last sync", format_seconds(last.seconds), ""), ("Its speed", f"{last.gb_per_s:.2f} GB/s", "")]
    shown = "".join(f'<div class="tile"><dt>{label}</dt><dd class="{kind}">{escape(value)}</dd></div>' for label, value, kind in tiles)
    problems = "".join(f"<li>{escape(problem)}</li>" for problem in found.problems)
    return (
        f'<header><h1>{escape(title)}</h1><p class="lead">{_clock(found.time)}</p>'
        + (f'<ul class="problems">{problems}</ul>' if problems else "")
        + f'<dl class="tiles">{shown}</dl></header>'
    )


def _last_syncs(found: Overview, known: Sequence[Sync]) -> str:
    """The last sync of each batch that is registered, or of the last one that was."""
    here = {batch.batch_id for batch in found.batches}
    last = {sync.batch_id: sync for sync in known if sync.batch_id in here or not here}
    return "".join(_drawn(sync) for sync in list(last.values())[-4:])


def _drawn(sync: Sync) -> str:
    whole = max(sync.ended - sync.began, 1e-9)
    lanes = "".join(_lane(part, sync.began, whole) for part in sync.parts[:_LANES])
    if len(sync.parts) > _LANES:
        lanes += _row(f"and {len(sync.parts) - _LANES} more", "<span></span>", "")
    present = {span.name for part in sync.parts if part.past.report is not None for span in part.past.report.spans}
    kinds = dict(_KINDS[name] for name in _KINDS if name in present)
    legend = "".join(f'<li><i class="{kind}"></i>{words}</li>' for kind, words in kinds.items())
    if sync.failed:
        legend += '<li><i class="failed"></i>failed</li>'
    axis = _row("", f'<span class="axis"><span>0</span><span>{format_seconds(whole)}</span></span>', "")
    what = f"{format_bytes(sync.bytes)} at {sync.gb_per_s:.2f} GB/s, {_clock(sync.began)}."
    body = f'<ul class="legend">{legend}</ul><div class="lanes">{lanes}{axis}</div>'
    return _section(f"Last sync of {sync.batch_id}", f"From the first worker's call to the end of the last one's: {what}", body)


def _lane(part: Part, began: float, whole: float) -> str:
    past, report = part.past, part.past.report
    offset = past.began - began

    def bar(kind: str, start: float, seconds: float, says: str) -> str:
        left, width = start / whole * 100, seconds / whole * 100
        return f'<i class="{kind}" style="left:{left:.2f}%;width:{width:.2f}%" title="{escape(says)}"></i>' if seconds > 0 else ""

    if report is None:
        bars, amount = bar("failed", offset, past.seconds, f"{past.kind}: {past.message}"), '<span class="bad">failed</span>'
    else:
        bars = "".join(
            bar(_KINDS.get(span.name, ("move", ""))[0], offset + span.start, span.seconds, f"{span.name} {format_seconds(span.seconds)}")
            for span in report.spans
        )
        amount = format_bytes(report.bytes)
    who = f"agent {part.agent} {past.direction}"
    return _row(who, f'<span class="lane">{bars}</span>', amount)


def _row(who: str, lane: str, amount: str) -> str:
    return f'<div class="row"><span class="who">{who}</span>{lane}<span class="amount">{amount}</span></div>'


def _agents(found: Overview) -> str:
    if not found.agents:
        return _section("Agents", "No agent of this pool is on this host. Start some: etha-ray up.", "")
    rows = [
        (
            str(row.rank),
            (row.life, "good" if row.life == "running" else "bad"),
            row.device,
            row.hostname,
            "" if row.pid is None else str(row.pid),
            str(row.workers),
            str(row.batches),
            f"{format_bytes(row.bytes_sent)} in {row.sent}" if row.sent else "",
            f"{format_bytes(row.bytes_received)} in {row.received}" if row.received else "",
            ", ".join(f"{kind} {count}" for kind, count in sorted(row.errors.items())),
        )
        for row in found.agents
    ]
    heads = ("Agent", "State", "Device", "Host", "Pid", "Workers", "Batches", "Sent", "Received", "Errors")
    return _section("Agents", "Each serves the workers of one device.", _table(heads, rows, numbers={4, 5, 6, 7, 8}))


def _pairs(found: Overview) -> str:
    if not found.pairs:
        return ""
    rows = [
        (
            row.name,
            " ↔ ".join(f"{side.name} ({side.workers})" for side in row.sides),
            " ↔ ".join(side.layout or "no mesh" for side in row.sides),
            f"{row.state}: {row.waits_for}" if row.waits_for else row.state,
        )
        for row in found.pairs
    ]
    note = "Two groups of workers that exchange tensors, and how each holds them."
    return _section("Pairs", note, _table(("Pair", "Sides (workers)", "Layouts", "State"), rows))


def _batches(found: Overview) -> str:
    if not found.batches:
        return ""
    rows = [
        (
            row.batch_id,
            str(row.workers),
            str(row.transfers),
            str(row.version or ""),
            "" if row.bytes is None else format_bytes(row.bytes),
            "" if row.seconds is None else format_seconds(row.seconds),
            "" if row.gb_per_s is None else f"{row.gb_per_s:.2f}",
            (" · ".join([row.state, *row.waits]), "wrap"),
        )
        for row in found.batches
    ]
    heads = ("Batch", "Workers", "Transfers", "Version", "Last bytes", "Last took", "GB/s", "State")
    return _section(
        "Batches", "Tensors that were registered once, to be transferred together.", _table(heads, rows, numbers={1, 2, 3, 4, 5, 6})
    )


def _history(found: Overview) -> str:
    if not found.syncs:
        return ""
    rows = [
        (
            _clock(row.began),
            row.batch_id,
            str(row.version or ""),
            str(row.workers),
            format_bytes(row.bytes),
            format_seconds(row.seconds),
            format_seconds(row.wait_seconds),
            format_seconds(row.move_seconds),
            f"{row.gb_per_s:.2f}",
            (row.error, "wrap bad") if row.error else ("ok", "good"),
        )
        for row in reversed(found.syncs)
    ]
    heads = ("Began", "Batch", "Version", "Workers", "Bytes", "Took", "Waited", "Moved", "GB/s", "Outcome")
    return _section(
        "Last syncs", "The latest first; times are those of the slowest worker.", _table(heads, rows, numbers={2, 3, 4, 5, 6, 7, 8})
    )


def _section(title: str, note: str, body: str) -> str:
    return f'<section><h2>{escape(title)}</h2><p class="note">{escape(note)}</p>{body}</section>'


def _table(heads: Sequence[str], rows: Sequence[Sequence[str | tuple[str, str]]], numbers: Set[int] = frozenset()) -> str:
    """A table of cells, each text or (text, classes); on phones each row is a card. Columns without any text are left out."""
    kept = [index for index in range(len(heads)) if any(row[index] not in ("", ("", "")) for row in rows)]

    def cell(index: int, value: str | tuple[str, str]) -> str:
        text, kind = value if isinstance(value, tuple) else (value, "")
        kinds = f"{kind} n".strip() if index in numbers else kind
        return f'<td class="{kinds}" data-of="{escape(heads[index])}">{f"<span>{escape(text)}</span>" if text else ""}</td>'

    head = "".join(f'<th scope="col" class="{"n" if index in numbers else ""}">{escape(heads[index])}</th>' for index in kept)
    body = "".join("<tr>" + "".join(cell(index, row[index]) for index in kept) + "</tr>\n" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead>\n<tbody>\n{body}</tbody></table></div>'


def _clock(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))
