"""Agents that take one another for agents of other hosts: what is lost with a connection, and what is left when one ends."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import msgspec
import pytest
import torch

from etha_ray.config import AgentPaths
from etha_ray.errors import BatchTornError, ConfigError, PeerLostError, StoreError
from etha_ray.kvstore import MemoryStore
from etha_ray.tensor_bus import links, members, ways
from etha_ray.tensor_bus.agent import TensorBusAgent
from etha_ray.tensor_bus.batch_handler import BatchHandler
from etha_ray.tensor_bus.messages import DataRevoked, Message, encode_command
from etha_ray.tensor_bus.network import AgentNetwork, address_towards
from etha_ray.tensor_bus.records import AgentRecord, agent_key
from etha_ray.tensor_bus.state_file import StateFile
from etha_ray.tensor_bus.watch import AgentWatch
from etha_ray.testing import eventually, together
from tests.tensor_bus.cluster import LONG, free_port, local_cluster, registered
from tests.tensor_bus.far import Agents

Batch = tuple[BatchHandler, BatchHandler, torch.Tensor, torch.Tensor]


@pytest.fixture
def far(monkeypatch: pytest.MonkeyPatch) -> None:
    """Agents here are as on machines cloned from one: they have one host's identity, and share no memory."""
    for module in (links, members, ways):
        monkeypatch.setattr(module, "shares_memory", lambda agent: False)


@pytest.fixture
def cluster(far: None) -> Iterator[Agents]:
    with contextlib.closing(Agents("auto")) as cluster:
        yield cluster


def _threads() -> set[threading.Thread]:
    return {thread for thread in threading.enumerate() if thread.name.startswith("etha-ray")}


def _send(batch: Batch) -> None:
    one, two, source, target = batch
    for result in together(lambda: one.transfer("send", blocking=True, timeout=LONG), lambda: two.transfer("recv", True, LONG)):
        assert not isinstance(result, BaseException), result
    assert torch.equal(source, target)


def test_a_batch_between_hosts_leaves_nothing_behind(far: None) -> None:
    before = _threads()
    with contextlib.closing(Agents("auto")) as cluster:
        batch = cluster.batch()
        _send(batch)
        assert _threads() - before  # one of an earlier test may be ending
    eventually(lambda: _threads() <= before)


@pytest.mark.parametrize("whose", [0, 1], ids=["the sender's", "the receiver's"])
@pytest.mark.parametrize("waiting", ["send", "recv"])
def test_one_lost_channel_loses_the_batch_on_both_sides(cluster: Agents, whose: int, waiting: Any) -> None:
    batch = cluster.batch()
    _send(batch)
    # Both wait, for the same direction: agents register the batch again by themselves, and who calls after that would know of no loss.
    waits = [handler.transfer(waiting) for handler in batch[:2]]
    for handler in batch[:2]:
        handler.client.ping(LONG)  # its agent has taken that
    (link,) = cluster.agents[whose]._service._links._links.values()
    assert isinstance(link, links._ChannelLink)
    assert link._channel._connection is not None
    link._channel._connection.shutdown()
    for each in waits:
        with pytest.raises(PeerLostError):
            each.result(LONG)
    for handler in batch[:2]:
        handler.close()
    again = cluster.batch(batch_id="again")
    _send(again)


def test_an_agent_that_cannot_be_reached_learns_that_it_is_lost(cluster: Agents, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: Any) -> Any:
        raise PeerLostError("nobody listens there")

    assert cluster.agents[0]._network is not None
    monkeypatch.setattr(cluster.agents[0]._network, "connect", refused)
    monkeypatch.setattr(links, "_ONE_WAY", 1.0)
    one, two, _, _ = cluster.batch()
    for handler, direction in ((two, "recv"), (one, "send")):
        with pytest.raises(PeerLostError):
            handler.transfer(direction, blocking=True, timeout=LONG)  # type: ignore[arg-type]


class _Heard:
    """An agent's place in the network, and what it hears there."""

    def __init__(self, store: MemoryStore, incarnation: str) -> None:
        self.network = AgentNetwork(store, "127.0.0.1", incarnation)
        self.left: list[str] = []
        self.messages: list[Message] = []
        self.record = AgentRecord(1, incarnation, 1, 0.0, "far", "far", "", "", "", "", "cpu", self.network.address)

    def serve(self) -> None:
        self.network.serve(self.messages.append, lambda incarnation, reason: self.left.append(incarnation))


