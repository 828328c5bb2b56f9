"""Who may talk to etcd, and whom a store talks to: certificates, users, tokens."""

from __future__ import annotations

import logging
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pyetcd
import pytest
import torch
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from pyetcd import etcdrpc
from pyetcd.etcdrpc.auth_pb2 import Permission

from etha_ray.config import agent_paths
from etha_ray.errors import ConfigError, StoreError, StoreUnavailableError
from etha_ray.kvstore import EtcdStore, create_store
from etha_ray.tensor_bus.client import TensorBusClient
from etha_ray.testing.calls import PATIENCE, eventually, succeed
from etha_ray.testing.etcd_server import HOST, EtcdServer
from tests.kvstore.certificates import Authority, Certificate
from tests.kvstore.etcd_server import watching

PASSWORD = "p@ss:w/rd%2F?&#ü"
IMPATIENT = 0.5
"""Seconds that a store asks for in vain where it is not to be let in."""


def in_vain(match: str, port: int, **how: Any) -> None:
    """No store can be made there, and why is said; while the machine is slow it may only be that nobody answered in time."""
    said: list[str] = []

    def has_why() -> bool:
        with pytest.raises(StoreUnavailableError) as caught:
            EtcdStore(HOST, port, IMPATIENT, **how)
        said.append(str(caught.value))
        return "Deadline Exceeded" not in said[-1]

    eventually(has_why)
    assert re.search(match, said[-1])


@dataclass(frozen=True)
class Servers:
    """Servers of one authority: for anybody, for those with a certificate, and one whose certificate is another host's."""

    authority: Authority
    stranger: Authority
    client: Certificate
    open: EtcdServer
    mutual: EtcdServer
    misplaced: EtcdServer

    @property
    def ca(self) -> str:
        return str(self.authority.files.cert)


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Servers]:
    folder = tmp_path_factory.mktemp("tls")
    authority, stranger = Authority(folder, "ours"), Authority(folder, "stranger")
    with ExitStack() as stack:

        def serve(name: str, files: Certificate, *more: str) -> EtcdServer:
            arguments = ("--cert-file", str(files.cert), "--key-file", str(files.key), *more)
            server = EtcdServer(folder / name, arguments, scheme="https")
            stack.callback(server.stop)
            server.start()
            server.wait_ready()
            return server

        files = authority.sign("server")
        mutual = serve("mutual", files, "--client-cert-auth", "--trusted-ca-file", str(authority.files.cert))
        misplaced = serve("misplaced", authority.sign("far", "10.1.2.3"))
        yield Servers(authority, stranger, authority.sign("client"), serve("open", files), mutual, misplaced)


# --- certificates ------------------------------------------------------------------------------------------------------------------------


def test_an_encrypted_connection(servers: Servers) -> None:
    store = create_store(f"{servers.open.url}?ca={servers.ca}")
    store.set("k", "v")
    assert store.wait_for_key("k", 0) == b"v"
    store.close()


def test_a_clients_certificate(servers: Servers) -> None:
    store = create_store(f"{servers.mutual.url}?ca={servers.ca}&cert={servers.client.cert}&key={servers.client.key}")
    assert store.add("n", 1) == 1
    store.close()


@pytest.mark.parametrize("ca", ["stranger", None])
def test_a_server_that_nobody_trusted_has_signed(servers: Servers, ca: str | None) -> None:
    path = str(servers.stranger.files.cert) if ca else None
    in_vain(r"certificate is not signed by .*ca=.*or not for this host", servers.open.port, tls=True, ca=path)


def test_a_server_with_the_certificate_of_another_host(servers: Servers) -> None:
    in_vain("or not for this host", servers.misplaced.port, ca=servers.ca)


def test_without_the_certificate_that_the_server_wants(servers: Servers) -> None:
    in_vain(r"client's certificate \(cert=, key=\)", servers.mutual.port, ca=servers.ca)


def test_with_a_certificate_that_the_server_does_not_trust(servers: Servers) -> None:
    files = servers.stranger.sign("client")
    in_vain(
        "does it accept the certificate .*stranger-client", servers.mutual.port, ca=servers.ca, cert=str(files.cert), key=str(files.key)
    )


def test_one_side_encrypts_and_the_other_does_not(servers: Servers, own_etcd: EtcdServer) -> None:
    in_vain("does it want TLS", servers.open.port)
    in_vain("does it speak TLS", own_etcd.port, ca=servers.ca)


