"""The generators as a job of their own: they take each version that is offered by a name, and use it."""

from __future__ import annotations

from typing import Annotated

import ray
import typer
from rich.console import Console

from actors.cluster import ray_cluster
from actors.job import Group
from actors.model import ModelConfig
from actors.named import NamedGenerator, digest, seats
from actors.screen import bad_input, exit_codes
from actors.trainer import Training
from etha_ray.errors import BatchClosedError

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


@app.command(epilog="Example: python -m actors.generate --name policy --generators 3 --replica b")
def main(
    name: Annotated[str, typer.Option(help="What the trainers offer.")] = "policy",
    generators: Annotated[int, typer.Option(min=1, help="Generators; they hold the weights tensor-parallel.")] = 2,
    replica: Annotated[str, typer.Option(help="Tells this job from others that take the same weights.")] = "0",
    namespace: Annotated[str, typer.Option(help="The pool of agents that both jobs use.")] = "default",
) -> None:
    """Take the weights of python -m actors.train as often as there are new ones, until the trainers leave.

    Needs agents on this node (python -m actors.agents, or etha-ray up). Exits with 1 when the job failed, and with 2 when it cannot
    be done as asked.
    """
    screen = Console(highlight=False)
    config = ModelConfig()
    with exit_codes(screen):
        with bad_input():
            config.check_generators(generators)
        with ray_cluster(), Group(NamedGenerator, seats("target", generators, namespace), Training(config, steps=1)) as group:
            ray.get(group.form())
            group.call("take", name, replica)
            try:
                while True:
                    version = group.call("update")[0]
                    loss = group.call("judge")[0].held_out_loss
                    screen.print(f"Version {version}: held-out loss {loss:.3f}, digest {digest(group.call('digests'))}", soft_wrap=True)
            except BatchClosedError:
                screen.print("The trainers have left.")


if __name__ == "__main__":
    app(prog_name="python -m actors.generate")
