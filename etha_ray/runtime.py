"""Agents as a Ray application: one actor per device, pinned to it.

Ray places agents, restarts them and tells who they are; it is not on the path of a transfer. In Ray's local_mode (up to 2.52) an actor is
an object of this process, called at once on the caller's thread: the agents' loops, which have threads of their own, run there as well.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any

import msgspec
import ray

from etha_ray.agent_actor import entry_of, find_actor, start_actors, wait_until_started
from etha_ray.config import check_integrity, check_name, check_transport, worker_environment
from etha_ray.errors import AgentBusyError, AgentNotFoundError
from etha_ray.kvstore import create_store
from etha_ray.kvstore.url import check_store_url
from etha_ray.net import no_listener
from etha_ray.ray_nodes import START_TIMEOUT, STOP_TIMEOUT, clean_nodes, live_nodes, on_cluster, places
from etha_ray.tensor_bus.inspection import SeenAgent, decode_seen
from etha_ray.tensor_bus.ray_lookup import (
    PoolEntry,
    PoolSettings,
    encoded,
    extend_pool,
    pool_entries,
    pool_settings,
    stored_pool,
    withdraw_pool,
    write_pool,
)
from etha_ray.transport.network import DEFAULT_MEMORY_BUDGET

logger = logging.getLogger(__name__)

_NO_CLUSTER = "no Ray cluster answers at {!r}: {}. Start one (`ray start --head`), or give the address of one that runs"

_RESTART_PAUSE = 0.2
"""Seconds after which an agent that Ray restarts is told again to stop."""


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
        """The agents' ranks: by node, then device, and then those that `refresh` added."""
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

    def refresh(self) -> list[int]:
        """Start agents on the nodes that have joined the cluster since: one per GPU, or a CPU agent on a node without.

        Agents that run are not touched, nor is what they do. Only pools that were launched with "auto" grow. A node that comes back is
        a new one to Ray, so it gets agents of new ranks; those that went with it stay unreachable.

        Returns:
            The new agents' ranks, by node, then device; they follow those that there were. Empty when there is nothing new.

        Raises:
            AgentNotFoundError: (a ConnectionError) the pool was shut down.
            AgentBusyError: somebody else refreshes it just now.
            AgentFailedError: an agent did not start; then none was added.
        """
        with self._lock:
            table, stored = on_cluster(stored_pool, self.namespace)
            if self._down or stored is None:
                raise AgentNotFoundError(f"pool {self.namespace!r} was shut down: launch another one")
            known, settings = pool_entries(self.namespace, table), pool_settings(self.namespace, stored)
            self._adopt(known)
            served = {entry.node_id for entry in known}
            joined = [place for place in (places("auto") if settings.auto else []) if place[0] not in served]
            first = max(entry.rank for entry in known) + 1
            new = [entry_of(self.namespace, rank, node_id, device) for rank, (node_id, device) in enumerate(joined, first)]
            actors = start_actors(self.namespace, new, settings)
            _wait_or_end(self.namespace, new, actors)
            if new:
                on_cluster(extend_pool, self.namespace, encoded(new))
            self._entries, self._actors = (*self._entries, *new), (*self._actors, *actors)
            return [entry.rank for entry in new]

    def _adopt(self, known: Sequence[PoolEntry]) -> None:
        """Take up agents that another process's pool of this name has added."""
        mine = set(self.ranks)
        found = [(entry, find_actor(self.namespace, entry.rank)) for entry in known if entry.rank not in mine]
        others = [(entry, actor) for entry, actor in found if actor is not None]
        self._entries = (*self._entries, *(entry for entry, _ in others))
        self._actors = (*self._actors, *(actor for _, actor in others))

    def shutdown(self) -> None:
        """End the agents and remove what they, or ones that were killed, left on their nodes. May be called more than once."""
        with self._lock:
            if self._down:
                return
            self._down = True
        on_cluster(withdraw_pool, self.namespace)
        _end(self._entries, self._actors)

    def __enter__(self) -> AgentPool:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.shutdown()

    def __repr__(self) -> str:
        devices = ", ".join(f"{entry.rank}: {entry.device}" for entry in self._entries)
        return f"AgentPool({self.namespace!r}, {{{devices}}}{', shut down' if self._down else ''})"


