"""Channels between real processes, and what becomes of them when the other end dies in each of the ways it can."""

from __future__ import annotations

import contextlib
import logging
import queue
import re
import signal
import socket
import struct
import threading
import zlib
from collections.abc import Iterator

import pytest

from etha_ray.errors import ConfigError, EthaRayError, PeerLostError
from etha_ray.net import MAX_MESSAGE, Address, Channel, Server, accept_channels, connect, dial
from etha_ray.net import channel as channels
from etha_ray.net.channel import MAX_OUTBOX
from etha_ray.net.connection import prefix
from etha_ray.testing import eventually
from tests.net.namespaces import cable
from tests.net.peer import FAILURE_TIMEOUT, SECRET, first_word, peer
from tests.net.silent import unheard

_PATIENCE = 60.0


class Ends:
    """What is heard of channels; one for any number of them."""

    def __init__(self, failure_timeout: float) -> None:
        self.failure_timeout = failure_timeout
        self.messages: queue.Queue[bytes] = queue.Queue()
        self.losses: queue.Queue[str] = queue.Queue()
        self.opened: queue.Queue[Channel] = queue.Queue()

    def receive(self, channel: Channel, message: bytes) -> None:
        self.messages.put(message)

    def lost(self, channel: Channel, reason: EthaRayError) -> None:
        self.losses.put(str(reason))

    def connect(self, address: Address, service: str = "test", hello: bytes = b"") -> Channel:
        return connect(address, SECRET, service, self.receive, self.lost, hello=hello, failure_timeout=self.failure_timeout)

    def serve(self) -> Server:
        service = accept_channels(self.receive, self.lost, opened=self.opened.put, failure_timeout=self.failure_timeout)
        return Server(SECRET, {"test": service}, "127.0.0.1")

    def lost_once(self) -> str:
        reason = self.losses.get(timeout=_PATIENCE)
        assert self.losses.empty()
        return reason


@pytest.fixture
def failure_timeout() -> float:
    """Of both ends: so long that no death is seen where nobody dies, even if the machine stands still."""
    return _PATIENCE


deaths = pytest.mark.parametrize("failure_timeout", [FAILURE_TIMEOUT])


@pytest.fixture
def here(failure_timeout: float) -> Ends:
    """The end that connects."""
    return Ends(failure_timeout)


@pytest.fixture
def there(failure_timeout: float) -> Ends:
    return Ends(failure_timeout)


@pytest.fixture
def server(there: Ends) -> Iterator[Server]:
    with contextlib.closing(there.serve()) as server:
        yield server


def test_messages_arrive_in_order_both_ways(server: Server, here: Ends, there: Ends) -> None:
    messages = [b"%d" % n * (n % 50) for n in range(2000)]
    with contextlib.closing(here.connect(server.address, hello=b"me")) as channel:
        accepted = there.opened.get(timeout=_PATIENCE)
        assert accepted.hello == b"me"
        for message in messages:
            channel.send(message)
            accepted.send(message[::-1])
        assert [there.messages.get(timeout=_PATIENCE) for _ in messages] == messages
        assert [here.messages.get(timeout=_PATIENCE)[::-1] for _ in messages] == messages


