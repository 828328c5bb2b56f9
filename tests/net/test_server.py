"""The listening end against everything that is not an agent of its pool."""

from __future__ import annotations

import contextlib
import hmac
import logging
import os
import resource
import socket
import struct
import threading
import time
import zlib
from collections.abc import Iterator

import msgspec
import psutil
import pytest

from etha_ray.errors import ConfigError, NoTransportError, PeerLostError
from etha_ray.net import Address, Connection, Server, dial
from etha_ray.net.connection import prefix
from etha_ray.net.handshake import Challenge, Proof, Refused, Welcome, admit, introduce
from etha_ray.net.server import MAX_STRANGERS
from etha_ray.testing import eventually
from tests.net.silent import unheard

SECRET, OTHER = bytes(range(32)), bytes(32)


def greet(connection: Connection, hello: bytes) -> None:
    connection.socket.sendall(b"hello " + hello)


@pytest.fixture
def server() -> Iterator[Server]:
    with contextlib.closing(Server(SECRET, {"greet": greet}, "127.0.0.1", failure_timeout=30.0)) as server:
        yield server


def greeting(address: Address, name: bytes = b"you") -> bytes:
    with dial(address, SECRET, "greet", name) as connection:
        return connection.socket.recv(100, socket.MSG_WAITALL)


def stranger(server: Server) -> socket.socket:
    return socket.create_connection((server.address.host, server.address.port), timeout=30)


def everything(sock: socket.socket) -> bytes:
    """What comes until the other end closes."""
    data = b""
    with contextlib.suppress(ConnectionError):
        while more := sock.recv(65536):
            data += more
    return data


def tcp_pair() -> tuple[socket.socket, socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        client = socket.create_connection(listener.getsockname(), timeout=30)
        return client, listener.accept()[0]


def frame(header: msgspec.Struct | bytes) -> bytes:
    data = header if isinstance(header, bytes) else msgspec.msgpack.encode(header)
    return prefix(data) + data


def lengths(head: int, payload: int) -> bytes:
    """The beginning of a frame that is as long as this says."""
    both = struct.pack("!HI", head, payload)
    return both + struct.pack("!II", zlib.crc32(both), 0)


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "localhost"])
def test_a_service_is_reached(host: str) -> None:
    with contextlib.closing(Server(SECRET, {"greet": greet}, host)) as server:
        assert server.address.host == host
        assert server.address.port > 0
        assert greeting(Address.parse(str(server.address))) == b"hello you"