def launch_agents(
    devices: str | Sequence[str] | Mapping[str, Sequence[str]] = "auto",
    *,
    namespace: str | None = None,
    store: str = "gcs",
    memory_budget: int = DEFAULT_MEMORY_BUDGET,
    integrity: str = "auto",
    transport: str = "auto",
    detached: bool = False,
) -> AgentPool:
    """Start agents on the Ray cluster (on a Ray of this process's own if it has none yet) and wait until they serve.

    The driver may be on the cluster or reach it as a Ray Client (``ray://``); this node is the head then.

    Agents take no CPU and no GPU share from other actors, and Ray restarts those that die. They end with
    `AgentPool.shutdown`, or with this driver unless they are detached.

    Args:
        devices: "auto": one agent per GPU of every node, and one CPU agent on a node without. Or a list for this node, such
            as ``["cpu"] * 4`` or ``["cuda:0", "cuda:1"]``. Or such a list for each of several nodes, by the ids of ``ray.nodes()``.
        namespace: name of the pool; pools of different names know nothing of one another. By default, and for workers, it is what
            ETHA_RAY_NAMESPACE says, "default" where that is unset.
        store: where agents meet: "gcs" (Ray's own) or a URL that `etha_ray.create_store` takes.
        memory_budget: bytes of staging memory that transfers between hosts may have on each agent, over all under way.
        integrity: "auto" compares the checksums of what comes from other hosts with those of what was sent, "on" also looks at what is
            copied within a host, "off" does neither. It is each agent's choice for what it receives.
        transport: how agents read what others hold. "auto": mapped from memory where they share it, else over the network. "mapped", "nccl"
            or "tcp" are that way alone, also within one host: to measure it, or to test.
        detached: they outlive this driver, and end with `AgentPool.shutdown` (`find_pool` finds them), or with the cluster.

    Returns:
        The pool; ranks count from 0, by node, then device: as "auto" finds them, by address, or as they are given.

    Raises:
        ConfigError: (a ValueError) a device, namespace, store URL or setting is not understood.
        AgentBusyError: a pool of this name runs already, in this cluster or on these paths.
        AgentFailedError: an agent did not start; the message has its error.
    """
    namespace = _pool_name(namespace)
    check_integrity(integrity)
    check_transport(transport)
    url = check_store_url("gcs://" if store == "gcs" else store)
    if not ray.is_initialized():
        ray.init(log_to_driver=False)
    placed = places(devices)
    _refuse_second_pool(namespace, len(placed))
    if url == "gcs://":
        on_cluster(_empty_store, namespace)
    settings = PoolSettings(devices == "auto", url, memory_budget, integrity, transport, detached)
    entries = [entry_of(namespace, rank, node_id, device) for rank, (node_id, device) in enumerate(placed)]
    actors = start_actors(namespace, entries, settings)
    _wait_or_end(namespace, entries, actors)
    on_cluster(write_pool, namespace, encoded(entries), encoded(settings))
    return AgentPool(namespace, entries, actors)


def connect(address: str) -> None:
    """Connect this process to the Ray cluster at ``address`` ("auto", HOST:PORT, ray://HOST:PORT), unless it is connected already.

    Raises:
        AgentNotFoundError: (a ConnectionError) no Ray cluster answers there.
    """
    if ray.is_initialized():
        return
    why = no_listener(os.environ.get("RAY_ADDRESS", address) if address == "auto" else address)
    if why:  # Ray itself would try for minutes
        raise AgentNotFoundError(_NO_CLUSTER.format(address, why))
    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise AgentNotFoundError(_NO_CLUSTER.format(address, error)) from error


