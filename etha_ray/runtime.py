"""Agents as a Ray application: one actor per device, pinned to it.

Ray places agents, restarts them and tells who they are; it is not on the path of a transfer. In Ray's local_mode (up to 2.52) an actor is
an object of this process, called at once on the caller's thread: the agents' loops, which have threads of their own, run there as well.
"""

from __future__ import annotations

import logging
import os
import re
import threading
import time
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any, TypeVar

import msgspec
import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from etha_ray.config import AgentPaths, agent_paths, check_integrity, check_name, worker_environment
from etha_ray.errors import AgentBusyError, AgentFailedError, AgentNotFoundError, ConfigError, error_class
from etha_ray.kvstore import create_store
from etha_ray.kvstore.gcs import in_local_mode
from etha_ray.metrics import RayMetrics
from etha_ray.tensor_bus.agent import TensorBusAgent
from etha_ray.tensor_bus.inspection import SeenAgent, decode_seen, encode_seen, inspect_agent
from etha_ray.tensor_bus.leftovers import remove_dead_agents, remove_files
from etha_ray.tensor_bus.ray_lookup import PoolEntry, read_pool, write_pool
from etha_ray.transport.network import DEFAULT_MEMORY_BUDGET

logger = logging.getLogger(__name__)

RAY_NAMESPACE = "etha_ray"
"""Ray namespace of the agents' names, ``{pool namespace}/agent{rank}``."""

_T = TypeVar("_T")

_START_TIMEOUT = 120.0
_STOP_TIMEOUT = 20.0


