"""Agents of one process that reach one another as those of two hosts do, through relays that can damage what passes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest

from etha_ray.net import Address
from etha_ray.tensor_bus import links, members, ways
from etha_ray.tensor_bus.agent import TensorBusAgent
from etha_ray.tensor_bus.network import AgentNetwork
from etha_ray.tensor_bus.records import SECRET_KEY
from etha_ray.transport import OneSidedTransport
from etha_ray.transport.network import DEFAULT_MEMORY_BUDGET
from tests.net.pair import Relay
from tests.tensor_bus.cluster import LocalCluster


class Agents(LocalCluster):
    """Two agents with these settings, which reach one another over TCP if they share no memory."""

    def __init__(
        self, integrity: str, mapped: OneSidedTransport | None = None, transport: str = "auto", budgets: tuple[int, int] | None = None
    ) -> None:
        self.integrity, self.transport = integrity, transport
        self.budgets = budgets or (DEFAULT_MEMORY_BUDGET,) * 2
        super().__init__(2, mapped=mapped)

    def start_agent(self, rank: int, mapped: OneSidedTransport | None = None, threads: int = 1) -> TensorBusAgent:
        settings = {"host": "127.0.0.1", "integrity": self.integrity, "transport": self.transport}
        settings |= {"memory_budget": self.budgets[rank], "threads": threads, "mapped": mapped}
        agent = TensorBusAgent(rank, self.store, paths=self.paths[rank], **settings)
        agent.start()
        return agent

    def close(self) -> None:
        self.store.delete(SECRET_KEY)
        super().close()


@contextlib.contextmanager
def far_agents(integrity: str) -> Iterator[tuple[Agents, dict[str, Relay]]]:
    """Two agents as on two hosts, and the relays, by the address that they pass on to, through which every connection goes."""
    relays: dict[str, Relay] = {}
    own = AgentNetwork.address.fget
    assert own is not None

    def address(network: AgentNetwork) -> str:
        real = own(network)
        if real not in relays:
            relays[real] = Relay(Address.parse(real))
        return str(relays[real].address)

    with pytest.MonkeyPatch.context() as patch:
        for module in (links, members, ways):
            patch.setattr(module, "shares_memory", lambda agent: False)
        patch.setattr(AgentNetwork, "address", property(address))
        with contextlib.closing(Agents(integrity)) as cluster:
            yield cluster, relays
    for relay in relays.values():
        relay.close()
