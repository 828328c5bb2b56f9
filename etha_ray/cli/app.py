"""All commands together."""

from __future__ import annotations

import typer

from etha_ray.cli import bench, demo, doctor, explain, pool, status

app = typer.Typer(no_args_is_help=True, add_completion=False, rich_markup_mode="rich")
app.add_typer(bench.app, name="bench")
app.command(name="up")(pool.up_command)
app.command(name="down")(pool.down_command)
app.command(name="demo")(demo.demo_command)
app.command(name="doctor")(doctor.doctor_command)
app.command(name="status")(status.status_command)
app.command(name="trace")(status.trace_command)
app.command(name="explain")(explain.explain_command)


@app.callback()
def _root() -> None:
    """Moves tensors between two groups of processes, from any device mesh and placement to any other."""


def main() -> None:
    """Entry point of the ``etha-ray`` command."""
    app()
