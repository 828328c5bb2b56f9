"""A bit that turns on its way from one worker to another: what the receiver is told, and that receiving again is right."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from etha_ray.config import AgentPaths
from etha_ray.errors import ConfigError, IntegrityError
from etha_ray.kvstore import MemoryStore
from etha_ray.tensor_bus.agent import TensorBusAgent
from etha_ray.testing import together
from tests.tensor_bus.cluster import LONG, LocalCluster
from tests.tensor_bus.far import Agents, far_agents
from tests.transport.test_integrity import Flipping


def _torn_then_whole(cluster: LocalCluster, turn: Callable[[bool], None], atomic: bool) -> None:
    one, two, source, target = cluster.batch(torch.randn(40_000), torch.zeros(40_000))

    def receive() -> None:
        two.transfer("recv", blocking=True, timeout=LONG, atomic=atomic)

    turn(True)
    sent = one.transfer("send", version=7)
    told = together(receive)[0]
    turn(False)
    assert isinstance(told, IntegrityError), told
    named = ["tensor 0 of batch 'batch'", "a[0] at agent 0", "b[0] at agent 1"]
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
def test_between_hosts_it_is_noticed_by_itself(atomic: bool) -> None:
    with far_agents("auto") as (cluster, relays):

        def turn(on: bool) -> None:
            for relay in relays.values():
                (relay.flip.set if on else relay.flip.clear)()

        _torn_then_whole(cluster, turn, atomic)


@pytest.mark.parametrize("atomic", [False, True], ids=["in place", "atomic"])
def test_within_a_host_it_is_noticed_if_asked_for(atomic: bool) -> None:
    transport = Flipping(1)

    def turn(on: bool) -> None:
        transport.on = on

    with contextlib.closing(Agents("on", transport)) as cluster:
        _torn_then_whole(cluster, turn, atomic)


def _unnoticed(cluster: LocalCluster, turn: Callable[[], None]) -> None:
    one, two, source, target = cluster.batch(torch.randn(40_000), torch.zeros(40_000))
    turn()
    for result in together(lambda: one.transfer("send", blocking=True, timeout=LONG), lambda: two.transfer("recv", True, LONG)):
        assert not isinstance(result, BaseException), result
    assert two.version == 1
    assert (source.view(torch.int32) != target.view(torch.int32)).sum() == 1


def test_between_hosts_nothing_is_compared_where_that_is_off() -> None:
    with far_agents("off") as (cluster, relays):
        _unnoticed(cluster, lambda: [relay.flip.set() for relay in relays.values()] and None)


@pytest.mark.parametrize("setting", ["auto", "off"])
def test_within_a_host_nothing_is_compared_by_itself(setting: str) -> None:
    transport = Flipping(1)
    with contextlib.closing(Agents(setting, transport)) as cluster:
        _unnoticed(cluster, lambda: setattr(transport, "on", True))


def test_an_unknown_setting_is_refused(tmp_path: Path) -> None:
    with contextlib.closing(MemoryStore("integrity")) as store, pytest.raises(ConfigError, match="'always' is unknown: give one of 'auto'"):
        TensorBusAgent(0, store, paths=AgentPaths(f"{tmp_path}/c", f"{tmp_path}/s"), integrity="always")
