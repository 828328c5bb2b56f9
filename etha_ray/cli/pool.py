"""``etha-ray up`` and ``etha-ray down``: agents on a running Ray cluster that outlive the command that started them."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable
from typing import Annotated, Any, TypeVar

import typer
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from etha_ray.cli.failures import failed
from etha_ray.cli.status import Namespace, pool_name
from etha_ray.config import store_url
from etha_ray.errors import ConfigError, EthaRayError

_T = TypeVar("_T")

_Address = Annotated[str, typer.Option(help='The Ray cluster: HOST:PORT, or "auto": RAY_ADDRESS, else the one of this machine.')]
_Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead.")]


def up_command(
    devices: Annotated[
        str, typer.Option(help='"auto": an agent per GPU of every node; or a list for this node: cpu,cpu or cuda:0,cuda:1.')
    ] = "auto",
    namespace: Namespace = None,
    store: Annotated[
        str | None,
        typer.Option(help='Where agents meet: "gcs", which is Ray\'s own, or the URL of a store. Default: ETHA_RAY_STORE, or gcs.'),
    ] = None,
    address: _Address = "auto",
    as_json: _Json = False,
) -> None:
    """Start agents on the running Ray cluster. They stay when this command has ended: `etha-ray down` ends them.

    Exits with 0 once all agents serve, 1 when they could not be started, 2 when it is used wrongly.

    Example: [bold]ray start --head && etha-ray up --devices cpu,cpu,cpu,cpu[/]
    """
    name = pool_name(namespace)
    chosen = devices if devices == "auto" else [device.strip() for device in devices.split(",")]

    def start() -> list[dict[str, Any]]:
        from etha_ray.ray_nodes import check_devices  # these need Ray, which takes a second to load
        from etha_ray.runtime import connect, launch_agents

        if isinstance(chosen, list):
            check_devices(chosen)
        connect(address)
        return launch_agents(chosen, namespace=name, store=store or store_url() or "gcs", detached=True).describe()

    try:
        agents = _through_ray(start)
    except ConfigError as error:
        raise typer.BadParameter(str(error)) from None
    if as_json:
        sys.stdout.write(json.dumps({"namespace": name, "agents": agents}) + "\n")
        return
    console = Console(highlight=False)
    table = Table("agent", "host", "device", "pid", "state", box=box.SIMPLE_HEAD, pad_edge=False)
    for agent in agents:
        table.add_row(str(agent["rank"]), agent.get("hostname", ""), agent["device"], str(agent["pid"]), agent["state"])
    console.print(table)
    meant = "" if name == "default" else f" Workers find it with ETHA_RAY_NAMESPACE={name}."
    console.print(Text(f"pool {name!r} serves.{meant} See it with `etha-ray status`, end it with `etha-ray down`."))


def down_command(namespace: Namespace = None, address: _Address = "auto", as_json: _Json = False) -> None:
    """End the agents of a pool, whoever started them; transfers under way fail with an error that says so.

    Exits with 0 once they are gone, 1 when there is no such pool or no Ray cluster, 2 when it is used wrongly.

    Example: [bold]etha-ray down --namespace training[/]
    """
    name = pool_name(namespace)

    def stop() -> list[int]:
        from etha_ray.runtime import connect, find_pool

        connect(address)
        pool = find_pool(name)
        pool.shutdown()
        return pool.ranks

    ranks = _through_ray(stop)
    if as_json:
        sys.stdout.write(json.dumps({"namespace": name, "ended": ranks}) + "\n")
    else:
        Console(highlight=False).print(f"pool {name!r}: {len(ranks)} agents ended")


def _through_ray(do: Callable[[], _T]) -> _T:
    logging.getLogger("ray").setLevel(logging.ERROR)
    try:
        return do()
    except ConfigError:
        raise
    except (EthaRayError, ConnectionError) as error:
        raise failed(error) from None
