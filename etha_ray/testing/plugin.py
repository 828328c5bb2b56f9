"""The pytest plugin: fixtures for tests of what is built on etha_ray. See docs/testing.md.

pytest imports this at each start, so nothing here loads torch or Ray before a fixture is used. It adds fixtures and nothing else: no
hooks, options or marks, and none of the fixtures is used unless a test asks for it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from etha_ray.kvstore import KVStore
    from etha_ray.testing.bus import TensorBus
    from etha_ray.testing.etcd_server import EtcdAddress
    from etha_ray.testing.rays import RayUnderTest

STORES = ("memory", "tcp", "gcs", "etcd")


@pytest.fixture(scope="module")
def ray_init_options() -> dict[str, Any]:
    """What `ray_local` and `ray_cluster` give to ``ray.init``, such as num_cpus (8: logical ones, so that actors have room) and
    log_to_driver. Override it in a test module or a conftest.py."""
    from etha_ray.testing.rays import OPTIONS

    return dict(OPTIONS)


@pytest.fixture(scope="module")
def ray_local(ray_init_options: dict[str, Any]) -> Iterator[RayUnderTest]:
    """Ray in this process (``local_mode=True``), where a debugger reaches actors, if the installed Ray has that, up to 2.52; else as
    `ray_cluster`. Started once a module; ``ray_local.local_mode`` says which, ``ray_local.launch_agents(2)`` starts agents on it."""
    from etha_ray.testing.rays import running_ray

    with running_ray(True, ray_init_options) as running:
        yield running


@pytest.fixture(scope="module")
def ray_cluster(ray_init_options: dict[str, Any]) -> Iterator[RayUnderTest]:
    """A Ray cluster on this machine, with real worker processes. Started once a module; ``ray_cluster.launch_agents(2)`` starts agents
    on it. Workers find them by themselves (`bootstrap_client`, `publish`, `pull`)."""
    from etha_ray.testing.rays import running_ray

    with running_ray(False, ray_init_options) as running:
        yield running


@pytest.fixture
def tensor_bus(request: pytest.FixtureRequest) -> Iterator[TensorBus]:
    """Two CPU agents on threads of this process, without Ray: `etha_ray.testing.TensorBus`. `bootstrap_client`, `publish` and `pull`
    find agent 0; ``tensor_bus.client(1)`` is a client of the other, ``tensor_bus.environment(1)`` is for other processes. Another
    number of agents: ``@pytest.mark.parametrize("tensor_bus", [4], indirect=True)``."""
    from etha_ray.testing.bus import TensorBus

    with TensorBus(getattr(request, "param", 2)) as bus, bus.worker(0):
        yield bus


@pytest.fixture(params=STORES)
def kv_store(request: pytest.FixtureRequest) -> Iterator[KVStore]:
    """An empty key-value store; the test runs once on each kind: memory, torch's TCPStore, Ray's GCS (on the Ray that runs, else on
    `ray_local`) and etcd (the one that ETHA_RAY_TEST_ETCD names, or one of this session). Skipped for etcd where it is not installed."""
    from etha_ray.testing.stores import fresh_store

    if request.param == "gcs":
        import ray

        if not ray.is_initialized():
            request.getfixturevalue("ray_local")
    etcd: EtcdAddress | None = request.getfixturevalue("etha_ray_etcd") if request.param == "etcd" else None
    with fresh_store(request.param, etcd) as store:
        yield store


@pytest.fixture(scope="session")
def etha_ray_etcd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EtcdAddress]:
    """The etcd of `kv_store` (``host``, ``port``, ``url``). Skips where etcd is not installed."""
    from etha_ray.testing.etcd_server import EtcdAddress, EtcdServer, address_from_environment

    given = address_from_environment()
    if given is not None:
        yield given
        return
    server = EtcdServer(tmp_path_factory.mktemp("etcd"))
    server.start()
    try:
        server.wait_ready()
        yield EtcdAddress(server.host, server.port)
    finally:
        server.stop()
