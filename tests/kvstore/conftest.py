"""etcd for the tests of this folder: one that all share, and ones of a test's own."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pyetcd
import pytest

from etha_ray.testing.etcd_server import EtcdAddress


@pytest.fixture(scope="session")
def etcd(etha_ray_etcd: EtcdAddress) -> EtcdAddress:
    """The etcd that all tests share (``host``, ``port``, ``url``): the one CI has started, or one of this session. Nobody kills it."""
    return etha_ray_etcd


@pytest.fixture(scope="session")
def raw(etcd: EtcdAddress) -> Iterator[Any]:
    """Another client of the shared etcd, not ours."""
    client = pyetcd.client(etcd.host, etcd.port, grpc_options=[("grpc.max_receive_message_length", -1)])
    yield client
    client.close()


@pytest.fixture
def background() -> Iterator[ThreadPoolExecutor]:
    """Threads for calls that wait."""
    with ThreadPoolExecutor(16) as pool:
        yield pool