class AgentActor:
    """The Ray actor around one agent. Its loop runs on a thread, so `health` and `describe` answer during transfers.

    Args:
        rank: the agent's rank in its pool.
        namespace: the pool.
        device: "cpu" or "cuda:N", N being the node's own number of the GPU.
        store: URL of the store where agents meet.
        neighbours: ranks of the agents on this node, who share its cores.
        pool_size: agents in the pool.
        memory_budget: bytes of staging memory for transfers between hosts.
        integrity: what is checked on arrival; see `TensorBusAgent`.
    """

    def __init__(
        self,
        rank: int,
        namespace: str,
        device: str,
        store: str,
        neighbours: Sequence[int],
        pool_size: int,
        memory_budget: int,
        integrity: str = "auto",
    ) -> None:
        if not in_local_mode():  # there this process is not only the agent's
            if device.startswith("cuda:"):
                os.environ["CUDA_VISIBLE_DEVICES"] = device.removeprefix("cuda:")
            import torch

            torch.set_num_threads(1)  # the transport has threads of its own
        if rank == min(neighbours):
            remove_dead_agents(namespace, first_rank=pool_size)
        cores = len(os.sched_getaffinity(0))
        self._store = create_store(store, namespace=namespace)
        self._agent = TensorBusAgent(
            rank,
            self._store,
            paths=agent_paths(rank, namespace),
            device=device,
            threads=max(1, cores // len(neighbours)),
            host=ray.util.get_node_ip_address(),  # type: ignore[no-untyped-call]
            memory_budget=memory_budget,
            integrity=integrity,
            observer=RayMetrics(namespace, rank),
            restarts=True,
        )
        self._agent.start()

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


class AgentPool:
    """Agents that `launch_agents` started. As a context manager it shuts them down at its end."""

    def __init__(self, namespace: str, entries: Sequence[PoolEntry], actors: Sequence[Any]) -> None:
        self.namespace = namespace
        self._entries = tuple(entries)
        self._actors = tuple(actors)
        self._lock = threading.Lock()
        self._down = False

    @property
    def ranks(self) -> list[int]:
        """The agents' ranks, by node, then device."""
        return [entry.rank for entry in self._entries]

    def describe(self, timeout: float = 5.0) -> list[dict[str, Any]]:
        """One dict per agent: rank, node_id, hostname, device, pid, state ("running", "stopped" or "unreachable"), paths,
        and counts of workers, pairs and batches. Agents that do not answer within ``timeout`` seconds are unreachable."""
        calls = [] if self._down else [actor.describe.remote() for actor in self._actors]
        answered = set(ray.wait(calls, num_returns=len(calls), timeout=timeout)[0]) if calls else set()
        described = []
        for position, entry in enumerate(self._entries):
            answer: dict[str, Any] = {
                "rank": entry.rank,
                "node_id": entry.node_id,
                "device": entry.device,
                "pid": None,
                "state": "stopped" if self._down else "unreachable",
                "command_queue_path": entry.command_queue_path,
                "state_path": entry.state_path,
            }
            if calls and calls[position] in answered:
                try:
                    answer |= ray.get(calls[position])
                except ray.exceptions.RayError as error:
                    logger.warning("agent %d does not describe itself: %s", entry.rank, error)
            described.append(answer)
        return described

    def shutdown(self) -> None:
        """End the agents and remove what they, or ones that were killed, left on their nodes. May be called more than once."""
        with self._lock:
            if self._down:
                return
            self._down = True
        stops = [actor.stop.remote() for actor in self._actors]
        ended = set(ray.wait(stops, num_returns=len(stops), timeout=_STOP_TIMEOUT)[0])
        killed = [entry for entry, stop in zip(self._entries, stops, strict=True) if stop not in ended or not _succeeded(stop)]
        for actor in self._actors:
            ray.kill(actor, no_restart=True)
        _on_cluster(write_pool, self.namespace, [])
        _clean_nodes(killed)

    def __enter__(self) -> AgentPool:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.shutdown()

    def __repr__(self) -> str:
        devices = ", ".join(f"{entry.rank}: {entry.device}" for entry in self._entries)
        return f"AgentPool({self.namespace!r}, {{{devices}}}{', shut down' if self._down else ''})"


def launch_agents(
    devices: str | Sequence[str] = "auto",
    *,
    namespace: str | None = None,
    store: str = "gcs",
    memory_budget: int = DEFAULT_MEMORY_BUDGET,
    integrity: str = "auto",
    detached: bool = False,
) -> AgentPool:
    """Start agents on the Ray cluster (on a Ray of this process's own if it has none yet) and wait until they serve.

    The driver may be on the cluster or reach it as a Ray Client (``ray://``); this node is the head then.

    Agents take no CPU and no GPU share from other actors, and Ray restarts those that die. They end with
    `AgentPool.shutdown`, or with this driver unless they are detached.

    Args:
        devices: "auto": one agent per GPU of every node, and one CPU agent on a node without. Or a list for this node, such
            as ``["cpu"] * 4`` or ``["cuda:0", "cuda:1"]``.
        namespace: name of the pool; pools of different names know nothing of one another. By default, and for workers, it is what
            ETHA_RAY_NAMESPACE says, "default" where that is unset.
        store: where agents meet: "gcs" (Ray's own) or a URL that `etha_ray.create_store` takes.
        memory_budget: bytes of staging memory that transfers between hosts may have on each agent, over all under way.
        integrity: "auto" compares the checksums of what comes from other hosts with those of what was sent, "on" also looks at what is
            copied within a host, "off" does neither. It is each agent's choice for what it receives.
        detached: they outlive this driver, and end with `AgentPool.shutdown` (`find_pool` finds them), or with the cluster.

    Returns:
        The pool; ranks count from 0, by node, then device.

    Raises:
        ConfigError: (a ValueError) a device, namespace or store URL is not understood.
        AgentBusyError: a pool of this name runs already, in this cluster or on these paths.
        AgentFailedError: an agent did not start; the message has its error.
    """
    namespace = _pool_name(namespace)
    check_integrity(integrity)
    url = "gcs://" if store == "gcs" else store
    if not ray.is_initialized():
        ray.init(log_to_driver=False)
    places = _places(devices)
    _refuse_second_pool(namespace, len(places))
    if url == "gcs://":
        _on_cluster(_empty_store, namespace)
    neighbours: dict[str, list[int]] = {}
    for rank, (node_id, _) in enumerate(places):
        neighbours.setdefault(node_id, []).append(rank)
    remote = ray.remote(AgentActor)
    actors = [
        remote.options(
            name=_actor_name(namespace, rank),
            namespace=RAY_NAMESPACE,
            num_cpus=0,
            num_gpus=0,
            max_restarts=-1,
            max_concurrency=4,
            lifetime="detached" if detached else None,
            scheduling_strategy=NodeAffinitySchedulingStrategy(node_id, soft=False),
        ).remote(rank, namespace, device, url, neighbours[node_id], len(places), memory_budget, integrity)
        for rank, (node_id, device) in enumerate(places)
    ]
    entries = [_entry(rank, node_id, device, namespace) for rank, (node_id, device) in enumerate(places)]
    pool = AgentPool(namespace, entries, actors)
    _wait_until_started(pool, actors)
    _on_cluster(write_pool, namespace, entries)
    return pool


def connect(address: str) -> None:
    """Connect this process to the Ray cluster at ``address`` ("auto", HOST:PORT, ray://HOST:PORT), unless it is connected already.

    Raises:
        AgentNotFoundError: (a ConnectionError) no Ray cluster answers there.
    """
    if ray.is_initialized():
        return
    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise AgentNotFoundError(
            f"no Ray cluster answers at {address!r}: {error}. Start one (`ray start --head`), or give the address of one that runs"
        ) from error


def find_pool(namespace: str | None = None) -> AgentPool:
    """The pool of this name (by default as in `launch_agents`) on the Ray cluster, whoever started it.

    Raises:
        AgentNotFoundError: (a ConnectionError) there is none.
    """
    namespace = _pool_name(namespace)
    found = []
    for entry in _on_cluster(read_pool, namespace):
        try:
            found.append((entry, ray.get_actor(_actor_name(namespace, entry.rank), namespace=RAY_NAMESPACE)))
        except ValueError:  # its driver was killed, or another ends it just now
            continue
    if not found:
        raise AgentNotFoundError(f"no pool named {namespace!r} runs on this Ray cluster: start one with `etha-ray up`")
    return AgentPool(namespace, [entry for entry, _ in found], [actor for _, actor in found])


def seen_agents(namespace: str, timeout: float = 5.0) -> list[SeenAgent]:
    """What the agents of a pool of this Ray cluster show; those that do not say so within ``timeout`` seconds are unreachable."""
    calls: dict[Any, PoolEntry] = {}
    found = []
    for entry in _on_cluster(read_pool, namespace):
        try:
            actor = ray.get_actor(_actor_name(namespace, entry.rank), namespace=RAY_NAMESPACE)
        except ValueError:
            found.append(_unreachable(entry))
        else:
            calls[actor.inspect.remote()] = entry
    answered = set(ray.wait(list(calls), num_returns=len(calls), timeout=timeout)[0]) if calls else set()
    for call, entry in calls.items():
        try:
            found.append(decode_seen(ray.get(call)) if call in answered else _unreachable(entry))
        except (ray.exceptions.RayError, msgspec.DecodeError) as error:
            logger.warning("agent %d does not show what it does: %s", entry.rank, error)
            found.append(_unreachable(entry))
    return found


def _on_cluster(call: Callable[..., _T], *args: Any) -> _T:
    """The call's result, made where Ray's GCS can be reached: here, or in a task if this driver is a Ray Client (ray://)."""
    if not ray.util.client.ray.is_connected():  # type: ignore[no-untyped-call]
        return call(*args)
    result: _T = ray.get(ray.remote(call).options(num_cpus=0).remote(*args))
    return result


def _empty_store(namespace: str) -> None:
    """Remove what a pool that was killed left in a cluster that lives on."""
    store = create_store("gcs://", namespace=namespace)
    store.delete_prefix("")
    store.close(cleanup=False)


def _unreachable(entry: PoolEntry) -> SeenAgent:
    return SeenAgent(entry.rank, "unreachable", time.time(), (entry.command_queue_path, entry.state_path))


def _nodes() -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call]
    return [node for node in found if node["Alive"]]


