"""A store that does not answer: who needs it hears so when its time is up, transfers go on, and all goes on once it is back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from etha_ray.errors import StoreUnavailableError
from etha_ray.testing import eventually, succeed
from etha_ray.testing.etcd_server import EtcdServer
from tests.kvstore.tcp_master import HOST, Master
from tests.standstill import standing_still
from tests.tensor_bus.cluster import LONG, registered
from tests.tensor_bus.silence import crosses, meeting, what_needs_it_says_so_and_transfers_go_on


@contextmanager
def killed(server: EtcdServer) -> Iterator[None]:
    """Until the end of the block."""
    server.kill()
    yield
    server.restart()


@pytest.mark.parametrize("how", ["killed", "stopped"])
def test_etcd(how: str, own_etcd: EtcdServer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    away = killed(own_etcd) if how == "killed" else standing_still(own_etcd.pid)
    with meeting(own_etcd.url) as at:
        what_needs_it_says_so_and_transfers_go_on(at, away, monkeypatch, caplog)


def test_a_tcp_store_whose_master_stands_still(master: Master, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    with meeting(f"tcp://{HOST}:{master.port}") as at:
        what_needs_it_says_so_and_transfers_go_on(at, standing_still(master.pid), monkeypatch, caplog)


def test_a_tcp_store_whose_master_dies(master: Master) -> None:
    """What was in it is gone with it. Who asks for it hears so at once; what is registered goes on; and once another is started at its
    address agents are known there, and new pairs are made."""
    with meeting(f"tcp://{HOST}:{master.port}") as at:
        one, two = at.one, at.two
        succeed(lambda: one.init_pair("p", "a", "b", 1, timeout=LONG), lambda: two.init_pair("p", "b", "a", 1, timeout=LONG))
        first, second = registered(one, two, "p", torch.ones(2), torch.zeros(2))
        master.kill()
        with pytest.raises(StoreUnavailableError, match="Start"):
            one.init_pair("q", "a", "b", 1, timeout=LONG)
        crosses(first, second)
        master.start()

        def meets_again() -> bool:
            try:
                one.ready_replicas("p", 1, timeout=LONG)
            except StoreUnavailableError:
                return False
            return True

        eventually(meets_again)
        succeed(lambda: one.init_pair("r", "a", "b", 1, timeout=LONG), lambda: two.init_pair("r", "b", "a", 1, timeout=LONG))
        crosses(*registered(one, two, "r", torch.ones(2), torch.zeros(2), "another"))
        crosses(first, second)