def test_a_message_may_be_large_or_empty(server: Server, here: Ends, there: Ends) -> None:
    largest = bytes(range(256)) * (MAX_MESSAGE // 256)
    with contextlib.closing(here.connect(server.address)) as channel:
        for message in (b"", largest, b"", b"x" * 65537):
            channel.send(message)
            assert there.messages.get(timeout=_PATIENCE) == message
        with pytest.raises(ValueError, match="67108865 bytes"):
            channel.send(largest + b"\0")


def test_messages_of_many_threads_arrive_whole(server: Server, here: Ends, there: Ends) -> None:
    with contextlib.closing(here.connect(server.address)) as channel:
        threads = [threading.Thread(target=lambda n=n: [channel.send(b"%d" % n * 1000) for _ in range(100)]) for n in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        arrived = sorted(there.messages.get(timeout=_PATIENCE) for _ in range(800))
    assert arrived == sorted(b"%d" % n * 1000 for n in range(8) for _ in range(100))


def test_what_was_sent_before_close_arrives(server: Server, here: Ends, there: Ends, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also before the connection stood."""
    monkeypatch.setattr(channels, "_CLOSE_GRACE", _PATIENCE)
    channel = here.connect(server.address)
    for n in range(100):
        channel.send(b"%d" % n)
    channel.close()
    assert [there.messages.get(timeout=_PATIENCE) for _ in range(100)] == [b"%d" % n for n in range(100)]
    assert "it closed the channel" in there.lost_once()
    assert here.losses.empty()
    channel.close()
    with pytest.raises(PeerLostError, match="was closed"):
        channel.send(b"")


def test_close_ends_the_threads(here: Ends, there: Ends) -> None:
    before = set(threading.enumerate())
    server = there.serve()
    channels = [here.connect(server.address) for _ in range(5)]
    for _ in channels:
        there.opened.get(timeout=_PATIENCE)
    for channel in channels:
        channel.close()
    server.close()
    eventually(lambda: set(threading.enumerate()) <= before)
    assert here.losses.empty()


def test_close_from_a_callback(server: Server, there: Ends) -> None:
    closed = threading.Event()

    def close(channel: Channel, message: bytes) -> None:
        channel.close()
        closed.set()

    connect(server.address, SECRET, "test", close, lambda *_: None)
    there.opened.get(timeout=_PATIENCE).send(b"leave")
    assert closed.wait(_PATIENCE)
    assert "closed the channel" in there.lost_once()


def test_close_while_nobody_answers(here: Ends) -> None:
    """A host that takes the connection, and says nothing."""
    before = set(threading.enumerate())
    with socket.create_server(("127.0.0.1", 0)) as listener:
        channel = connect(Address(*listener.getsockname()), SECRET, "test", here.receive, here.lost, failure_timeout=3600)
        channel.send(b"anybody?")
        listener.accept()[0].detach()  # there, and silent for good
        channel.close()
    assert set(threading.enumerate()) <= before
    assert here.losses.empty()


def test_a_server_that_closes_is_a_loss(server: Server, here: Ends, there: Ends) -> None:
    here.connect(server.address)
    there.opened.get(timeout=_PATIENCE)
    server.close()
    assert f"lost the agent at {server.address}" in here.lost_once()


def test_nobody_there(here: Ends) -> None:
    with unheard() as address:
        channel = here.connect(address)
        assert f"cannot reach the agent at {address}" in here.lost_once()
        with pytest.raises(PeerLostError, match=f"cannot reach the agent at {address}"):
            channel.send(b"")
        channel.close()


def test_a_wrong_secret_is_a_loss_and_no_secret_an_error(server: Server, here: Ends) -> None:
    connect(server.address, bytes(32), "test", here.receive, here.lost)
    assert "does not know this pool's secret" in here.lost_once()
    with pytest.raises(ConfigError, match="give 32 bytes"):
        connect(server.address, b"", "test", here.receive, here.lost)


@deaths
def test_a_callback_that_takes_long_is_no_death(server: Server, there: Ends) -> None:
    """Of several failure timeouts, while the other end has more to say than the sockets hold."""
    release, heard = threading.Event(), threading.Semaphore(0)
    lost: queue.Queue[str] = queue.Queue()

    def receive(channel: Channel, message: bytes) -> None:
        release.wait(_PATIENCE)
        heard.release()

    channel = connect(server.address, SECRET, "test", receive, lambda _, reason: lost.put(str(reason)), failure_timeout=FAILURE_TIMEOUT)
    accepted = there.opened.get(timeout=_PATIENCE)
    for _ in range(10):
        accepted.send(bytes(4 << 20))
    assert not release.wait(2 * FAILURE_TIMEOUT)  # nothing to wait for: nothing must happen
    release.set()
    for _ in range(10):
        assert heard.acquire(timeout=_PATIENCE)
    assert lost.empty()
    assert there.losses.empty()
    channel.close()


def test_an_end_that_takes_nothing_is_lost_when_too_much_waits(server: Server, there: Ends) -> None:
    release = threading.Event()
    lost: queue.Queue[str] = queue.Queue()
    connect(server.address, SECRET, "test", lambda *_: release.wait(_PATIENCE), lambda _, reason: lost.put(str(reason)))
    accepted = there.opened.get(timeout=_PATIENCE)
    message = bytes(MAX_MESSAGE)

    def pile_up() -> None:
        for _ in range(MAX_OUTBOX // MAX_MESSAGE + 4):  # some are in the sockets, and in the writer's hands
            accepted.send(message)

    with pytest.raises(PeerLostError, match="bytes wait to be taken by it"):
        pile_up()
    assert "bytes wait to be taken by it" in there.lost_once()
    release.set()
    lost.get(timeout=_PATIENCE)


def test_a_callback_that_fails_ends_its_channel(server: Server, there: Ends, caplog: pytest.LogCaptureFixture) -> None:
    lost: queue.Queue[str] = queue.Queue()

    def fail(channel: Channel, message: bytes) -> None:
        raise RuntimeError("what now")

    with caplog.at_level(logging.ERROR):
        connect(server.address, SECRET, "test", fail, lambda _, reason: lost.put(str(reason)))
        there.opened.get(timeout=_PATIENCE).send(b"")
        assert "the handler of its messages failed: what now" in lost.get(timeout=_PATIENCE)
    assert "what now" in caplog.text
    there.lost_once()


def _message(of: bytes = b"\x91\xa1m") -> bytes:
    return prefix(of, b"payload") + of + b"payload"


@pytest.mark.parametrize(
    "garbage",
    [
        b"\xff" * 100,
        _message(of=b"\xc1"),
        struct.pack("!HIII", 3, MAX_MESSAGE + 1, zlib.crc32(struct.pack("!HI", 3, MAX_MESSAGE + 1)), 0) + b"\x91\xa1m",
        b"\0\3\0\0\1\0" + _message()[6:],  # of which most would never come
        b"\1\0" + _message()[2:],
        _message()[:-1] + b"!",
    ],
    ids=["noise", "header", "size", "another payload's length", "another header's length", "another byte"],
)
def test_garbage_of_somebody_with_the_secret(server: Server, here: Ends, there: Ends, garbage: bytes) -> None:
    with dial(server.address, SECRET, "test") as connection:
        connection.socket.sendall(garbage)
        assert re.search("it sent (something else|a header)|what it sent was damaged", there.lost_once())
    with contextlib.closing(here.connect(server.address)) as channel:
        channel.send(b"still there?")
        assert there.messages.get(timeout=_PATIENCE) == b"still there?"


@deaths
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "stopped"])
def test_a_server_process_that_dies_is_noticed(how: signal.Signals, here: Ends) -> None:
    with peer("echo", "127.0.0.1") as process:
        address = Address("127.0.0.1", int(first_word(process)))
        channel = here.connect(address, "echo")
        channel.send(b"there?")
        assert here.messages.get(timeout=_PATIENCE) == b"there?"
        process.send_signal(how)
        reason = here.lost_once()
        assert str(address) in reason
        assert ("nothing was heard of it for 3 s" in reason) == (how == signal.SIGSTOP)
        with pytest.raises(PeerLostError, match=str(address)):
            channel.send(b"there?")
        channel.close()


@deaths
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "stopped"])
def test_a_client_process_that_dies_is_noticed(how: signal.Signals, server: Server, there: Ends) -> None:
    with peer("call", str(server.address)) as process:
        assert there.messages.get(timeout=_PATIENCE) == b"here I am"
        assert there.opened.get().hello == b"peer"
        process.send_signal(how)
        reason = there.lost_once()
        assert "the agent that connected from 127.0.0.1" in reason
        assert ("nothing was heard of it for 3 s" in reason) == (how == signal.SIGSTOP)


@deaths
def test_a_process_that_was_stopped_itself_does_not_blame_the_other(server: Server, there: Ends) -> None:
    """It was away for long, and finds the other end's heartbeats waiting: its first look at the clock must not end it."""
    with peer("call", str(server.address)) as process:
        there.messages.get(timeout=_PATIENCE)
        process.send_signal(signal.SIGSTOP)
        there.lost_once()  # a whole failure timeout later
        process.send_signal(signal.SIGCONT)
        assert first_word(process) == "lost"  # because this end closed, and it lives to tell
        assert process.poll() is None


@deaths
@pytest.mark.parametrize("side", ["near", "far"])
def test_a_cable_that_is_cut_is_noticed(side: str, here: Ends) -> None:
    """No end of the connection is told anything: only silence says it."""
    with cable() as line, peer("echo", line.host, prefix=line.over_there) as process:
        address = Address(line.host, int(first_word(process)))
        channel = here.connect(address, "echo")
        channel.send(b"there?")
        assert here.messages.get(timeout=_PATIENCE) == b"there?"
        line.cut(side)
        assert str(address) in here.lost_once()
        channel.close()