def _pool_name(namespace: str | None) -> str:
    return worker_environment().namespace if namespace is None else check_name("namespace", namespace)


def _actor_name(namespace: str, rank: int) -> str:
    return f"{namespace}/agent{rank}"


def _entry(rank: int, node_id: str, device: str, namespace: str) -> PoolEntry:
    paths = agent_paths(rank, namespace)
    return PoolEntry(rank=rank, node_id=node_id, device=device, command_queue_path=paths.command_queue, state_path=paths.state)


def _places(devices: str | Sequence[str]) -> list[tuple[str, str]]:
    """(node id, device) of each agent, in the order of ranks."""
    if isinstance(devices, str):
        if devices != "auto":
            raise ConfigError(f'devices {devices!r} is not understood: give "auto" or a list such as ["cpu", "cuda:0"]')
        nodes = sorted(_nodes(), key=lambda node: (node["NodeManagerAddress"], node["NodeID"]))
        return [
            (node["NodeID"], device)
            for node in nodes
            for device in ([f"cuda:{index}" for index in range(int(node["Resources"].get("GPU", 0)))] or ["cpu"])
        ]
    if not devices:
        raise ConfigError('devices is an empty list: give "auto" or a list such as ["cpu", "cuda:0"]')
    for device in devices:
        kind, _, number = device.partition(":")
        if device != "cpu" and not (kind == "cuda" and number.isdigit()):
            raise ConfigError(f'device {device!r} is not understood: give "cpu" or "cuda:0", "cuda:1", ...')
    gpus = [device for device in devices if device != "cpu"]
    if len(set(gpus)) < len(gpus):
        raise ConfigError(f"devices {list(devices)} name a GPU twice: one agent serves all workers of a GPU")
    node_id = ray.get_runtime_context().get_node_id()
    return [(node_id, device) for device in devices]


