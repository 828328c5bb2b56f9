"""``etha-ray status``: what the agents of a pool do, once or live; and ``etha-ray trace``: their last transfers as a trace."""

from __future__ import annotations

import json
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.live import Live
from rich.text import Text

from etha_ray.cli.failures import failed
from etha_ray.config import check_name, worker_environment
from etha_ray.errors import ConfigError, EthaRayError
from etha_ray.status import Overview, gather, overview, page, shown, trace_events
from etha_ray.tensor_bus.inspection import SeenAgent, namespaces_here

_PAUSE, _SLICE = 1.0, 0.05
"""Seconds between two looks with --watch; and between two looks for an interrupt."""

Namespace = Annotated[str | None, typer.Option(help='The pool\'s name. Default: ETHA_RAY_NAMESPACE, else "default".')]
Address = Annotated[
    str | None,
    typer.Option(help='The Ray cluster ("auto", HOST:PORT) whose other nodes to ask, too. Without it only this host is looked at.'),
]


def status_command(
    namespace: Namespace = None,
    address: Address = None,
    watch: Annotated[bool, typer.Option("--watch", help="Look again every second, until interrupted.")] = False,
    html: Annotated[Path | None, typer.Option(help="Also write a page to this file.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead.")] = False,
) -> None:
    """What the agents of a pool do: agents, pairs, batches, the last transfers and their speed.

    Reads the agents' state files: it works without Ray, disturbs nobody, and shows an agent that is stuck or was killed.

    Exits with 0 when all agents run, 1 when one does not or there is none, 2 when it is used wrongly.

    Example: [bold]etha-ray status --watch[/]
    """
    name = pool_name(namespace)
    if watch and (as_json or html is not None):
        raise typer.BadParameter("--watch draws in the terminal: leave out --json and --html")
    try:
        if watch:
            found = _watch(name, address)
        else:
            agents, found = _look(name, address)
            if html is not None:
                html.write_text(page(found, agents), encoding="utf-8")
    except (EthaRayError, OSError) as error:
        raise failed(error) from None
    if as_json:
        sys.stdout.write(json.dumps(found.as_dict()) + "\n")
    elif not watch:
        console = Console(highlight=False)
        console.print(shown(found))
        _say_where(console, found)
        if html is not None:
            console.print(Text(f"the page is in {html}", style="dim"))
    if found.problems or not found.agents:
        raise typer.Exit(1)


def trace_command(
    out: Annotated[Path, typer.Option(help="Where the trace is written.")],
    namespace: Namespace = None,
    address: Address = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print what was written as one JSON object.")] = False,
) -> None:
    """The last transfers of all agents as a trace: open it at https://ui.perfetto.dev, or in chrome://tracing.

    Each agent keeps its last 64 transfers. A row is a worker's batch, a slice a transfer with where its time went, and arrows lead
    from senders to receivers.

    Exits with 0 when there were transfers, 1 when there were none, 2 when it is used wrongly.

    Example: [bold]etha-ray trace --out trace.json[/]
    """
    name = pool_name(namespace)
    try:
        agents = gather(name, address)
        transfers = sum(len(agent.past) for agent in agents)
        if transfers:
            out.write_text(json.dumps(trace_events(agents)), encoding="utf-8")
    except (EthaRayError, OSError) as error:
        raise failed(error) from None
    if not transfers:
        if not agents:
            raise failed(RuntimeError(f"no agent of pool {name!r} is on this host: there is nothing to trace. Start some: etha-ray up"))
        raise failed(RuntimeError(f"the {len(agents)} agents of pool {name!r} know of no transfer: there is nothing to trace"))
    if as_json:
        sys.stdout.write(json.dumps({"out": str(out), "agents": len(agents), "transfers": transfers}) + "\n")
    else:
        console = Console(highlight=False)
        console.print(f"{transfers} transfers of {len(agents)} agents are in {out}: open it at https://ui.perfetto.dev", soft_wrap=True)


def pool_name(namespace: str | None) -> str:
    """The pool that is meant; raises `typer.BadParameter` for one that cannot be."""
    try:
        return check_name("namespace", namespace) if namespace is not None else worker_environment().namespace
    except ConfigError as error:
        raise typer.BadParameter(str(error), param_hint="--namespace") from None


def _look(namespace: str, address: str | None) -> tuple[list[SeenAgent], Overview]:
    agents = gather(namespace, address)
    return agents, overview(namespace, agents, time.time())


def _watch(namespace: str, address: str | None) -> Overview:
    found = _look(namespace, address)[1]
    with _interrupts() as interrupted, Live(shown(found), console=Console(highlight=False), auto_refresh=False, screen=True) as live:
        while not interrupted:
            live.update(shown(found), refresh=True)
            until = time.monotonic() + _PAUSE
            while not interrupted and time.monotonic() < until:
                time.sleep(_SLICE)
            found = _look(namespace, address)[1]
    return found


@contextmanager
def _interrupts() -> Iterator[list[int]]:
    """SIGINTs that came within the block; a second one ends it at once.

    As KeyboardInterrupt the first may be lost: Python lets no exception out of a finalizer.
    """
    came: list[int] = []

    def note(number: int, _: object) -> None:
        if came:
            raise KeyboardInterrupt
        came.append(number)

    before = signal.signal(signal.SIGINT, note)
    try:
        yield came
    finally:
        signal.signal(signal.SIGINT, before)


def _say_where(console: Console, found: Overview) -> None:
    if found.agents:
        return
    others = [name for name in namespaces_here() if name != found.namespace]
    where = f"; on this host there are pools {', '.join(map(repr, others))}: give --namespace" if others else ""
    console.print(Text(f"no agent of this pool is on this host{where}. Start some: etha-ray up", style="yellow"))
