"""What a store on Ray's GCS does when the GCS itself stands still, or is killed."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from functools import partial
from multiprocessing.connection import Connection

import pytest
import ray

from etha_ray.errors import StoreUnavailableError
from etha_ray.kvstore import GcsStore, KVStore, create_store
from etha_ray.kvstore.patience import OUTAGE
from etha_ray.tensor_bus.ray_lookup import find_agent_on_node
from etha_ray.testing import RayUnderTest
from etha_ray.testing.rays import OPTIONS, start_ray
from tests.contracts.kvstore_silence import LONG, SilenceContract, operations
from tests.fresh import fresh
from tests.standstill import gcs_pid, standing_still


@pytest.mark.usefixtures("ray_cluster")
class TestSilence(SilenceContract):
    @pytest.fixture
    def open_store(self) -> Callable[[str], KVStore]:
        return lambda namespace: create_store("gcs://", namespace=namespace)

    @pytest.fixture
    def silent(self) -> Callable[[], AbstractContextManager[None]]:
        return partial(standing_still, gcs_pid())

    def give(self, store: KVStore, seconds: float) -> None:
        assert isinstance(store, GcsStore)
        store._patience._most = min(seconds, 10 * LONG)


def test_nobody_waits_longer_than_an_outage(ray_cluster: RayUnderTest) -> None:
    for store in (GcsStore(ray_cluster.namespace), create_store("gcs://", namespace=ray_cluster.namespace)):
        assert isinstance(store, GcsStore)
        assert store._patience.seconds == OUTAGE
        store.close()


def test_a_worker_that_looks_for_its_agent(ray_cluster: RayUnderTest) -> None:
    with ThreadPoolExecutor(1) as pool, standing_still(gcs_pid()):
        found = pool.submit(find_agent_on_node, ray_cluster.namespace, 0.1)
        with pytest.raises(StoreUnavailableError, match="see that the cluster's head runs"):
            found.result(LONG)
    assert find_agent_on_node(ray_cluster.namespace) is None


def outlive_the_gcs(pipe: Connection) -> None:
    """Kills the GCS of a cluster of this process's own, and tells how all that asks for it ends. A process of its own: Ray ends those
    that have had no GCS for a minute."""
    start_ray(**OPTIONS)
    store = GcsStore("doomed", timeout=1.0)
    with store.lease(60, renew=False) as lease:
        os.kill(gcs_pid(), signal.SIGKILL)
        calls = operations(store, lease)
        with ThreadPoolExecutor(len(calls)) as pool:
            ends = {what: pool.submit(call).exception() for what, call in calls.items()}
        pipe.send({what: type(end) for what, end in ends.items()})
    store.close()
    pipe.send("closed")
    ray.shutdown()


@pytest.mark.slow
def test_a_gcs_that_is_killed() -> None:
    ours, theirs = multiprocessing.Pipe()
    process = fresh.Process(target=outlive_the_gcs, args=(theirs,))
    process.start()
    try:
        assert ours.poll(2 * LONG)
        ends = ours.recv()
        assert ends == dict.fromkeys(ends, StoreUnavailableError)
        assert ours.poll(LONG)
        assert ours.recv() == "closed"
        process.join(LONG)
    finally:
        process.kill()
        process.join()
