"""Agents on threads of the test's process, and clients of them: a tensor bus in milliseconds, without Ray."""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Iterator, Mapping, Sequence
from types import TracebackType
from typing import TypeVar

from etha_ray.config import AgentPaths, agent_paths, worker_variables
from etha_ray.kvstore import MemoryStore
from etha_ray.tensor_bus.agent import TensorBusAgent
from etha_ray.tensor_bus.client import TensorBusClient
from etha_ray.testing.calls import PATIENCE, succeed
from etha_ray.transport import OneSidedTransport

_T = TypeVar("_T", bound="TensorBus")


def fresh_namespace() -> str:
    """A namespace that nobody else uses, so that tests run side by side."""
    return f"test-{os.getpid()}-{secrets.token_hex(4)}"


class TensorBus:
    """CPU agents on threads of this process. Workers are its threads, or other processes of this host.

    Args:
        agents: how many, or their ranks.
        threads: threads that copy, in each.
        mapped: what moves bytes in all of them; by default what agents take.

    Attributes:
        namespace: the pool's name, which nobody else has.
        store: where the agents meet, a `MemoryStore`.
        ranks: the agents' ranks.
        paths: each agent's files, by rank.
        agents: the agents themselves, by rank.
        clients: what `client` made.
    """

    def __init__(self, agents: int | Sequence[int] = 2, *, threads: int = 1, mapped: OneSidedTransport | None = None) -> None:
        self.namespace = fresh_namespace()
        self.store = MemoryStore(self.namespace)
        self.ranks = list(range(agents)) if isinstance(agents, int) else list(agents)
        self.paths: dict[int, AgentPaths] = {rank: agent_paths(rank, self.namespace) for rank in self.ranks}
        self.agents: dict[int, TensorBusAgent] = {}
        self.clients: list[TensorBusClient] = []
        try:
            for rank in self.ranks:
                self.agents[rank] = self.start_agent(rank, mapped, threads)
        except BaseException:
            self.close()
            raise

    def start_agent(self, rank: int, mapped: OneSidedTransport | None = None, threads: int = 1) -> TensorBusAgent:
        """An agent with the files and the place of ``rank``, whose agent has been stopped."""
        agent = TensorBusAgent(rank, self.store, paths=self.paths[rank], threads=threads, mapped=mapped)
        agent.start()
        return agent

    def client(self, rank: int = 0) -> TensorBusClient:
        """A client of the agent ``rank``, as one worker beside it has; closed with the bus."""
        client = TensorBusClient(rank, self.paths[rank].command_queue, self.paths[rank].state, PATIENCE)
        self.clients.append(client)
        return client

    def environment(self, rank: int | None = None) -> dict[str, str]:
        """This process's environment as a worker process needs it: `bootstrap_client`, `publish` and `pull` find the agent ``rank`` there.

        Without a rank they take AGENT_RANK_OFFSET and LOCAL_RANK, which torchrun sets.
        """
        variables = worker_variables(self.namespace, rank)
        others = {name: value for name, value in os.environ.items() if name not in variables}
        return {**others, **{name: value for name, value in variables.items() if value is not None}}

    @contextlib.contextmanager
    def worker(self, rank: int = 0) -> Iterator[None]:
        """Within the block `bootstrap_client`, `publish` and `pull` of this process find the agent ``rank``; on all its threads."""
        with environment(worker_variables(self.namespace, rank)):
            yield

    def stop(self) -> None:
        """End clients and agents; nothing of them is left on disk or in shared memory."""
        succeed(*[client.close for client in self.clients])
        succeed(*[agent.stop for agent in self.agents.values()])

    def close(self) -> None:
        """`stop`, and forget what is in the store."""
        self.stop()
        self.store.close()

    def __enter__(self: _T) -> _T:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        # What made the block end says more than what follows from it.
        with contextlib.nullcontext() if error is None else contextlib.suppress(Exception):
            self.close()

    def __repr__(self) -> str:
        return f"TensorBus({self.ranks}, namespace={self.namespace!r})"


@contextlib.contextmanager
def environment(variables: Mapping[str, str | None]) -> Iterator[None]:
    """Within the block this process's environment has these variables; None takes one away."""
    before = {name: os.environ.get(name) for name in variables}
    _put(variables)
    try:
        yield
    finally:
        _put(before)


def _put(variables: Mapping[str, str | None]) -> None:
    for name, value in variables.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
