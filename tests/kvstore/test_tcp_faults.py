"""What a store on torch's TCPStore does when its master stands still, dies, or is started again."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from functools import partial

import pytest

from etha_ray.errors import StoreUnavailableError
from etha_ray.kvstore import KVStore, TorchTCPStore, create_store, tcp_client
from etha_ray.kvstore.patience import OUTAGE
from etha_ray.testing import eventually
from tests.contracts.kvstore_silence import LONG, SilenceContract, operations
from tests.kvstore.tcp_master import HOST, Master
from tests.standstill import standing_still


class TestSilence(SilenceContract):
    @pytest.fixture
    def open_store(self, master: Master) -> Callable[[str], KVStore]:
        return lambda namespace: create_store(f"tcp://{HOST}:{master.port}", namespace=namespace)

    @pytest.fixture
    def silent(self, master: Master) -> Callable[[], AbstractContextManager[None]]:
        return partial(standing_still, master.pid)

    def give(self, store: KVStore, seconds: float) -> None:
        assert isinstance(store, TorchTCPStore)
        store._patience._most = min(seconds, 10 * LONG)


def test_nobody_waits_longer_than_an_outage(master: Master) -> None:
    store = TorchTCPStore(HOST, master.port, None, False)
    assert store._patience.seconds == OUTAGE
    store.close()


def test_connecting_to_a_master_that_stands_still(master: Master) -> None:
    with ThreadPoolExecutor(1) as pool, standing_still(master.pid):
        made = pool.submit(TorchTCPStore, HOST, master.port, None, False, 0.5)
        with pytest.raises(StoreUnavailableError, match=rf"{HOST}:{master.port} takes connections and has not answered for"):
            made.result(LONG)


def test_a_master_that_dies(master: Master) -> None:
    store = create_store(f"tcp://{HOST}:{master.port}")
    lease = store.lease(60, renew=False)
    master.kill()
    with pytest.raises(StoreUnavailableError, match=rf"{HOST}:{master.port} cannot be reached .* has ended, and what it held with it"):
        store.get("k")
    for what, call in operations(store, lease).items():
        with pytest.raises(StoreUnavailableError, match=rf"{HOST}:{master.port}.*Start the process that serves it"):
            print(what, call())
    store.close()


def test_a_master_that_is_started_again_is_found_and_has_nothing(master: Master) -> None:
    store = create_store(f"tcp://{HOST}:{master.port}")
    lease = store.lease(3)
    store.set("k", "v")
    master.kill()
    with pytest.raises(StoreUnavailableError):
        store.get("k")
    master.start()
    assert store.get("k") is None
    store.set("k", "w")
    assert store.wait_for_value("k", "w", LONG) == b"w"
    eventually(lambda: not lease.alive)  # its owner hears that it is over, as does everybody
    store.close()


def test_a_torch_that_does_not_say_which_socket_it_has(
    master: Master, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(tcp_client, "repr", lambda _: "TCPStore()", raising=False)
    store = create_store(f"tcp://{HOST}:{master.port}")
    assert "without limit" in caplog.text
    store.set("k", "v")
    assert store.get("k") == b"v"
    store.close()
