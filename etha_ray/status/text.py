"""A pool's overview in a terminal."""

from __future__ import annotations

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from etha_ray.report import format_bytes, format_seconds
from etha_ray.status.overview import AgentRow, BatchRow, Overview, PairRow, SyncRow

_LIVES = {"running": "green", "starting": "yellow", "stuck": "red", "stopped": "dim", "dead": "red", "unreachable": "red"}
_SHOWN = 8
"""Syncs that are shown, the latest first."""


def shown(found: Overview) -> Group:
    """Everything there is to say, in the order of interest."""
    running = sum(agent.life == "running" for agent in found.agents)
    parts: list[RenderableType] = [Text(f"pool {found.namespace!r}: {running} of {len(found.agents)} agents running", "bold")]
    parts += [Text(f"✗ {problem}", "red") for problem in found.problems]
    if found.agents:
        parts.append(_agents(found.agents))
    if found.pairs:
        parts.append(_pairs(found.pairs))
    if found.batches:
        parts.append(_batches(found.batches))
    if found.syncs:
        parts.append(_syncs(found.syncs))
    return Group(*parts)


def _table(title: str, *columns: str, numbers: tuple[int, ...]) -> Table:
    table = Table(title=title, title_justify="left", title_style="dim", box=box.SIMPLE_HEAD, pad_edge=False)
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if index in numbers else "left", overflow="fold")
    return table


def _agents(rows: list[AgentRow]) -> Table:
    columns = ("agent", "state", "device", "host", "pid", "workers", "batches", "sent", "received", "failed")
    table = _table("agents", *columns, numbers=(4, 5, 6, 7, 8, 9))
    for row in rows:
        table.add_row(
            str(row.rank),
            Text(row.life, _LIVES[row.life]),
            row.device,
            row.hostname,
            str(row.pid or ""),
            str(row.workers),
            str(row.batches),
            f"{format_bytes(row.bytes_sent)} in {row.sent}" if row.sent else "",
            f"{format_bytes(row.bytes_received)} in {row.received}" if row.received else "",
            Text(str(row.failed), "red") if row.failed else "",
        )
    return table


def _pairs(rows: list[PairRow]) -> Table:
    table = _table("pairs", "pair", "sides", "state", numbers=())
    for row in rows:
        sides = " ↔ ".join(f"{side.name} {side.layout or f'x{side.workers}'}" for side in row.sides)
        table.add_row(Text(row.name), Text(sides), Text(f"{row.state}: {row.waits_for}" if row.waits_for else row.state))
    return table


def _batches(rows: list[BatchRow]) -> Table:
    columns = ("batch", "workers", "transfers", "version", "last", "GB/s", "state")
    table = _table("batches", *columns, numbers=(1, 2, 3, 4, 5))
    for row in rows:
        table.add_row(
            Text(row.batch_id),
            str(row.workers),
            str(row.transfers),
            str(row.version or ""),
            "" if row.bytes is None or row.seconds is None else f"{format_bytes(row.bytes)} in {format_seconds(row.seconds)}",
            "" if row.gb_per_s is None else f"{row.gb_per_s:.2f}",
            Text("\n".join([row.state, *row.waits])),
        )
    return table


def _syncs(rows: list[SyncRow]) -> Table:
    columns = ("batch", "bytes", "took", "waited", "moved", "GB/s", "outcome")
    table = _table("last syncs, the latest first", *columns, numbers=(1, 2, 3, 4, 5))
    for row in rows[::-1][:_SHOWN]:
        table.add_row(
            Text(f"{row.batch_id} v{row.version}" if row.version else row.batch_id),
            format_bytes(row.bytes),
            format_seconds(row.seconds),
            format_seconds(row.wait_seconds),
            format_seconds(row.move_seconds),
            f"{row.gb_per_s:.2f}",
            Text(row.error, "red") if row.error else Text("ok", "green"),
        )
    return table