def test_files_that_cannot_be_used(servers: Servers, tmp_path: Path) -> None:
    garbage, locked = tmp_path / "garbage.pem", tmp_path / "locked.key"
    garbage.write_text("no certificate")
    key = serialization.load_pem_private_key(servers.client.key.read_bytes(), None)
    form = serialization.BestAvailableEncryption(b"passphrase")
    locked.write_bytes(key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, form))
    cert = str(servers.client.cert)
    other = str(servers.stranger.sign("client").key)
    for arguments, named in (
        ({"ca": str(tmp_path / "missing.pem")}, "missing.pem"),
        ({"ca": str(garbage)}, "garbage.pem"),
        ({"cert": cert, "key": str(tmp_path / "missing.key")}, "missing.key"),
        ({"cert": str(garbage), "key": str(servers.client.key)}, "garbage.pem"),
        ({"cert": cert, "key": other}, "stranger-client.key"),
        ({"cert": cert, "key": str(locked)}, "locked.key"),
    ):
        with pytest.raises(ConfigError, match=f"{named}.*cannot be used.*PEM"):
            EtcdStore(HOST, servers.open.port, IMPATIENT, **arguments)


# --- users -------------------------------------------------------------------------------------------------------------------------------


def with_users(server: EtcdServer, **how: Any) -> None:
    """Gives the server users "root" and "worker"; the latter owns the prefix ``ours/`` and may read two keys of ``theirs/``."""
    client = pyetcd.client(server.host, server.port, **how)
    stub = client.authstub
    for name in ("root", "worker"):
        stub.RoleAdd(etcdrpc.AuthRoleAddRequest(name=name))
        stub.UserAdd(etcdrpc.AuthUserAddRequest(name=name, password=PASSWORD))
        stub.UserGrantRole(etcdrpc.AuthUserGrantRoleRequest(user=name, role=name))
    for kind, key, end in (("READWRITE", b"ours/", b"ours0"), ("READ", b"theirs/tensorbus/", b""), ("READ", b"theirs/tensorbus/k", b"")):
        permission = Permission(permType=kind, key=key, range_end=end)
        stub.RoleGrantPermission(etcdrpc.AuthRoleGrantPermissionRequest(name="worker", perm=permission))
    stub.AuthEnable(etcdrpc.AuthEnableRequest())
    client.close()


def as_user(server: EtcdServer, name: str = "worker", namespace: str = "ours") -> EtcdStore:
    store = create_store(f"etcd://{name}:{quote(PASSWORD, safe='')}@{server.host}:{server.port}", namespace=namespace)
    assert isinstance(store, EtcdStore)
    return store


@pytest.fixture
def guarded(own_etcd: EtcdServer) -> EtcdServer:
    with_users(own_etcd)
    return own_etcd


def test_a_user(guarded: EtcdServer) -> None:
    store = as_user(guarded)
    store.set_bytes("k", bytes(2_000_000))
    assert store.get("k") == bytes(2_000_000)
    with store.lease(60) as lease:
        lease.set("l", "1")
        lease.renew()
    assert store.list() == {"k": bytes(2_000_000)}
    store.close()


