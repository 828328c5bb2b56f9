"""What the parts of the stores' contract are given, most of it by a backend's tests."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from etha_ray.kvstore import KVStore
from tests.contracts.store_processes import StoreInAProcess, add_often

MakeStore = Callable[..., KVStore]
AddInParallel = Callable[[str, str, int, int], None]
"""(namespace, key, workers, count): adds 1 to the key ``count`` times from each of ``workers`` processes (threads, for memory)."""


class StoreFixtures:
    """``make_store(namespace=..., component=...)`` makes stores of one backend that meet; the backend's fixture closes them.

    ``store_in_a_process`` does the same in processes of their own; a backend that has none skips there.
    """

    @pytest.fixture
    def make_store(self) -> Iterator[MakeStore]:
        raise NotImplementedError

    @pytest.fixture
    def store_in_a_process(self) -> Iterator[StoreInAProcess]:
        raise NotImplementedError

    @pytest.fixture
    def add_in_parallel(self, store_in_a_process: StoreInAProcess) -> AddInParallel:
        def add(namespace: str, key: str, workers: int, count: int) -> None:
            processes = [store_in_a_process(namespace, add_often, key, count) for _ in range(workers)]
            for process in processes:
                process.join()

        return add

    @pytest.fixture
    def namespace(self) -> str:
        return f"ns-{uuid.uuid4().hex[:12]}"

    @pytest.fixture
    def store(self, make_store: MakeStore, namespace: str) -> KVStore:
        return make_store(namespace=namespace)

    @pytest.fixture
    def other(self, make_store: MakeStore, namespace: str) -> KVStore:
        """A second store object of the same namespace."""
        return make_store(namespace=namespace)

    @pytest.fixture
    def background(self) -> Iterator[ThreadPoolExecutor]:
        with ThreadPoolExecutor(16) as pool:
            yield pool
