"""The trainers as a job of their own: they train, and offer each version by a name to all generators that there are."""

from __future__ import annotations

from itertools import pairwise
from statistics import fmean
from typing import Annotated

import ray
import typer
from rich.console import Console

from actors.cluster import ray_cluster
from actors.job import Group
from actors.model import ModelConfig
from actors.named import NamedTrainer, digest, seats
from actors.screen import exit_codes
from actors.trainer import Training

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


@app.command(epilog="Example: python -m actors.train --name policy --steps 160, and elsewhere python -m actors.generate --name policy")
def main(
    name: Annotated[str, typer.Option(help="What generators ask for.")] = "policy",
    trainers: Annotated[int, typer.Option(min=1, help="Trainers; they hold the weights as FSDP does.")] = 2,
    steps: Annotated[int, typer.Option(min=1, help="Training steps.")] = 160,
    sync_every: Annotated[int, typer.Option(min=1, help="Steps from one version to the next; the last step gives one too.")] = 20,
    namespace: Annotated[str, typer.Option(help="The pool of agents that both jobs use.")] = "default",
) -> None:
    """Train a small transformer, and give each version to the generators that have joined; the first one waits for some.

    Needs agents on this node (python -m actors.agents, or etha-ray up). Exits with 1 when the job failed.
    """
    screen = Console(highlight=False)
    at = sorted({*range(sync_every, steps + 1, sync_every), steps})
    with (
        exit_codes(screen),
        ray_cluster(),
        Group(NamedTrainer, seats("source", trainers, namespace), Training(ModelConfig(), steps)) as group,
    ):
        ray.get(group.form())
        group.call("offer", name)
        for before, step in pairwise((0, *at)):
            loss = fmean(group.call("step", each)[0] for each in range(before, step))
            reached = group.call("push", step)[0]
            screen.print(
                f"Version {step}: train loss {loss:.3f}, digest {digest(group.call('digests'))}, to {', '.join(reached)}", soft_wrap=True
            )


if __name__ == "__main__":
    app(prog_name="python -m actors.train")
