"""``etha-ray explain``: what crosses between two layouts, in a terminal, as JSON, or as a picture."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, TypeVar

import typer
from rich.console import Console, Group
from rich.style import Style
from rich.table import Table
from rich.text import Text

from etha_ray.cli.failures import failed
from etha_ray.errors import ConfigError, EthaRayError, LayoutError
from etha_ray.explanation import Explanation, explain
from etha_ray.explanation.explanation import BANDWIDTH
from etha_ray.explanation.picture import COLOURS
from etha_ray.explanation.scale import Scale
from etha_ray.explanation.sides import bytes_of, global_shape
from etha_ray.explanation.text import ByteTable, assumption, byte_table, heading, sentences
from etha_ray.layout import Layout

_T = TypeVar("_T")


def explain_command(
    source: Annotated[str, typer.Option(help='How the giving side holds the tensor: mesh sizes, a colon, placements ("4x2: S0,R").')],
    target: Annotated[str, typer.Option(help="The same of the receiving side.")],
    shape: Annotated[str, typer.Option(help='The whole tensor\'s shape ("4096x1024"); "" for a scalar.')],
    dtype: Annotated[str, typer.Option(help="Element type.")] = "bfloat16",
    gpus_per_host: Annotated[int, typer.Option(help="Ranks to a host, numbered through, the source's first.")] = 8,
    bandwidth: Annotated[float, typer.Option(help="GB/s of each host's network link, each way, for the time.")] = BANDWIDTH / 1e9,
    save: Annotated[Path | None, typer.Option(help="Also write pictures to this file: .svg, .png or .html.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead.")] = False,
) -> None:
    """What crosses when a tensor goes from one layout to another: who gives how much to whom, and how long it takes.

    Needs no GPU, no Ray and no process group.

    Placements: S0 shards dimension 0, R replicates, SS0/2 is a _StridedShard, P(sum) a Partial (source only).

    Example: [bold]etha-ray explain --source "4x2: S0,S1" --target "8: R" --shape 4096x1024[/]
    """
    sides = _read("--source", Layout.decode, source), _read("--target", Layout.decode, target)
    sizes, itemsize = _read("--shape", global_shape, shape), _read("--dtype", bytes_of, dtype)
    try:
        made = explain(*sides, sizes, itemsize, gpus_per_host=gpus_per_host, bandwidth=bandwidth * 1e9)
        if save is not None:
            made.save(save)
    except (LayoutError, ConfigError) as error:
        raise typer.BadParameter(str(error)) from None
    except (EthaRayError, OSError) as error:
        raise failed(error) from None
    if as_json:
        sys.stdout.write(json.dumps(made.as_dict()) + "\n")
        return
    console = Console(highlight=False)
    console.print(explained(made, console.width))
    if save is not None:
        console.print(Text(f"pictures are in {save}", style="dim"))


def _read(option: str, read: Callable[[str], _T], text: str) -> _T:
    try:
        return read(text)
    except (LayoutError, ConfigError) as error:
        raise typer.BadParameter(str(error), param_hint=option) from None


def explained(made: Explanation, width: int) -> Group:
    lines = Table.grid(padding=(0, 2))
    lines.add_column(style="dim")
    lines.add_column()
    for word, sentence in sentences(made):
        lines.add_row(word, Text(sentence))
    if made.between_hosts:
        lines.add_row("", Text(assumption(made), style="dim"))
    table = byte_table(made, width)
    shown = Text("the terminal is too narrow for the table of bytes", style="dim") if table is None else _coloured(table)
    return Group(Text(heading(made), style="bold"), lines, Text(), shown)


def _coloured(table: ByteTable) -> Table:
    shown = Table(title=Text(table.title, style="dim"), title_justify="left", box=None, pad_edge=False, padding=(0, 2, 0, 0))
    names, *rows = table.rows()
    for name in names:
        shown.add_column(Text(name), justify="right", no_wrap=True)
    scale = Scale.of(list(table.sums.values())) if table.sums else None
    for number, (name, *cells) in enumerate(rows):
        shades = (
            scale.shade(table.sums[number, column]) if scale and (number, column) in table.sums else None for column in range(len(cells))
        )
        shown.add_row(name, *(Text(cell, style=_style(shade)) for cell, shade in zip(cells, shades, strict=True)))
    return shown


def _style(shade: int | None) -> Style:
    if shade is None:
        return Style(dim=True)
    return Style(color=COLOURS[f"on_heat{shade}"][0], bgcolor=COLOURS[f"heat{shade}"][0])
