"""The main job: trainers train a model, generators receive each version of it and use it, every bit is compared."""

from __future__ import annotations

import math
import os
import platform
from dataclasses import dataclass
from datetime import date
from itertools import pairwise
from pathlib import Path
from statistics import fmean
from typing import Annotated

import psutil
import ray
import torch
import typer
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from actors.checkpoint import read_checkpoint
from actors.cluster import ray_cluster
from actors.job import Sync, SyncJob, Workload, checkpoint_workload, sync_job, training_workload
from actors.model import ModelConfig
from actors.report import ByteMap, RunSummary, VersionRow, format_bytes, format_number, format_seconds, write_report
from actors.screen import bad_input, exit_codes
from actors.spread import spread
from actors.trainer import Training

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)

_SHOWN_DIFFERENCES = 5
_SMOOTHED_STEPS = 5
"""A version's train loss is the mean of its last steps: a single batch is small, and its loss jumps."""


@dataclass(frozen=True)
class Plan:
    """What this run is to do. `steps` are the training steps after which the weights cross."""

    workload: Workload
    trainers: int
    generators: int
    steps: tuple[int, ...]
    model: Path | None

    @property
    def trains(self) -> bool:
        """Whether the weights are trained here, and not read from a checkpoint."""
        return self.model is None


@app.command(epilog="Example: python -m actors.weight_sync --trainers 2 --generators 3 --steps 60 --report report.html")
def main(
    trainers: Annotated[int, typer.Option(min=1, help="Trainers; they hold the weights as FSDP does.")] = 2,
    generators: Annotated[int, typer.Option(min=1, help="Generators; they hold the weights tensor-parallel.")] = 2,
    steps: Annotated[int, typer.Option(min=1, help="Training steps.")] = 160,
    sync_every: Annotated[int, typer.Option(min=1, help="Steps from one version to the next; the last step gives one too.")] = 20,
    model: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Move this Hugging Face checkpoint (safetensors) instead, as often as versions would be trained.",
        ),
    ] = None,
    report: Annotated[Path | None, typer.Option(metavar="PATH", help="Write a self-contained HTML report.")] = None,
) -> None:
    """Train a small transformer on real text and bring its weights to generators over the bus.

    Runs on the Ray cluster at RAY_ADDRESS, as `ray job submit` sets it, over all its nodes, trainers first, then generators, each on
    a GPU where there are as many; or on an embedded Ray. Exits with 1 when a tensor
    arrived with other bits than it was sent with, or when the job failed, and with 2 when it cannot be done as asked.
    """
    screen = Console(highlight=False)
    with exit_codes(screen):
        with bad_input():
            plan = _plan(trainers, generators, steps, sync_every, model)
            target = None if report is None else _report_target(report)
        rows, byte_map = _run(plan, screen)
        screen.print(_table(plan, rows))
        if plan.trains:
            screen.print(Text.assemble(("Written with the last version: ", "bold"), repr(rows[-1].sample)), soft_wrap=True)
        if target is not None:
            screen.print(f"Report: {write_report(target, _summary(plan, rows, byte_map))}", soft_wrap=True)
        if not all(row.bit_exact for row in rows):
            screen.print("[bold red]Some tensors arrived with other bits than they were sent with.")
            raise typer.Exit(1)


def _plan(trainers: int, generators: int, steps: int, sync_every: int, model: Path | None) -> Plan:
    """Raises ValueError, OSError or ModuleNotFoundError when it cannot be done."""
    at = tuple(sorted({*range(sync_every, steps + 1, sync_every), steps}))
    if model is not None:
        folder = model.resolve()
        return Plan(checkpoint_workload(read_checkpoint(folder)), trainers, generators, at, folder)
    config = ModelConfig()
    config.check_generators(generators)
    return Plan(training_workload(Training(config, steps)), trainers, generators, at, None)


def _report_target(path: Path) -> Path:
    """The report's absolute path, in a folder that exists. Raises OSError before the run rather than after it."""
    target = path.resolve()
    target.parent.mkdir(parents=True, exist_ok=True)
    if target.is_dir() or not os.access(target if target.exists() else target.parent, os.W_OK):
        raise OSError(f"The report cannot be written to {target}; name a file that can.")
    return target