@pytest.fixture
def places() -> Iterator[tuple[_Heard, _Heard]]:
    with contextlib.ExitStack() as stack:
        store = stack.enter_context(contextlib.closing(MemoryStore()))
        one, two = _Heard(store, "one"), _Heard(store, "two")
        for place in (one, two):
            stack.callback(place.network.close)
        yield one, two


def test_an_agent_that_connects_again_was_lost_in_between(places: tuple[_Heard, _Heard]) -> None:
    one, two = places
    two.serve()
    message = DataRevoked(batch_id="batch", source="source", target="target", sequence=1)
    channels = []
    for number in range(2):
        channels.append(one.network.connect(two.record, lambda reason: None))
        channels[-1].send(encode_command(message))
        eventually(lambda number=number: len(two.messages) > number)  # type: ignore[misc]
        assert two.network.hears("one")
        assert two.left == ["one"] * number
    channels[0].close()
    assert two.network.hears("one")
    channels[1].close()
    eventually(lambda: two.left == ["one", "one"])
    assert not two.network.hears("one")


def test_who_is_hung_up_on_hears_of_it(places: tuple[_Heard, _Heard]) -> None:
    one, two = places
    two.serve()
    lost = threading.Event()
    channel = one.network.connect(two.record, lambda reason: lost.set())
    eventually(lambda: two.network.hears("one"))
    caller = two.network.hang_up("one")
    assert caller is not None
    caller.close()
    assert lost.wait(LONG)
    assert two.left == []
    channel.close()


def test_an_agent_that_is_starting_up_takes_no_messages(places: tuple[_Heard, _Heard]) -> None:
    one, two = places
    lost = threading.Event()
    channel = one.network.connect(two.record, lambda reason: lost.set())
    assert lost.wait(LONG)
    channel.close()


def test_an_address_that_does_not_answer_fails_the_registration_on_both_sides(cluster: Agents) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        pairing = cluster.agents[0]._service._pairing
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        pairing._record = msgspec.structs.replace(pairing._record, address=address)
        one, two = cluster.pair()
        results = together(
            lambda: one.register_tensors("batch", [(torch.ones(3), "pair")], timeout=LONG),
            lambda: two.register_tensors("batch", [(torch.ones(3), "pair")], timeout=LONG),
        )
    assert [type(result) for result in results] == [PeerLostError, PeerLostError]
    assert address in str(results[1]), "which of the two cannot reach the other, and where"


def test_an_address_where_nobody_listens_is_named(cluster: Agents) -> None:
    address = f"127.0.0.1:{free_port()}"
    pairing = cluster.agents[0]._service._pairing
    pairing._record = msgspec.structs.replace(pairing._record, address=address)
    one, two = cluster.pair()
    results = together(
        lambda: one.register_tensors("batch", [(torch.ones(3), "pair")], timeout=LONG),
        lambda: two.register_tensors("batch", [(torch.ones(3), "pair")], timeout=LONG),
    )
    assert isinstance(results[1], PeerLostError)
    assert f"cannot reach the agent at {address}: Connection refused" in str(results[1])


def test_a_bucket_size_that_the_network_does_not_take_is_named(cluster: Agents) -> None:
    one, two = cluster.pair()
    results = together(
        lambda: one.register_tensors("batch", [(torch.ones(3), "pair")], bucket_size=100, timeout=LONG),
        lambda: two.register_tensors("batch", [(torch.ones(3), "pair")], bucket_size=100, timeout=LONG),
    )
    for result in results:
        assert isinstance(result, ConfigError)
        assert "bucket_size of 100 bytes" in str(result)


def test_a_store_that_is_away_keeps_nobodys_memory(cluster: Agents, monkeypatch: pytest.MonkeyPatch) -> None:
    one, two, _, _ = cluster.batch()

    def away(*_: Any, **__: Any) -> bool:
        raise StoreError("the store is away")

    with monkeypatch.context() as patch:
        patch.setattr(cluster.store, "delete", away)
        one.close()
        two.close()
    for agent in cluster.agents.values():
        assert agent._network is not None
        assert agent._network.transport._exports._exports == {}
    for key in cluster.store.list("batch/"):
        cluster.store.delete(key)


