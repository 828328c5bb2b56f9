"""A bit that turns on its way from one worker to another: what the receiver is told, and that receiving again is right."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from etha_ray.config import AgentPaths
from etha_ray.errors import ConfigError, IntegrityError
from etha_ray.kvstore import MemoryStore
from etha_ray.net import Address
from etha_ray.tensor_bus import links, members, registered
from etha_ray.tensor_bus.agent import TensorBusAgent
from etha_ray.tensor_bus.network import AgentNetwork
from etha_ray.tensor_bus.records import SECRET_KEY
from etha_ray.testing import together
from etha_ray.transport import OneSidedTransport
from tests.net.pair import Relay
from tests.tensor_bus.cluster import LONG, LocalCluster
from tests.transport.test_integrity import Flipping


class _Agents(LocalCluster):
    """Agents with this setting, which reach one another over TCP if they share no memory."""

    def __init__(self, integrity: str, transport: OneSidedTransport | None = None) -> None:
        self.integrity = integrity
        super().__init__(2, transport=transport)

    def start_agent(self, rank: int, transport: OneSidedTransport | None = None, threads: int = 1) -> TensorBusAgent:
        more = {"paths": self.paths[rank], "threads": threads, "transport": transport, "host": "127.0.0.1", "integrity": self.integrity}
        agent = TensorBusAgent(rank, self.store, **more)  # type: ignore[arg-type]
        agent.start()
        return agent

    def close(self) -> None:
        self.store.delete(SECRET_KEY)
        super().close()


@pytest.fixture
def relays(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Relay]]:
    """Agents are as on two hosts, and every connection goes through one of these."""
    for module in (links, members, registered):
        monkeypatch.setattr(module, "shares_memory", lambda agent: False)
    found: dict[str, Relay] = {}
    own = AgentNetwork.address.fget
    assert own is not None

    def address(network: AgentNetwork) -> str:
        real = own(network)
        if real not in found:
            found[real] = Relay(Address.parse(real))
        return str(found[real].address)

    monkeypatch.setattr(AgentNetwork, "address", property(address))
    yield _Views(found)  # type: ignore[misc]
    for relay in found.values():
        relay.close()


class _Views(list[Relay]):
    def __init__(self, found: dict[str, Relay]) -> None:
        self._found = found

    def __iter__(self) -> Iterator[Relay]:
        return iter(list(self._found.values()))


def _torn_then_whole(cluster: LocalCluster, turn: Callable[[bool], None], atomic: bool) -> None:
    one, two, source, target = cluster.batch(torch.randn(40_000), torch.zeros(40_000))

    def receive() -> None:
        two.transfer("recv", blocking=True, timeout=LONG, atomic=atomic)

    turn(True)
    sent = one.transfer("send", version=7)
    told = together(receive)[0]
    turn(False)
    assert isinstance(told, IntegrityError), told
    named = ["tensor 0 of batch 'batch'", "'a' at agent 0", "'b' at agent 1"]
    assert all(each in str(told) for each in named), str(told)
    assert two.version == 0
    assert two.torn == (() if atomic else (0,))
    if atomic:
        assert not target.any()
    again = together(receive)[0]
    assert again is None, again
    assert sent.result(LONG).version == 7  # type: ignore[attr-defined]
    assert torch.equal(source, target)
    assert (two.version, two.torn) == (7, ())


@pytest.mark.parametrize("atomic", [False, True], ids=["in place", "atomic"])
def test_between_hosts_it_is_noticed_by_itself(relays: list[Relay], atomic: bool) -> None:
    def turn(on: bool) -> None:
        for relay in relays:
            (relay.flip.set if on else relay.flip.clear)()

    with contextlib.closing(_Agents("auto")) as cluster:
        _torn_then_whole(cluster, turn, atomic)


@pytest.mark.parametrize("atomic", [False, True], ids=["in place", "atomic"])
def test_within_a_host_it_is_noticed_if_asked_for(atomic: bool) -> None:
    transport = Flipping(1)

    def turn(on: bool) -> None:
        transport.on = on

    with contextlib.closing(_Agents("on", transport)) as cluster:
        _torn_then_whole(cluster, turn, atomic)


def test_an_unknown_setting_is_refused(tmp_path: Path) -> None:
    with contextlib.closing(MemoryStore("integrity")) as store, pytest.raises(ConfigError, match="'always' is unknown: give one of 'auto'"):
        TensorBusAgent(0, store, paths=AgentPaths(f"{tmp_path}/c", f"{tmp_path}/s"), integrity="always")
