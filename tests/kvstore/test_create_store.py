from __future__ import annotations

import subprocess
import sys
import traceback
import uuid
from collections.abc import Callable
from pathlib import Path

import pytest

from etha_ray.errors import ConfigError, StoreUnavailableError
from etha_ray.kvstore import EtcdStore, MemoryStore, TorchTCPStore, create_store
from etha_ray.kvstore.url import check_store_url
from etha_ray.testing.etcd_server import EtcdAddress


def test_memory_stores_of_one_namespace_meet() -> None:
    namespace = uuid.uuid4().hex
    first = create_store("memory://", namespace=namespace, component="c")
    second = create_store("memory://", namespace=namespace)
    elsewhere = create_store("memory://", namespace=f"{namespace}x", component="c")
    assert isinstance(first, MemoryStore)
    first.set("k", "v")
    assert second.get("k", component="c") == b"v"
    assert second.get("k") is None
    assert elsewhere.get("k") is None
    second.close(cleanup=False)
    assert first.get("k") == b"v"
    first.close(cleanup=True)
    assert create_store("memory://", namespace=namespace, component="c").get("k") is None


def test_tcp() -> None:
    master = create_store("tcp://127.0.0.1:0?master=1&world_size=2&wait_for_workers=0", namespace="n", component="c", timeout=30)
    assert isinstance(master, TorchTCPStore)
    assert (master.is_master, master.world_size, master.namespace, master.component) == (True, 2, "n", "c")
    client = create_store(f"tcp://127.0.0.1:{master.port}", namespace="n", component="c", timeout=30)
    assert isinstance(client, TorchTCPStore)
    assert (client.is_master, client.world_size) == (False, None)
    client.set("k", "v")
    assert master.get("k") == b"v"
    client.close()
    master.close()


@pytest.mark.parametrize("form", ["etcd://{}", "etcd://{},127.0.0.1:1", "etcd://u:p%40%2F@{}/"])
def test_etcd(etcd: EtcdAddress, namespace: str, form: str) -> None:
    store = create_store(form.format(f"{etcd.host}:{etcd.port}"), namespace=namespace, component="c", timeout=30)
    assert isinstance(store, EtcdStore)
    assert (store.host, store.port, store.namespace, store.component) == (etcd.host, etcd.port, namespace, "c")
    store.set("k", "v")
    assert store.get("k") == b"v"
    store.close()


@pytest.mark.parametrize(
    ("url", "where"),
    [
        ("etcd://nosuchhost.invalid", "etcd://nosuchhost.invalid:2379,"),
        ("etcd://127.0.0.1:1,[::1]:2,[::1],h.invalid", "etcd://127.0.0.1:1,[::1]:2,[::1]:2379,h.invalid:2379,"),
        ("etcd://127.0.0.1:1?tls=1", "etcd://127.0.0.1:1,"),
    ],
)
def test_etcd_endpoints(url: str, where: str) -> None:
    with pytest.raises(StoreUnavailableError) as caught:
        create_store(url, timeout=0.2)
    assert where in str(caught.value)


@pytest.mark.parametrize("query", ["ca={}", "cert={}&key={}", "tls=1&ca={}"])
def test_etcd_files(query: str, tmp_path: Path) -> None:
    missing = tmp_path / "missing.pem"
    with pytest.raises(ConfigError, match=str(missing)):
        create_store("etcd://127.0.0.1:1?" + query.format(missing, missing))


@pytest.mark.parametrize(
    "url",
    [
        "etcd://u:secret@h:x",
        "etcd://u:secret@h?what=1",
        "etcd://u:sec/secret@h",
        "redis://u:secret@h:1",
        "tcp://u:secret@h:1",
        "etcd://u:se@secret@h:0",
    ],
)
def test_no_message_has_the_password(url: str) -> None:
    with pytest.raises(ConfigError) as caught:
        create_store(url)
    assert "secret" not in traceback.format_exception_only(caught.value)[-1]
    assert "//***@h" in str(caught.value)


def test_gcs_without_ray_says_what_to_do() -> None:
    # A process of its own: here another test may have started Ray.
    code = "from etha_ray.kvstore import create_store; create_store('gcs://')"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert result.returncode != 0
    assert StoreUnavailableError.__name__ in result.stderr
    assert "ray.init()" in result.stderr


def test_importing_loads_no_backend() -> None:
    code = "import sys, etha_ray.kvstore.base, etha_ray.kvstore; print([m for m in ('ray', 'grpc', 'pyetcd', 'etcd3') if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert result.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("url", "cause"),
    [
        ("", "no known store"),
        ("redis://h:1", "no known store"),
        ("memory", "no known store"),
        ("memory://x", "nothing after it"),
        ("gcs://host:6379", "nothing after it"),
        ("gcs://?a=1", "nothing after it"),
        ("tcp://", "host and a port"),
        ("tcp://host", "host and a port"),
        ("tcp://host:notaport", "tcp://host:notaport"),
        ("tcp://host:99999", "99999"),
        ("tcp://host:1/path", "host and a port"),
        ("tcp://user@host:1", "host and a port"),
        ("tcp://host:1?masterr=1", "masterr"),
        ("tcp://host:1?master=yes", "0 or 1"),
        ("tcp://host:1?wait_for_workers=2", "0 or 1"),
        ("tcp://host:1?world_size=many", "world_size must be a number"),
        ("tcp://host:1?world_size=-1", "world_size must be a number"),
        ("etcd://", "needs hosts"),
        ("etcd://h,", "needs hosts"),
        ("etcd://h:0", "needs hosts"),
        ("etcd://h:x", "needs hosts"),
        ("etcd://h:70000", "needs hosts"),
        ("etcd://h/path", "needs hosts"),
        ("etcd://h#f", "needs hosts"),
        ("etcd://u@h", "a user, a colon and a password"),
        ("etcd://:p@h", "a user, a colon and a password"),
        ("etcd://h?caa=x", "unknown option caa"),
        ("etcd://h?tls=yes", "0 or 1"),
    ],
)
@pytest.mark.parametrize("look", [create_store, check_store_url])
def test_bad_urls_say_what_is_accepted(look: Callable[[str], object], url: str, cause: str) -> None:
    with pytest.raises(ConfigError) as caught:
        look(url)
    message = str(caught.value)
    assert cause in message
    assert all(accepted in message for accepted in ("gcs://", "tcp://HOST:PORT", "etcd://", "memory://"))


@pytest.mark.parametrize(
    "url", ["gcs://", "memory://", "tcp://nowhere.invalid:1?world_size=7", "etcd://u:p@nowhere.invalid,h:1?ca=/no/such/file"]
)
def test_a_url_is_looked_at_without_connecting(url: str) -> None:
    assert check_store_url(url) == url