def _run(plan: Plan, screen: Console) -> tuple[list[VersionRow], ByteMap]:
    """Every version's row, and what one sync moved from whom to whom."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    screen.print(f"{_model_name(plan)}: {plan.trainers} trainers, {plan.generators} generators", soft_wrap=True)
    with Progress(*columns, console=screen, transient=True, disable=not screen.is_terminal) as progress:
        bar = Bar(progress, progress.add_task("Starting Ray", total=plan.steps[-1]))
        with ray_cluster():
            _tell_nodes(plan, progress.console)
            bar.say(f"Starting agents, {plan.trainers} trainers, {plan.generators} generators")
            with sync_job(plan.workload, plan.trainers, plan.generators) as job:
                rows = []
                for version, (before, step) in enumerate(pairwise((0, *plan.steps)), 1):
                    row, sync = _make_version(plan, job, version, range(before, step), bar)
                    rows.append(row)
                    _print_version(progress.console, row, sync)
                bar.say("Closing")
    return rows, sync.byte_map


def _tell_nodes(plan: Plan, screen: Console) -> None:
    found = spread(plan.trainers + plan.generators)
    if len(set(found.nodes)) > 1:
        trainers, generators = found.nodes[: plan.trainers], found.nodes[plan.trainers :]
        screen.print(f"Trainers on {len(set(trainers))}, generators on {len(set(generators))} of {len(set(found.nodes))} nodes")
    if found.gpus:
        screen.print("Each on a GPU")


@dataclass(frozen=True)
class Bar:
    """The progress of the training steps."""

    progress: Progress
    task: TaskID

    def say(self, what: str) -> None:
        """Tell what is being done now."""
        self.progress.update(self.task, description=what)

    def reach(self, step: int) -> None:
        """`step` steps are done."""
        self.progress.update(self.task, completed=step)


def _make_version(plan: Plan, job: SyncJob, version: int, steps: range, bar: Bar) -> tuple[VersionRow, Sync]:
    """Train these steps, bring the weights across, and let the generators use them."""
    train_loss = judgement = None
    if plan.trains:
        bar.say(f"Training version {version}")
        losses = []
        for step in steps:
            losses.append(job.trainers.call("step", step)[0])
            bar.reach(step + 1)
        train_loss = fmean(losses[-_SMOOTHED_STEPS:])
    bar.say(f"Moving version {version}")
    sync = job.sync()
    if plan.trains:
        bar.say(f"Using version {version}")
        judgement = job.generators.call("judge")[0]
    bar.reach(steps.stop)
    row = VersionRow(
        version=version,
        step=steps.stop,
        train_loss=train_loss,
        held_out_loss=judgement and judgement.held_out_loss,
        nbytes=sync.nbytes,
        seconds=sync.seconds,
        bit_exact=not sync.differences,
        sample=judgement and judgement.sample,
    )
    return row, sync


def _print_version(screen: Console, row: VersionRow, sync: Sync) -> None:
    training = ""
    if row.train_loss is not None:
        training = f"step {row.step}, train loss {row.train_loss:.3f}, held-out loss {row.held_out_loss:.3f}, "
    screen.print(
        f"Version {row.version}: {training}{format_bytes(row.nbytes)} in {format_seconds(row.seconds)}, "
        f"{'bit-exact' if row.bit_exact else 'NOT bit-exact'}",
        soft_wrap=True,
    )
    for line in sync.differences[:_SHOWN_DIFFERENCES]:
        screen.print(Text(f"  {line}", style="red"), soft_wrap=True)
    if len(sync.differences) > _SHOWN_DIFFERENCES:
        screen.print(Text(f"  and {len(sync.differences) - _SHOWN_DIFFERENCES} more", style="red"))


def _table(plan: Plan, rows: list[VersionRow]) -> Table:
    table = Table(box=box.SIMPLE)
    losses = ["Step", "Train\nloss", "Held-out\nloss"] if plan.trains else []
    for head in ["Version", *losses, "Bytes", "Seconds", "GB/s"]:
        table.add_column(head, justify="right", no_wrap=True)
    table.add_column("Bit-exact", no_wrap=True)
    for row in rows:
        losses = [f"{loss:.3f}" for loss in (row.train_loss, row.held_out_loss) if loss is not None]
        cells = [str(row.step), *losses] if plan.trains else []
        exact = "[green]yes[/]" if row.bit_exact else "[bold red]no[/]"
        numbers = [str(row.version), *cells, f"{row.nbytes:,}", f"{row.seconds:.4f}", format_number(row.gb_per_s)]
        table.add_row(*numbers, exact)
    return table


def _summary(plan: Plan, rows: list[VersionRow], byte_map: ByteMap) -> RunSummary:
    facts = [
        ("Model", _model_name(plan)),
        ("Trainers", f"{plan.trainers}, Shard(0) as FSDP"),
        ("Generators", f"{plan.generators}, tensor-parallel"),
        ("Agents", str(plan.trainers + plan.generators)),
    ]
    if plan.trains:
        facts += [
            ("Training steps", str(plan.steps[-1])),
            ("Train loss", f"mean of a version's last {_SMOOTHED_STEPS} steps"),
            ("Text", "pydoc_data.topics, byte by byte, a tenth held out"),
        ]
    crossing = "A model crosses while it is trained" if plan.trains else "A checkpoint crosses"
    return RunSummary(
        title="Weight sync",
        subtitle=f"{crossing}: from trainers to generators, over the bus of etha_ray, every bit compared.",
        facts=tuple(facts),
        versions=tuple(rows),
        byte_map=byte_map,
        machine=_machine(),
    )


def _model_name(plan: Plan) -> str:
    tensors = plan.workload.crossings
    elements = sum(math.prod(each.shape) for each in tensors)
    name = "Decoder-only transformer" if plan.model is None else f"Checkpoint {plan.model.name}"
    return f"{name}, {elements:,} parameters in {len(tensors)} tensors"


def _machine() -> str:
    memory = psutil.virtual_memory().total / 2**30
    return (
        f"{os.cpu_count()} CPUs, {memory:.0f} GiB memory, {platform.system()} {platform.machine()}, "
        f"Python {platform.python_version()}, torch {torch.__version__}, Ray {ray.__version__}, {date.today()}"
    )


if __name__ == "__main__":
    app(prog_name="python -m actors.weight_sync")
