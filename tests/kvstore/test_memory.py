from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from etha_ray.kvstore import KVStore, MemoryStore
from tests.contracts.kvstore import AddInParallel, KVStoreContract, MakeStore, StoreInAProcess


class TestMemoryStore(KVStoreContract):
    @pytest.fixture
    def make_store(self) -> Iterator[MakeStore]:
        made: list[KVStore] = []

        def make(**where: str) -> KVStore:
            made.append(MemoryStore(**where))
            return made[-1]

        yield make
        for store in made:
            store.close()

    @pytest.fixture
    def store_in_a_process(self) -> Iterator[StoreInAProcess]:
        pytest.skip("the memory of one process")

    @pytest.fixture
    def add_in_parallel(self, make_store: MakeStore) -> AddInParallel:
        def add(namespace: str, key: str, workers: int, count: int) -> None:
            stores = [make_store(namespace=namespace) for _ in range(workers)]
            threads = [threading.Thread(target=lambda s=s: [s.add(key, 1) for _ in range(count)]) for s in stores]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()

        return add
