"""The nodes of a Ray cluster: what devices they have, and what is done on them."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from etha_ray.config import AgentPaths
from etha_ray.errors import ConfigError
from etha_ray.tensor_bus.leftovers import remove_files
from etha_ray.tensor_bus.ray_lookup import PoolEntry

STOP_TIMEOUT = 20.0
"""Seconds that an agent has to end."""

START_TIMEOUT = 60.0
"""Seconds that a process of a busy node has to start: an agent's next one, or one that cleans."""

_T = TypeVar("_T")


def on_cluster(call: Callable[..., _T], *args: Any) -> _T:
    """The call's result, made where Ray's GCS can be reached: here, or in a task if this driver is a Ray Client (ray://).

    Give and return Python's own types alone: Ray pickles them.
    """
    if not ray.util.client.ray.is_connected():  # type: ignore[no-untyped-call]
        return call(*args)
    result: _T = ray.get(ray.remote(call).options(num_cpus=0).remote(*args))
    return result


def places(devices: str | Sequence[str] | Mapping[str, Sequence[str]]) -> list[tuple[str, str]]:
    """(node id, device) of each agent, in the order of ranks."""
    if isinstance(devices, Mapping):
        living = [node["NodeID"] for node in live_nodes()]
        for node_id in devices:
            if node_id not in living:
                raise ConfigError(f"{node_id!r} is no node of this cluster that lives: give ids as ray.nodes() has them ({living})")
        return [(node_id, device) for node_id, listed in devices.items() for device in check_devices(listed)]
    if isinstance(devices, str):
        if devices != "auto":
            raise ConfigError(f'devices {devices!r} is not understood: give "auto" or a list such as ["cpu", "cuda:0"]')
        nodes = sorted(live_nodes(), key=lambda node: (node["NodeManagerAddress"], node["NodeID"]))
        return [
            (node["NodeID"], device)
            for node in nodes
            for device in ([f"cuda:{index}" for index in range(int(node["Resources"].get("GPU", 0)))] or ["cpu"])
        ]
    node_id = ray.get_runtime_context().get_node_id()
    return [(node_id, device) for device in check_devices(devices)]


def check_devices(devices: Sequence[str]) -> Sequence[str]:
    """One node's devices. Raises `ConfigError` where they are not understood."""
    if not devices:
        raise ConfigError('devices is an empty list: give "auto" or a list such as ["cpu", "cuda:0"]')
    for device in devices:
        kind, _, number = device.partition(":")
        if device != "cpu" and not (kind == "cuda" and number.isdigit()):
            raise ConfigError(f'device {device!r} is not understood: give "cpu" or "cuda:0", "cuda:1", ...')
    gpus = [device for device in devices if device != "cpu"]
    if len(set(gpus)) < len(gpus):
        raise ConfigError(f"devices {list(devices)} name a GPU twice: one agent serves all workers of a GPU")
    return devices


def live_nodes() -> list[dict[str, Any]]:
    """What Ray says of each node that lives."""
    found: list[dict[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call]
    return [node for node in found if node["Alive"]]


def clean_nodes(entries: Sequence[PoolEntry]) -> None:
    """Remove the files of these agents on the nodes that still live."""
    alive = {node["NodeID"] for node in live_nodes()}
    remote = ray.remote(_clean)
    by_node: dict[str, list[tuple[str, str]]] = {}
    for entry in entries:
        by_node.setdefault(entry.node_id, []).append((entry.command_queue_path, entry.state_path))
    calls = [
        remote.options(num_cpus=0, scheduling_strategy=NodeAffinitySchedulingStrategy(node_id, soft=False)).remote(paths)
        for node_id, paths in by_node.items()
        if node_id in alive
    ]
    ray.wait(calls, num_returns=len(calls), timeout=START_TIMEOUT)


def _clean(paths: list[tuple[str, str]]) -> None:
    """Remove the files of killed agents (queue and state), whose processes may take a moment to end."""
    deadline = time.monotonic() + STOP_TIMEOUT / 2
    for queue, state in paths:
        while not remove_files(AgentPaths(queue, state)) and time.monotonic() < deadline:
            time.sleep(0.05)
