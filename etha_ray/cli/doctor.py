"""``etha-ray doctor``: what this machine lacks, and what to do about it."""

from __future__ import annotations

import json
import sys
from typing import Annotated

import msgspec
import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from etha_ray.cli.status import Namespace, pool_name
from etha_ray.config import store_url
from etha_ray.doctor import Check, examine

_MARKS = {"ok": ("✓", "green"), "warn": ("!", "yellow"), "fail": ("✗", "red")}


def doctor_command(
    store: Annotated[
        str | None, typer.Option(help="URL of the store where agents are to meet: is it reachable? Default: ETHA_RAY_STORE.")
    ] = None,
    address: Annotated[
        str | None, typer.Option(help="The Ray cluster that must answer. Without it, one is looked for, and none is well, too.")
    ] = None,
    namespace: Namespace = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead.")] = False,
) -> None:
    """Check what etha_ray needs of this machine: memory, semaphores, files, limits, packages, GPUs, the store, Ray.

    Run it where agents run: on every node, and in the container. Each line is ok, warn or fail, with what to do.

    Exits with 0 when nothing fails, 1 when something does, 2 when it is used wrongly.

    Example: [bold]etha-ray doctor --store etcd://10.0.0.7:2379[/]
    """
    checks, console = [], Console(highlight=False)
    for check in examine(pool_name(namespace), store or store_url(), address):
        checks.append(check)
        if not as_json:
            console.print(_line(check))
    failed = sum(check.state == "fail" for check in checks)
    if as_json:
        sys.stdout.write(json.dumps({"ok": not failed, "checks": msgspec.to_builtins(checks)}) + "\n")
    else:
        warned = sum(check.state == "warn" for check in checks)
        console.print(Text(f"{len(checks) - failed - warned} ok, {warned} warn, {failed} fail", "bold red" if failed else "bold"))
    if failed:
        raise typer.Exit(1)


def _line(check: Check) -> Table:
    mark, style = _MARKS[check.state]
    table = Table.grid(padding=(0, 1))
    table.add_column(width=1)
    table.add_column(width=26)
    table.add_column(overflow="fold")
    said = Text(check.found)
    if check.remedy:
        said.append(f"\n→ {check.remedy}", style)
    table.add_row(Text(mark, style), Text(check.name, "dim" if check.state == "ok" else style), said)
    return table
