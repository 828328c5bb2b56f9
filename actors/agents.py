"""Agents as an application of their own: a pool that serves any job of the cluster until it is interrupted."""

from __future__ import annotations

import signal
import time
from typing import Annotated, NoReturn

import typer
from rich import box
from rich.console import Console
from rich.table import Table

import etha_ray
from actors.cluster import Terminated, ray_cluster
from etha_ray.errors import AgentBusyError, AgentFailedError

_LOOK_AGAIN = 2.0
"""Seconds from one look for new nodes to the next."""

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


@app.command(epilog="Example: python -m actors.agents --devices cpu,cpu --namespace training")
def main(
    devices: Annotated[
        str, typer.Option(help='"auto": an agent per GPU of every node; or a list for this node: cpu,cpu or cuda:0,cuda:1.')
    ] = "auto",
    namespace: Annotated[str, typer.Option(help="The pool's name; workers find it by ETHA_RAY_NAMESPACE.")] = "default",
    store: Annotated[str, typer.Option(help='Where agents meet: "gcs", which is Ray\'s own, or the URL of a store.')] = "gcs",
) -> None:
    """Launch agents on the Ray cluster at RAY_ADDRESS, or on an embedded Ray, and keep them until interrupted.

    With "auto", nodes that join the cluster meanwhile get theirs, too.

    Workers reach their agent with etha_ray.bootstrap_client: Ray actors of any job of this cluster by themselves, other
    processes of this machine with AGENT_RANK. Exits with 2 when the agents cannot be launched as asked.
    """
    screen = Console(highlight=False)
    chosen = devices if devices == "auto" else [device.strip() for device in devices.split(",")]
    try:
        with ray_cluster() as address, etha_ray.launch_agents(chosen, namespace=namespace, store=store) as pool:
            screen.print(_table(pool))
            screen.print(f"Pool {namespace!r} serves on the Ray at {address}. Interrupt to end it.", soft_wrap=True)
            while chosen != "auto":
                signal.pause()
            _follow_nodes(pool, screen)
    except (KeyboardInterrupt, Terminated):
        screen.print("Ended; no agent is left.")
    except (ValueError, ConnectionError) as error:
        screen.print(f"Error: {error}", style="red", soft_wrap=True, markup=False)
        raise typer.Exit(2) from error


def _follow_nodes(pool: etha_ray.AgentPool, screen: Console) -> NoReturn:
    """Give nodes that join their agents. Raises ConnectionError when somebody else has shut the pool down."""
    while True:
        time.sleep(_LOOK_AGAIN)
        try:
            added = pool.refresh()
        except (AgentBusyError, AgentFailedError) as error:  # a node that left just then, say
            screen.print(f"New nodes have no agents yet: {error}", style="yellow", soft_wrap=True, markup=False)
            continue
        for agent in pool.describe():
            if agent["rank"] in added:
                screen.print(f"Agent {agent['rank']} joins on {agent.get('hostname', 'a new node')}, {agent['device']}.", soft_wrap=True)


def _table(pool: etha_ray.AgentPool) -> Table:
    table = Table("Agent", "Node", "Device", "Pid", "Command queue", box=box.SIMPLE)
    for agent in pool.describe():
        table.add_row(str(agent["rank"]), agent.get("hostname", ""), agent["device"], str(agent["pid"]), agent["command_queue_path"])
    return table


if __name__ == "__main__":
    app(prog_name="python -m actors.agents")