def test_a_wrong_password_or_none(guarded: EtcdServer, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    for user, password in (("worker", f"{PASSWORD}x"), ("nobody", PASSWORD), ("worker", "")):
        with pytest.raises(ConfigError, match=f"'{user}'.*wrong user or password") as caught:
            EtcdStore(HOST, guarded.port, user=user, password=password)
        assert PASSWORD not in f"{caught.getrepr(showlocals=False)}"
    with pytest.raises(ConfigError, match="user= and password="):
        EtcdStore(HOST, guarded.port)
    assert PASSWORD not in caplog.text


def test_the_password_is_not_shown(guarded: EtcdServer) -> None:
    store = as_user(guarded, namespace="ours")
    guarded.kill()
    with pytest.raises(StoreUnavailableError) as caught:
        store.wait_for_key("k", 0)
    for text in (str(caught.value), repr(store), repr(store._client._security)):
        assert PASSWORD not in text
        assert quote(PASSWORD, safe="") not in text
    store.close()


def test_a_user_where_there_are_none(own_etcd: EtcdServer) -> None:
    store = as_user(own_etcd)
    assert store.add("n", 1) == 1
    store.close()


def test_what_the_user_may_not_do(guarded: EtcdServer) -> None:
    with pytest.raises(StoreError, match=r"'worker'.*readwrite permission on the prefix 'secret/'"):
        as_user(guarded, namespace="secret")
    store = as_user(guarded, namespace="theirs")
    assert store.get("k") is None
    with pytest.raises(StoreError, match="'theirs/'"):
        store.set("k", "v")
    store.close()


def test_a_watch_that_is_refused_polls(guarded: EtcdServer, background: ThreadPoolExecutor) -> None:
    """The user may read the key, but not all that begin with it."""
    store, root = as_user(guarded, namespace="theirs"), as_user(guarded, "root", "theirs")
    wait = background.submit(store.wait_for_key, "k", 60)
    eventually(lambda: any(watch.refused for watch in tuple(store._watches._watches)))
    root.set("k", "v")
    assert wait.result(60) == b"v"
    store.close(cleanup=False)
    root.close()


def test_a_token_that_is_gone(guarded: EtcdServer, background: ThreadPoolExecutor) -> None:
    """etcd forgets its simple tokens when it stops."""
    store, other = as_user(guarded), as_user(guarded)
    wait = background.submit(store.wait_for_key, "k", 60)
    watching(store)
    with store.lease(60) as lease:
        guarded.kill()
        guarded.restart()
        assert store.add("n", 1) == 1
        lease.set("l", "1")
        other.set("k", "v")
        assert wait.result(60) == b"v"
    other.close()
    store.close()


def test_tokens_that_run_out(tmp_path: Path, background: ThreadPoolExecutor) -> None:
    key = rsa.generate_private_key(65537, 2048)
    private, public = tmp_path / "jwt.key", tmp_path / "jwt.pub"
    pem = serialization.Encoding.PEM
    private.write_bytes(key.private_bytes(pem, serialization.PrivateFormat.TraditionalOpenSSL, serialization.NoEncryption()))
    public.write_bytes(key.public_key().public_bytes(pem, serialization.PublicFormat.SubjectPublicKeyInfo))
    token = f"jwt,pub-key={public},priv-key={private},sign-method=RS256,ttl=1s"
    server = EtcdServer(tmp_path / "etcd", ("--auth-token", token))
    server.start()
    server.wait_ready()
    with_users(server)
    store = as_user(server)
    waits = []
    for n in range(3):
        waits.append(background.submit(store.wait_for_key, f"k{n}", 60))
        watching(store, n + 1)  # the second begins on the first one's stream, which has an old token
        old = store._client._token
        eventually(lambda old=old: store.add("n", 1) > 0 and store._client._token != old)  # type: ignore[misc]
    for n in range(3):
        store.set(f"k{n}", "v")
    assert [wait.result(60) for wait in waits] == [b"v"] * 3
    store.close()
    server.stop()


# --- agents ------------------------------------------------------------------------------------------------------------------------------


def test_agents_meet_where_connections_are_encrypted_and_users_have_passwords(servers: Servers, tmp_path: Path) -> None:
    """The password is in their environment, and not in a command line, which anybody may read."""
    files = servers.authority.sign("agents")
    server = EtcdServer(tmp_path, ("--cert-file", str(files.cert), "--key-file", str(files.key)), scheme="https")
    server.start()
    server.wait_ready()
    with_users(server, ca_cert=servers.ca)
    url = f"etcd://worker:{quote(PASSWORD, safe='')}@{server.host}:{server.port}?ca={servers.ca}"
    paths = [agent_paths(rank, "ours") for rank in range(2)]
    command = [sys.executable, "-m", "etha_ray.tensor_bus.agent", "--namespace", "ours", "--threads", "1", "--rank"]
    agents = [subprocess.Popen([*command, str(rank)], env={**os.environ, "ETHA_RAY_STORE": url}) for rank in range(2)]
    try:
        one, two = (TensorBusClient(rank, paths[rank].command_queue, paths[rank].state, PATIENCE) for rank in range(2))
        for agent in agents:
            assert b"worker:" not in Path(f"/proc/{agent.pid}/cmdline").read_bytes()
        succeed(lambda: one.init_pair("pair", "a", "b", 1), lambda: two.init_pair("pair", "b", "a", 1))
        source, target = torch.arange(3.0), torch.zeros(3)
        first, second = succeed(
            lambda: one.register_tensors("batch", [(source, "pair")]), lambda: two.register_tensors("batch", [(target, "pair")])
        )
        succeed(lambda: first.transfer("send", blocking=True), lambda: second.transfer("recv", blocking=True))
        assert torch.equal(source, target)
        succeed(one.close, two.close)
    finally:
        for agent in agents:
            agent.terminate()
        for agent in agents:
            agent.wait(PATIENCE)
        server.stop()
