"""``etha-ray demo``: weights crossing on this machine, in seconds."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Annotated

import msgspec
import typer
from rich.console import Console
from rich.text import Text

from etha_ray.bench.processes import leaving_on_sigterm
from etha_ray.cli.explain import explained
from etha_ray.cli.failures import failed
from etha_ray.demo import Demo, SyncResult, run_demo
from etha_ray.errors import EthaRayError
from etha_ray.report import format_bytes, format_seconds
from etha_ray.status import overview, page


def demo_command(
    steps: Annotated[int, typer.Option(help="Syncs to make.", min=1, max=64)] = 4,
    width: Annotated[int, typer.Option(help="Each of the 16 weights is width x width float32.", min=2, max=8192)] = 1024,
    html: Annotated[Path | None, typer.Option(help="Also write a page of what the agents did to this file.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead.")] = False,
) -> None:
    """Two trainers with FSDP shards send a model to two generators with tensor-parallel shards, on this machine, without Ray.

    Each byte that arrives is checked; the last report and a picture of who gave what to whom are shown.

    Exits with 0 when every byte was right, 1 when not or when it could not run, 2 when it is used wrongly.

    Example: [bold]etha-ray demo --html demo.html[/]
    """
    console = Console(highlight=False)

    def tell(sync: SyncResult) -> None:
        right = Text("every byte is right", "green") if sync.exact else Text("WRONG BYTES", "bold red")
        line = (
            f"sync {sync.step}: {format_bytes(sync.bytes)} in {format_seconds(sync.seconds)}, {sync.bytes / sync.seconds / 1e9:.2f} GB/s, "
        )
        console.print(Text(line).append_text(right))

    if not as_json:
        console.print("starting four agents, two trainers and two generators ...", style="dim")
    try:
        with leaving_on_sigterm():
            demo = run_demo(steps, width, (lambda sync: None) if as_json else tell)
        if html is not None:
            html.write_text(page(overview(demo.namespace, demo.agents, time.time()), demo.agents), encoding="utf-8")
    except (EthaRayError, OSError) as error:
        raise failed(error) from None
    exact = all(sync.exact for sync in demo.syncs)
    if as_json:
        sys.stdout.write(json.dumps(_as_dict(demo)) + "\n")
    else:
        _show(console, demo, html)
    if not exact:
        raise typer.Exit(1)


def _show(console: Console, demo: Demo, html: Path | None) -> None:
    last = demo.syncs[-1]
    console.print(Text("\nwhat generator 0 saw of the last sync", "dim"))
    console.print(last.receives[0])
    console.print(Text("\nthe weights that engines cut by columns", "dim"))
    console.print(explained(demo.plan, console.width))
    if html is not None:
        console.print(Text(f"\nthe page is in {html}", style="dim"))
    console.print(Text("\nnext: etha-ray up, then README's quick start; etha-ray status --watch shows what happens", style="dim"))


def _as_dict(demo: Demo) -> dict[str, object]:
    return {
        "exact": all(sync.exact for sync in demo.syncs),
        "syncs": [
            {
                "step": sync.step,
                "seconds": sync.seconds,
                "bytes": sync.bytes,
                "exact": sync.exact,
                "sends": msgspec.to_builtins(sync.sends),
                "receives": msgspec.to_builtins(sync.receives),
            }
            for sync in demo.syncs
        ],
        "plan": demo.plan.as_dict(),
    }