def find_pool(namespace: str | None = None) -> AgentPool:
    """The pool of this name (by default as in `launch_agents`) on the Ray cluster, whoever started it.

    Raises:
        AgentNotFoundError: (a ConnectionError) there is none.
    """
    namespace = _pool_name(namespace)
    entries = pool_entries(namespace, on_cluster(stored_pool, namespace)[0])
    found = [(entry, actor) for entry in entries if (actor := find_actor(namespace, entry.rank)) is not None]
    if not found:
        raise AgentNotFoundError(f"no pool named {namespace!r} runs on this Ray cluster: start one with `etha-ray up`")
    return AgentPool(namespace, [entry for entry, _ in found], [actor for _, actor in found])


def seen_agents(namespace: str, timeout: float = 5.0) -> list[SeenAgent]:
    """What the agents of a pool of this Ray cluster show; those that do not say so within ``timeout`` seconds are unreachable."""
    calls: dict[Any, PoolEntry] = {}
    found = []
    for entry in pool_entries(namespace, on_cluster(stored_pool, namespace)[0]):
        actor = find_actor(namespace, entry.rank)
        if actor is None:
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


def _empty_store(namespace: str) -> None:
    """Remove what a pool that was killed left in a cluster that lives on."""
    store = create_store("gcs://", namespace=namespace)
    store.delete_prefix("")
    store.close(cleanup=False)


def _unreachable(entry: PoolEntry) -> SeenAgent:
    return SeenAgent(entry.rank, "unreachable", time.time(), (entry.command_queue_path, entry.state_path))


def _pool_name(namespace: str | None) -> str:
    return worker_environment().namespace if namespace is None else check_name("namespace", namespace)


def _refuse_second_pool(namespace: str, count: int) -> None:
    if any(find_actor(namespace, rank) is not None for rank in range(count)):
        raise AgentBusyError(
            f"a pool named {namespace!r} runs already on this Ray cluster: shut it down first, or give this one another namespace"
        )


def _wait_or_end(namespace: str, entries: Sequence[PoolEntry], actors: Sequence[Any]) -> None:
    """Wait until these agents serve; if one does not, end them all, and raise what it raised."""
    try:
        wait_until_started(namespace, actors)
    except Exception:
        _end(entries, actors)
        raise


def _end(entries: Sequence[PoolEntry], actors: Sequence[Any]) -> None:
    """End these agents, and remove what those leave that were killed."""
    killed = _stop(list(zip(entries, actors, strict=True)))
    for actor in actors:
        ray.kill(actor, no_restart=True)
    clean_nodes(killed)


def _stop(agents: list[tuple[PoolEntry, Any]]) -> list[PoolEntry]:
    """Have these agents end by themselves; those that did not.

    One that died is waited for until Ray has it running again: killed while it starts, it could leave its files after the cleaning.
    """
    deadline, patience = time.monotonic() + STOP_TIMEOUT, time.monotonic() + START_TIMEOUT
    killed: list[PoolEntry] = []
    while agents:
        calls = [actor.stop.remote() for _, actor in agents]
        ended = set(ray.wait(calls, num_returns=len(calls), timeout=max(0.0, deadline - time.monotonic()))[0])
        restarting = []
        for (entry, actor), call in zip(agents, calls, strict=True):
            try:
                if call in ended:
                    ray.get(call)
                else:
                    killed.append(entry)
            except ray.exceptions.ActorUnavailableError:
                restarting.append((entry, actor))
            except ray.exceptions.RayError as error:
                logger.warning("agent %d did not shut down by itself: %s", entry.rank, error)
                killed.append(entry)
        alive = {node["NodeID"] for node in live_nodes()} if restarting and time.monotonic() < patience else set()
        agents = [(entry, actor) for entry, actor in restarting if entry.node_id in alive]
        killed += [entry for entry, _ in restarting if entry.node_id not in alive]
        if agents:
            time.sleep(_RESTART_PAUSE)
            deadline = min(time.monotonic() + STOP_TIMEOUT, patience)
    return killed