def _refuse_second_pool(namespace: str, count: int) -> None:
    for rank in range(count):
        try:
            ray.get_actor(_actor_name(namespace, rank), namespace=RAY_NAMESPACE)
        except ValueError:
            continue
        raise AgentBusyError(
            f"a pool named {namespace!r} runs already on this Ray cluster: shut it down first, or give this one another namespace"
        )


def _wait_until_started(pool: AgentPool, actors: Sequence[Any]) -> None:
    calls = [actor.health.remote() for actor in actors]
    try:
        ray.get(calls, timeout=_START_TIMEOUT)
    except ray.exceptions.RayError as error:
        pool.shutdown()
        # Of an actor that could not be made Ray gives the error as text.
        refusal = re.search(r"etha_ray\.errors\.(AgentBusyError|ConfigError): (.*)", str(error))
        if refusal is not None:
            raise error_class(refusal[1])(refusal[2]) from error
        raise AgentFailedError(f"the agents of pool {pool.namespace!r} did not start: {error}") from error


def _succeeded(call: Any) -> bool:
    try:
        ray.get(call)
    except ray.exceptions.RayError as error:
        logger.warning("an agent did not shut down by itself: %s", error)
        return False
    return True


def _clean_nodes(entries: Sequence[PoolEntry]) -> None:
    """Remove the files of these agents on the nodes that still live."""
    alive = {node["NodeID"] for node in _nodes()}
    remote = ray.remote(_clean)
    by_node: dict[str, list[AgentPaths]] = {}
    for entry in entries:
        by_node.setdefault(entry.node_id, []).append(AgentPaths(entry.command_queue_path, entry.state_path))
    calls = [
        remote.options(num_cpus=0, scheduling_strategy=NodeAffinitySchedulingStrategy(node_id, soft=False)).remote(paths)
        for node_id, paths in by_node.items()
        if node_id in alive
    ]
    ray.wait(calls, num_returns=len(calls), timeout=_STOP_TIMEOUT)


def _clean(paths: list[AgentPaths]) -> None:
    """Remove the files of killed agents, whose processes may take a moment to end."""
    deadline = time.monotonic() + _STOP_TIMEOUT / 2
    for each in paths:
        while not remove_files(each) and time.monotonic() < deadline:
            time.sleep(0.05)
