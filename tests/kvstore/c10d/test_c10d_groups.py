"""Process groups of four processes that meet by a store of ours."""

from __future__ import annotations

import uuid
from datetime import timedelta
from pathlib import Path

import pytest
import ray
import torch.distributed as dist
from torch.multiprocessing.spawn import start_processes

from etha_ray.kvstore import create_store
from etha_ray.kvstore.c10d import C10dStore, C10dTimeoutError
from tests.fresh import fresh
from tests.kvstore.c10d.backends import opened
from tests.kvstore.c10d.ranks import RANKS, enter, expected, meet


@ray.remote(num_cpus=0.1)
class Rank:
    """A rank in a Ray actor."""

    def meet(self, rank: int, namespace: str) -> bool:
        return meet(rank, "gcs://", namespace) == expected(rank)


@pytest.mark.parametrize("backend", ["tcp", "etcd"])
def test_four_processes(backend: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    with opened(backend, request) as open_kv:
        kv = open_kv(uuid.uuid4().hex)
        start_processes(enter, (kv._where(), kv.namespace, tmp_path), nprocs=RANKS, start_method=fresh.get_start_method())  # type: ignore[no-untyped-call]
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"rank {rank}" for rank in range(RANKS)]


@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_four_actors_on_gcs() -> None:
    actors = [Rank.remote() for _ in range(RANKS)]  # type: ignore[attr-defined]
    store = create_store("gcs://", namespace=uuid.uuid4().hex)
    assert ray.get([actor.meet.remote(rank, store.namespace) for rank, actor in enumerate(actors)], timeout=250) == [True] * RANKS
    for actor in actors:
        ray.kill(actor)
    store.close()


def test_a_rank_that_does_not_come() -> None:
    """Who waits for it learns by torch's error for it, with the key and the seconds, and can try again."""
    store = C10dStore(create_store("memory://", namespace=uuid.uuid4().hex))
    with pytest.raises(C10dTimeoutError, match=r"key '.*/1' did not appear within 0\.5 s") as caught:
        dist.init_process_group("gloo", store=store, rank=0, world_size=2, timeout=timedelta(seconds=0.5))
    assert isinstance(caught.value, dist.DistStoreError)
    assert not dist.is_initialized()
    with pytest.raises(C10dTimeoutError, match=r"within 0\.5 s"):
        dist.ProcessGroupGloo(dist.PrefixStore("again", store), 0, 2, timedelta(seconds=0.5))
    store.store.close()
