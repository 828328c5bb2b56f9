"""The Ray actor around one agent, pinned to its node, and starting such actors."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from typing import Any

import ray
import torch
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from etha_ray.config import agent_paths
from etha_ray.cuda.gpus import see_only
from etha_ray.errors import AgentBusyError, AgentFailedError, error_class
from etha_ray.kvstore import create_store
from etha_ray.kvstore.gcs import in_local_mode
from etha_ray.metrics import RayMetrics
from etha_ray.tensor_bus.agent import TensorBusAgent
from etha_ray.tensor_bus.inspection import encode_seen, inspect_agent
from etha_ray.tensor_bus.leftovers import remove_dead_agents
from etha_ray.tensor_bus.ray_lookup import PoolEntry, PoolSettings, encoded, pool_settings

RAY_NAMESPACE = "etha_ray"
"""Ray namespace of the agents' names, ``{pool namespace}/agent{rank}``."""

_START_TIMEOUT = 120.0


class AgentActor:
    """The Ray actor around one agent. Its loop runs on a thread, so `health` and `describe` answer during transfers.

    What Ray carries between processes it pickles. So what goes in and comes out here is of Python's own types alone.

    Args:
        rank: the agent's rank in its pool.
        namespace: the pool.
        device: "cpu" or "cuda:N", N being the node's own number of the GPU.
        neighbours: ranks of the agents on this node, who share its cores.
        pool_size: agents in the pool.
        settings: what it has in common with the others, `encoded`.
    """

    has_process = True
    """Whether the process it is in is its own."""

    def __init__(
        self,
        rank: int,
        namespace: str,
        device: str,
        neighbours: Sequence[int],
        pool_size: int,
        settings: bytes,
    ) -> None:
        common = pool_settings(namespace, settings)
        ordinal = self._take_process(device)
        if rank == min(neighbours):
            remove_dead_agents(namespace, first_rank=pool_size)
        cores = len(os.sched_getaffinity(0))
        self._store = create_store(common.store, namespace=namespace)
        self._agent = TensorBusAgent(
            rank,
            self._store,
            paths=agent_paths(rank, namespace),
            device=device,
            ordinal=ordinal,
            threads=max(1, cores // len(neighbours)),
            host=ray.util.get_node_ip_address(),  # type: ignore[no-untyped-call]
            memory_budget=common.memory_budget,
            integrity=common.integrity,
            transport=common.transport,
            observer=RayMetrics(namespace, rank),
            restarts=True,
        )
        self._agent.start(dies=self.has_process)

    def _take_process(self, device: str) -> int | None:
        """Set this process up for the agent alone; what it calls its GPU then, if it has one."""
        ordinal = see_only(device) if device.startswith("cuda:") else None
        torch.set_num_threads(1)  # the transport has threads of its own
        return ordinal

    def health(self) -> bool:
        """Whether the agent's loop runs."""
        return self._agent.running

    def describe(self) -> dict[str, Any]:
        """What `TensorBusAgent.describe` says, and the Ray node."""
        return {**self._agent.describe(), "node_id": ray.get_runtime_context().get_node_id()}

    def inspect(self) -> bytes:
        """What the agent's state file shows, for `decode_seen`."""
        seen = inspect_agent(self._agent.rank, self._agent.paths)
        assert seen is not None, "a live agent has a state file"
        return encode_seen(seen)

    def stop(self) -> None:
        """End the agent; its files and semaphores are removed."""
        self._agent.stop()
        self._store.close(cleanup=False)


class LocalAgentActor(AgentActor):
    """An agent in local_mode. Its process is also the driver's; and Ray aborts that when it calls an actor that could not be made, so
    this one can always be made, and raises in `health`."""

    has_process = False

    def __init__(self, *args: Any) -> None:
        self._failure: Exception | None = None
        try:
            super().__init__(*args)
        except Exception as error:
            self._failure = error

    def _take_process(self, device: str) -> int | None:
        return None

    def health(self) -> bool:
        """Whether the agent's loop runs. Raises what kept it from being made."""
        if self._failure is not None:
            raise self._failure
        return super().health()

    def stop(self) -> None:
        """End the agent, if it was made."""
        if self._failure is None:
            super().stop()


def find_actor(namespace: str, rank: int) -> Any | None:
    """The actor of this agent, or None: its driver was killed, or another ends it just now."""
    try:
        return ray.get_actor(_actor_name(namespace, rank), namespace=RAY_NAMESPACE)
    except ValueError:
        return None


def start_actors(namespace: str, entries: Sequence[PoolEntry], settings: PoolSettings) -> list[Any]:
    """Begin to start these agents; those of a node are all among them. Their actors, which `wait_until_started` waits for.

    Raises:
        AgentBusyError: somebody else starts an agent of the same rank.
    """
    neighbours: dict[str, list[int]] = {}
    for entry in entries:
        neighbours.setdefault(entry.node_id, []).append(entry.rank)
    remote = ray.remote(LocalAgentActor if in_local_mode() else AgentActor)
    actors: list[Any] = []
    try:
        for entry in entries:
            options = remote.options(
                name=_actor_name(namespace, entry.rank),
                namespace=RAY_NAMESPACE,
                num_cpus=0,
                num_gpus=0,
                max_restarts=-1,
                max_concurrency=4,
                lifetime="detached" if settings.detached else None,
                scheduling_strategy=NodeAffinitySchedulingStrategy(entry.node_id, soft=False),
            )
            size = entries[-1].rank + 1
            actors.append(options.remote(entry.rank, namespace, entry.device, neighbours[entry.node_id], size, encoded(settings)))
    except ValueError as error:
        for actor in actors:
            ray.kill(actor)
        raise AgentBusyError(f"agents of pool {namespace!r} are just being started by somebody else: {error}") from error
    return actors


def wait_until_started(namespace: str, actors: Sequence[Any]) -> None:
    """Wait until these agents serve.

    Raises:
        AgentFailedError, or what an agent raised (AgentBusyError, ConfigError): one does not.
    """
    calls = [actor.health.remote() for actor in actors]
    try:
        ray.get(calls, timeout=_START_TIMEOUT)
    except ray.exceptions.RayError as error:
        # Of an actor that could not be made Ray gives the error as text.
        refusal = re.search(r"etha_ray\.errors\.(AgentBusyError|ConfigError): (.*)", str(error))
        if refusal is not None:
            raise error_class(refusal[1])(refusal[2]) from error
        raise AgentFailedError(f"the agents of pool {namespace!r} did not start: {error}") from error


def entry_of(namespace: str, rank: int, node_id: str, device: str) -> PoolEntry:
    """The pool's entry for an agent of this rank, there."""
    paths = agent_paths(rank, namespace)
    return PoolEntry(rank=rank, node_id=node_id, device=device, command_queue_path=paths.command_queue, state_path=paths.state)


def _actor_name(namespace: str, rank: int) -> str:
    return f"{namespace}/agent{rank}"