def test_many_at_a_time(server: Server) -> None:
    greetings: list[bytes] = []
    threads = [threading.Thread(target=lambda n=n: greetings.append(greeting(server.address, b"%d" % n))) for n in range(40)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(greetings) == sorted(b"hello %d" % n for n in range(40))


@pytest.mark.parametrize(
    "garbage",
    [
        b"GET / HTTP/1.1\r\nHost: here\r\n\r\n",
        bytes(10_000),
        b"\xff" * 10_000,
        frame(b"not msgpack at all \xc1"),
        frame(Refused("no")),
        frame(Proof("greet", b"", bytes(32), b"")),
        frame(Proof("greet", b"", bytes(32), bytes(32))),
        frame(msgspec.msgpack.encode(("greet", b"", b"short", b""))),
        lengths(100, 2**32 - 1) + bytes(100),
        lengths(65535, 0) + bytes(65535),
        lengths(100, 0) + bytes(100),
        b"",
    ],
    ids=lambda garbage: repr(garbage[:12]),
)
def test_garbage_is_dropped(server: Server, garbage: bytes, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "etha_ray"):
        for _ in range(3):
            with stranger(server) as sock:
                with contextlib.suppress(OSError):
                    sock.sendall(garbage)
                    sock.shutdown(socket.SHUT_WR)
                everything(sock)  # returns: the server has closed it
        eventually(lambda: not server._threads)
    # Said once, with who and why.
    assert [record for record in caplog.messages if "127.0.0.1" in record and "said once" in record][1:] == []
    assert len(caplog.messages) == 1
    assert greeting(server.address) == b"hello you"


def test_a_wrong_secret_is_told_on_both_sides(server: Server, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG):
        with pytest.raises(NoTransportError, match=rf"{server.address} refused this agent: it does not know this pool's secret"):
            dial(server.address, OTHER, "greet")
        eventually(lambda: not server._threads)
    assert "does not know this pool's secret" in caplog.text
    for secret in (SECRET, OTHER):
        for shown in (repr(secret), secret.hex(), str(list(secret))):
            assert shown not in caplog.text + repr(server)


def test_an_unknown_service_is_told(server: Server) -> None:
    with pytest.raises(NoTransportError, match="'dance', which is not served here"):
        dial(server.address, SECRET, "dance")


def test_a_proof_cannot_be_played_back(server: Server) -> None:
    """What one connection proved means nothing on the next."""
    relay, client = tcp_pair()

    def prove() -> None:
        with contextlib.suppress(PeerLostError), Connection(client, "the relay") as connection:
            introduce(connection, SECRET, "greet", b"")

    thread = threading.Thread(target=prove)
    thread.start()
    with stranger(server) as sock:
        relay.sendall(sock.recv(1000))
        proof = relay.recv(1000)
        sock.sendall(proof)
        assert b"Welcome" in sock.recv(1000)
    relay.close()
    thread.join()
    with stranger(server) as sock:
        sock.recv(1000)
        sock.sendall(proof)
        assert b"Refused" in everything(sock)


def test_the_server_must_prove_itself_too() -> None:
    """Something that took over the port, and does not know the secret, gets nothing."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def pretend() -> None:
            with listener.accept()[0] as sock:
                sock.sendall(frame(Challenge(3, bytes(32))))
                proof = msgspec.msgpack.decode(sock.recv(10_000)[len(prefix(b"")) :], type=Proof)
                # The client's own proof is the one thing that it has from who knows the secret.
                sock.sendall(frame(Welcome(proof.mac)))
                everything(sock)

        thread = threading.Thread(target=pretend)
        thread.start()
        address = Address("127.0.0.1", listener.getsockname()[1])
        with pytest.raises(NoTransportError, match="not the agent that published this address"):
            dial(address, SECRET, "greet")
        thread.join()


def test_another_version_is_told() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = Address("127.0.0.1", listener.getsockname()[1])

        def pretend() -> None:
            with listener.accept()[0] as sock:
                sock.sendall(frame(Challenge(4, bytes(32))))
                everything(sock)

        thread = threading.Thread(target=pretend)
        thread.start()
        with pytest.raises(NoTransportError, match="version 4 of the protocol, this side 3"):
            dial(address, SECRET, "greet")
        thread.join()


def test_who_trickles_runs_out_of_time(caplog: pytest.LogCaptureFixture) -> None:
    """One byte now and then keeps no thread."""
    with contextlib.closing(Server(SECRET, {"greet": greet}, "127.0.0.1", failure_timeout=0.5)) as server, stranger(server) as sock:
        sock.settimeout(0.05)
        started, ended = time.monotonic(), False
        while not ended:
            assert time.monotonic() < started + 30
            try:
                sock.sendall(b"\0")
                ended = sock.recv(1000) == b""
            except TimeoutError:
                pass
            except ConnectionError:
                ended = True
        eventually(lambda: not server._threads)
    assert "did not say in time" in caplog.text or "something else than frames" in caplog.text


def test_the_dialling_end_runs_out_of_time_too() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:  # takes connections, and says nothing
        address = Address("127.0.0.1", listener.getsockname()[1])
        with pytest.raises(PeerLostError, match=f"lost the agent at {address}: it did not say in time"):
            dial(address, SECRET, "greet", timeout=1.0)


def test_nobody_listens() -> None:
    with unheard() as address, pytest.raises(PeerLostError, match=f"cannot reach the agent at {address}: Connection refused"):
        dial(address, SECRET, "greet")
    with pytest.raises(PeerLostError, match=r"cannot reach the agent at no\.such\.host\.invalid:1"):
        dial(Address("no.such.host.invalid", 1), SECRET, "greet", timeout=5)


def test_a_crowd_of_strangers_is_bounded_and_keeps_nobody_out(server: Server) -> None:
    """Far more than it talks to at a time, all of which say nothing: half open, for all it knows."""
    before = psutil.Process().num_threads()
    with contextlib.ExitStack() as stack:
        first = stack.enter_context(stranger(server))
        assert b"Challenge" in first.recv(1000)
        for _ in range(4 * MAX_STRANGERS):
            stack.enter_context(stranger(server))
        assert greeting(server.address) == b"hello you"
        eventually(lambda: len(server._threads) <= MAX_STRANGERS)
        eventually(lambda: psutil.Process().num_threads() - before <= MAX_STRANGERS + 4)  # those that are forgotten are about to end
        assert everything(first) == b""  # it had to leave
    eventually(lambda: not server._threads)
    assert greeting(server.address) == b"hello you"


def test_a_length_alone_costs_no_memory(server: Server) -> None:
    before = psutil.Process().memory_info().rss
    with contextlib.ExitStack() as stack:
        for _ in range(MAX_STRANGERS):
            stack.enter_context(stranger(server)).sendall(lengths(4096, 0) + bytes(4000))
        assert psutil.Process().memory_info().rss - before < 64 << 20


def test_without_descriptors_it_waits_for_better_times(server: Server, caplog: pytest.LogCaptureFixture) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.ExitStack() as stack:
        sock = stack.enter_context(socket.socket())
        stack.callback(resource.setrlimit, resource.RLIMIT_NOFILE, (soft, hard))
        lowest_free = os.dup(0)
        os.close(lowest_free)
        resource.setrlimit(resource.RLIMIT_NOFILE, (lowest_free, hard))
        sock.settimeout(30)
        sock.connect((server.address.host, server.address.port))
        eventually(lambda: "raise the limit" in caplog.text)
    assert greeting(server.address) == b"hello you"
    assert caplog.text.count("raise the limit") == 1


def test_a_service_that_fails_ends_its_connection_only(caplog: pytest.LogCaptureFixture) -> None:
    def fail(connection: Connection, hello: bytes) -> None:
        raise RuntimeError("what now")

    with contextlib.closing(Server(SECRET, {"greet": greet, "fail": fail}, "127.0.0.1")) as server:
        with dial(server.address, SECRET, "fail") as connection:
            assert everything(connection.socket) == b""
        assert greeting(server.address) == b"hello you"
    assert "what now" in caplog.text


def test_close_ends_everything() -> None:
    """Also what a service waits on, and strangers; twice, and from a service's own thread."""
    waiting = threading.Event()

    def wait(connection: Connection, hello: bytes) -> None:
        waiting.set()
        connection.socket.recv(1)

    def close(connection: Connection, hello: bytes) -> None:
        server.close()

    before = set(threading.enumerate())
    server = Server(SECRET, {"wait": wait, "close": close}, "127.0.0.1")
    with dial(server.address, SECRET, "wait") as connection, stranger(server) as sock:
        assert waiting.wait(30)
        with dial(server.address, SECRET, "close") as closer:
            assert everything(closer.socket) == b""
        assert everything(connection.socket) == b""
        everything(sock)
        server.close()
        eventually(lambda: set(threading.enumerate()) <= before)
        with pytest.raises(PeerLostError, match="cannot reach"):
            dial(server.address, SECRET, "wait")


def test_bad_arguments_are_named_without_the_secret() -> None:
    for secret in (b"too short", "a" * 32, b""):
        with pytest.raises(ConfigError, match="give 32 bytes") as info:
            Server(secret, {}, "127.0.0.1")  # type: ignore[arg-type]
        assert not secret or str(secret) not in str(info.value)
    with pytest.raises(ConfigError, match=r"cannot listen on '192.0.2.1'"):
        Server(SECRET, {}, "192.0.2.1")


def test_admit_compares_all_of_a_proof() -> None:
    """Another service or hello than the one that was proved is refused."""
    for change in ({"service": "other"}, {"hello": b"other"}, {"nonce": bytes(31) + b"\1"}):
        client, sock = tcp_pair()
        with client:
            outcome: list[BaseException] = []

            def serve(sock: socket.socket = sock, outcome: list[BaseException] = outcome) -> None:
                try:
                    with Connection(sock, "the client") as connection:
                        admit(connection, SECRET, frozenset({"greet", "other"}))
                except NoTransportError as error:
                    outcome.append(error)

            thread = threading.Thread(target=serve)
            thread.start()
            challenge = msgspec.msgpack.decode(client.recv(1000)[len(prefix(b"")) :], type=Challenge)
            said = ("client", challenge.nonce, bytes(32), "greet", b"")
            mac = hmac.digest(SECRET, msgspec.msgpack.encode(said), "sha256")
            client.sendall(frame(msgspec.structs.replace(Proof("greet", b"", bytes(32), mac), **change)))
            thread.join()
            assert len(outcome) == 1
