"""How a worker process finds its agent."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from etha_ray.config import AgentPaths, WorkerEnvironment, agent_paths, worker_environment
from etha_ray.processes import permit_tracing
from etha_ray.tensor_bus.client import TensorBusClient

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class BootstrapInfo:
    """How `bootstrap_client` found the agent.

    Attributes:
        agent_rank: the agent's rank.
        global_rank: this worker's RANK, 0 where that is unset.
        rank_offset: AGENT_RANK_OFFSET if ``method`` is "offset", else None.
        command_queue_path, state_path: the agent's LMDB files.
        method: "direct" (AGENT_RANK), "offset" (LOCAL_RANK + AGENT_RANK_OFFSET) or "ray" (the agent of this node and device).
        device: the agent's device, such as "cpu" or "cuda:0".
        gpu: UUID of the agent's GPU; empty if it has none, or cannot use it.
        tracers: who may take copies of this process's descriptors, in words, as `setup_ptrace` says.
    """

    agent_rank: int
    global_rank: int
    rank_offset: int | None
    command_queue_path: str
    state_path: str
    method: Literal["direct", "offset", "ray"]
    device: str = "cpu"
    gpu: str = ""
    tracers: str = ""


def setup_ptrace(agent_pid: int | None = None) -> str:
    """Let the agent take copies of this process's descriptors where Yama restricts that (ptrace_scope 1); harmless elsewhere.

    Expandable segments of a GPU need it; other tensors do not. `bootstrap_client` calls it with its agent's pid. Without one, every
    process of this user is let, see PR_SET_PTRACER in prctl(2).

    Returns:
        Who may now, in words; see `etha_ray.processes.permit_tracing`.
    """
    permitted = permit_tracing(agent_pid)
    logger.debug("may take copies of the descriptors of process %d: %s", os.getpid(), permitted)
    return permitted


def bootstrap_client(
    path_naming_fn: Callable[[int], tuple[str, str]] | None = None, connection_timeout: float = 30.0
) -> tuple[TensorBusClient, BootstrapInfo]:
    """Make a client of the agent that serves this worker.

    The agent is found by the environment: AGENT_RANK wins; else LOCAL_RANK plus AGENT_RANK_OFFSET (0 when unset); else,
    inside a Ray worker, the agent of the same node and device in the pool of ETHA_RAY_NAMESPACE. On a node with several CPU
    agents, workers take them in turn.

    Args:
        path_naming_fn: gives (command queue path, state path) for a rank. Default: TENSOR_BUS_COMMAND_QUEUE_PATH and
            TENSOR_BUS_STATE_PATH, else the paths of the pool's convention.
        connection_timeout: seconds to wait for the agent; and, inside a Ray worker, for the GCS before.

    Returns:
        (client, info).

    Raises:
        ValueError: the environment names no agent, and this is no Ray worker with a pool.
        ConnectionError: no agent answers in time, or Ray's GCS does not say which it is.
    """
    environment = worker_environment()
    rank, offset, method, paths = _find_agent(environment, connection_timeout)
    if path_naming_fn is not None:
        paths = AgentPaths(*path_naming_fn(rank))
    client = TensorBusClient(
        rank,
        lmdb_command_queue_path=paths.command_queue,
        agent_state_lmdb_path=paths.state,
        connection_timeout=connection_timeout,
    )
    tracers = setup_ptrace(client.agent_pid)
    info = BootstrapInfo(
        agent_rank=rank,
        global_rank=environment.global_rank or 0,
        rank_offset=offset,
        command_queue_path=paths.command_queue,
        state_path=paths.state,
        method=method,
        device=client.device,
        gpu=client.gpu,
        tracers=tracers,
    )
    return client, info


def _find_agent(environment: WorkerEnvironment, timeout: float) -> tuple[int, int | None, Literal["direct", "offset", "ray"], AgentPaths]:
    if environment.agent_rank is not None:
        return environment.agent_rank, None, "direct", _paths(environment.agent_rank, environment)
    if environment.local_rank is not None:
        offset = environment.agent_rank_offset or 0
        rank = environment.local_rank + offset
        return rank, offset, "offset", _paths(rank, environment)
    from etha_ray.tensor_bus.ray_lookup import find_agent_on_node  # imports ray only if this process already did

    found = find_agent_on_node(environment.namespace, timeout)
    if found is None:
        raise ValueError(
            "cannot tell which agent serves this worker: set AGENT_RANK, or LOCAL_RANK (torchrun does) with AGENT_RANK_OFFSET,"
            f" or run inside a Ray worker on a node with agents (etha_ray.launch_agents, namespace {environment.namespace!r})"
        )
    return found.rank, None, "ray", AgentPaths(command_queue=found.command_queue_path, state=found.state_path)


def _paths(rank: int, environment: WorkerEnvironment) -> AgentPaths:
    usual = agent_paths(rank, environment.namespace)
    return AgentPaths(environment.command_queue_path or usual.command_queue, environment.state_path or usual.state)