def test_an_agent_whose_lease_was_lost_takes_another_and_gives_it_back(cluster: Agents) -> None:
    agent, key = cluster.agents[0], agent_key(0)
    for _ in range(2):
        lost = agent._presence.lease
        lost.close()
        eventually(lambda lost=lost: agent._presence.lease is not lost)
        assert cluster.store.exists(key)
    agent.stop()
    assert not cluster.store.exists(key)


def test_the_memory_budget_is_the_users(tmp_path: Path) -> None:
    paths = AgentPaths(f"{tmp_path}/c.lmdb", f"{tmp_path}/s.lmdb")
    with contextlib.closing(MemoryStore()) as store, pytest.raises(ConfigError, match="memory budget 100"):
        TensorBusAgent(0, store, paths=paths, host="127.0.0.1", memory_budget=100)


@pytest.mark.parametrize("budgets", [(8192, 3 << 20), (3 << 20, 8192)], ids=["the sender's", "the receiver's"])
def test_a_budget_that_is_smaller_than_a_tensor_is_kept_to(far: None, budgets: tuple[int, int]) -> None:
    with contextlib.closing(Agents("auto", budgets=budgets)) as cluster:
        source = torch.arange(600.0).repeat(50, 1).t()  # its columns are contiguous and the target's rows, so all is staged
        _send(cluster.batch(source, torch.zeros(600, 50)))
        for agent, budget in zip(cluster.agents.values(), budgets, strict=True):
            assert agent._network is not None
            assert agent._network.transport.staging_peak <= budget // 2


@pytest.mark.parametrize("host", ["0.0.0.0", "::"])
def test_an_address_that_nobody_can_connect_to_is_refused(host: str) -> None:
    with contextlib.closing(MemoryStore()) as store, pytest.raises(ConfigError, match="no address that others could connect to"):
        AgentNetwork(store, host, "incarnation")


@pytest.mark.parametrize("url", ["gcs", "tcp://127.0.0.1:1", "tcp://[::1]:1?master=0", "etcd://user:pass@127.0.0.1:1,far.example:2"])
def test_the_way_to_a_store_on_this_host_is_no_address_for_others(url: str) -> None:
    assert address_towards(url) is None


def test_who_is_found_dead_while_it_is_told_is_reported_after() -> None:
    agent = AgentRecord(1, "one", 1, 0.0, "far", "far", "", "", "", "", "cpu")
    own = msgspec.structs.replace(agent, rank=0, incarnation="own")
    posted: list[Callable[[], None]] = []
    lost: list[str] = []
    links_ = links.Links(own, None, lambda message: None, posted.append, lambda incarnation, reason: lost.append(incarnation))
    links_.tell(agent, DataRevoked(batch_id="batch", source="source", target="target", sequence=1))
    assert lost == []
    for callback in posted:
        callback()
    assert lost == ["one"]
    links_.close()


def test_what_is_read_beside_an_agent_that_stands_still_is_not_certain(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its workers, who look more often, may find that out before this agent does, and write."""
    with local_cluster() as cluster:
        one, two = cluster.pair("p")
        source, target = torch.ones(3), torch.zeros(3)
        handlers = registered(one, two, "p", source, target)
        (link,) = cluster.agents[1]._service._links._links.values()
        assert isinstance(link, links._QueueLink)
        monkeypatch.setattr(type(link._watch), "silence", property(lambda watch: links._SURE + 0.1))
        sent = handlers[0].transfer("send")
        with pytest.raises(BatchTornError, match=r"agent 0 has not answered for 4\.1 s"):
            handlers[1].transfer("recv").result(LONG)
        monkeypatch.undo()
        handlers[1].transfer("recv")
        handlers[0].wait_ready(LONG)
        sent.acquire(LONG)
        assert torch.equal(target, source)


class _Heart:
    beat = 1.0

    def heartbeat(self) -> float:
        return self.beat


def test_silence_is_counted_from_the_last_beat_that_was_seen() -> None:
    heart = _Heart()
    watch = AgentWatch(cast(StateFile, heart), AgentRecord(1, "one", 1, 0.0, "far", "far", "", "", "", "", "cpu"))
    watch._beat_seen -= 3.0
    assert 3.0 <= watch.silence < LONG
    heart.beat = 2.0
    assert watch.silence == 0.0
    heart.beat = 1.0
    watch._looked -= 10.0  # nobody has looked for long: this process may have stood still together with that agent
    assert watch.silence == 0.0
