"""Messages that are nearly right, in an agent's queue, its answers, its store and between hosts.

The agent lives, loses no room, and serves others as before.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import random
from collections import Counter
from collections.abc import Callable
from typing import Any

import msgspec
import pytest
import torch

from etha_ray.errors import AgentFailedError, EthaRayError, QueueError, error_class
from etha_ray.replica import Replica, ReplicaMember
from etha_ray.report import Span, TransferReport
from etha_ray.tensor_bus import connection, outcomes
from etha_ray.tensor_bus.batch_handler import BatchHandler
from etha_ray.tensor_bus.client import TensorBusClient
from etha_ray.tensor_bus.command_queue import CommandQueue
from etha_ray.tensor_bus.commands import BaseCommand, CancelTransfer, Failed, HurryTransfer, Ok, Outcome, decode_outcome, encode_outcome
from etha_ray.tensor_bus.messages import DataMessage, Message, RegistrationClosed, encode_command
from etha_ray.tensor_bus.queue_entry import CorruptEntry, unpack_entry
from etha_ray.tensor_bus.reply import Reply
from etha_ray.tensor_bus.state_file import outcome_key
from etha_ray.testing import eventually, succeed, together
from tests.security.heard import listening
from tests.security.inputs import entry_of
from tests.security.mutations import mutated, other_bytes
from tests.tensor_bus.cluster import LONG, LocalCluster, local_cluster
from tests.tensor_bus.far import far_agents
from tests.tensor_bus.test_commands import COMMANDS

COUNT = int(os.environ.get("ETHA_RAY_FUZZ", "1500"))
"""Messages of each kind of test; `make fuzz` sends more."""

NO_NAMES = [b"/a\0b", b"\xff\xfe", b"/" + b"x" * 300, b"/../x", b"x", b"/\xed\xa0\x80"]
"""Bytes in the place of a semaphore's name."""

NOT_ANSWERED = (CancelTransfer, HurryTransfer, DataMessage, RegistrationClosed)

_ROUND = 150
"""Messages to one client's name, after which it leaves and another comes: what waits for ever then ends."""


def works(cluster: LocalCluster, name: str) -> None:
    """New clients of both agents exchange a tensor."""
    first, second, source, target = cluster.batch(batch_id=name)
    try:
        cross(first, second, source, target)
    finally:
        for handler in (first, second):
            handler.client.close()
            cluster.clients.remove(handler.client)


def cross(first: BatchHandler, second: BatchHandler, source: torch.Tensor, target: torch.Tensor) -> None:
    """A transfer, and the right bytes."""
    succeed(lambda: first.transfer("send", blocking=True, timeout=LONG), lambda: second.transfer("recv", blocking=True, timeout=LONG))
    assert torch.equal(source, target)


def of_client(message: Message, client: TensorBusClient, batch_id: str, semaphore: str | None, command_id: int) -> BaseCommand:
    """The message as that client would send it, about its own batch."""
    fields = {name: getattr(message, name) for name in message.__struct_fields__}
    fields |= {"client_id": client.client_id, "semaphore_name": semaphore, "command_id": command_id, "timeout": 0.2}
    if "batch_id" in fields:
        fields["batch_id"] = batch_id
    return type(message)(**fields)


def ended(call: Callable[[], object]) -> object:
    """What it returns, or the error of ours that it raises."""
    try:
        return call()
    except EthaRayError as error:
        return error


class Sent:
    """Damaged commands to one queue, and what has to come of them: each is answered, or there is a line in the log, or it was no damage."""

    def __init__(self, queue: CommandQueue, rng: random.Random) -> None:
        self._queue, self._rng = queue, rng
        self._awaited: list[tuple[Reply, Message | CorruptEntry]] = []
        self._ids = itertools.count(1000, 1000)  # far apart: a damaged CancelTransfer must not be that of another command
        self.corrupt = self.unanswerable = self.misnumbered = self.ignored = 0
        self.refused = Counter[str]()

    def send(self, client: TensorBusClient, batch_id: str, listener: TensorBusClient) -> None:
        """One of any kind; for four fifths of those that have an answer the listener waits."""
        rng, command, number = self._rng, self._rng.choice(COMMANDS), next(self._ids)
        reply = None
        if not isinstance(command, NOT_ANSWERED) and rng.random() < 0.8:
            reply = listener._connection.pool.take("fuzz", batch_id, number)
        name = "" if reply is None else reply.name
        body = mutated(encode_command(of_client(command, client, batch_id, name or None, number)), rng)
        entry = entry_of(body, name.encode() if rng.random() < 0.95 else rng.choice(NO_NAMES), number)
        entry = entry if rng.random() < 0.95 else other_bytes(entry, rng)
        found = unpack_entry(0, entry)
        self._expect(found, reply)
        self._queue._append(entry, LONG, block=False, waited=False)

    def _expect(self, found: Message | CorruptEntry, reply: Reply | None) -> None:
        corrupt, says_nothing = isinstance(found, CorruptEntry), isinstance(found, CancelTransfer | HurryTransfer)
        self.corrupt += corrupt
        self.ignored += isinstance(found, NOT_ANSWERED) and not says_nothing
        if reply is not None:
            reaches = (found.semaphore_name, found.command_id) == (reply.name, reply.command_id)
            if reaches and not isinstance(found, NOT_ANSWERED):
                self._awaited.append((reply, found))
                return
            reply.abandon()
            if found.semaphore_name == reply.name:  # answered under another number, for which nobody waits
                self.misnumbered += 1
                return
        if found.semaphore_name is not None and not isinstance(found, NOT_ANSWERED):
            self.unanswerable += 1

    def hear(self) -> None:
        """Each of those that can be answered is: that it was no command, with an error, or as if it had been right."""
        for reply, found in self._awaited:
            assert reply.wait(LONG), f"nobody answers {found}"
            answer, corrupt = ended(reply.value), isinstance(found, CorruptEntry)
            assert type(answer) is not AgentFailedError, answer
            assert not corrupt or type(answer) is QueueError, answer
            if isinstance(answer, EthaRayError):
                self.refused[type(answer).__name__] += 1
        self._awaited.clear()


def assert_capacity_is_whole(queue: CommandQueue, capacity: int) -> None:
    eventually(lambda: queue.size() == 0)
    with queue._lock, queue._transaction() as txn:
        *_, now, used = queue._read_state(txn)
    assert (now, used) == (capacity, 0)


def test_commands(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outcomes, "_LINGER", 10 * LONG)  # they are read after the clients have left
    rng = random.Random(20261126)
    with listening() as heard, local_cluster(2) as cluster:
        queue = CommandQueue(cluster.paths[0].command_queue)
        capacity, sent = queue.capacity, Sent(queue, rng)
        for start in range(0, COUNT, _ROUND):
            name = f"round {start}"
            first, second, source, target = cluster.batch(torch.randn(12), batch_id=name)
            cross(first, second, source, target)  # after all that came before
            listener = cluster.client(0)  # a name of a semaphore is one client's, and is not used again once that has left
            for _ in range(min(_ROUND, COUNT - start)):
                sent.send(first.client, name, listener)
            cluster.leave(first, second)
            sent.hear()
            listener.close()
            cluster.clients.remove(listener)
            assert_capacity_is_whole(queue, capacity)
        works(cluster, "at last")
        assert_capacity_is_whole(queue, capacity)
        queue.close(destroy=False)
    assert heard.count("dropped the corrupt entry") == sent.corrupt > COUNT // 10
    unanswered = heard.count("a command cannot be answered", "nobody waits for %s any more")
    assert COUNT // 50 < sent.unanswerable <= unanswered <= sent.unanswerable + sent.misnumbered
    assert heard.count("a %s is ignored: there is no registration") >= sent.ignored > COUNT // 50  # agents say so of their own, too
    assert sum(sent.refused.values()) > COUNT // 4, sent.refused
    assert len(sent.refused) > 5, sent.refused
    assert heard.faults == []


def asked(first: BatchHandler, second: BatchHandler) -> list[Callable[[], object]]:
    """Calls that are answered at once, and two that wait for the other side."""
    return [
        lambda: first.client.ping(0.05),
        lambda: first.client.ready_replicas(f"pair of {first.batch_id}", 1, timeout=0.05),
        lambda: first.client.query_transfer_signal(first.batch_id, timeout=0.05),
        lambda: first.client.init_pair(f"pair of {first.batch_id}", "a", "b", 1, timeout=0.05),
        lambda: first.client.register_tensors(first.batch_id, [(torch.ones(1), f"pair of {first.batch_id}")], timeout=0.05),
        lambda: second.transfer("recv", blocking=True, timeout=0.05),
        lambda: first.transfer("send", blocking=True, timeout=0.05),
    ]


OUTCOMES: list[tuple[Outcome, Any]] = [
    (Ok(), Any),
    (Ok(True), bool),
    (Ok(7), int),
    (Ok(b"body"), bytes),
    (Ok(["ab", "cd"]), list[str]),
    (Ok({"slot": b"data"}), dict[str, bytes]),
    (Ok([Replica("b", 2, (ReplicaMember(0, 7, 1, "host", 77),))]), list[Replica]),
    (Ok(TransferReport("x", "send", 48, 0.5, 0.1, (Span("wait", 0.0, 0.4),), {"b[0]": 48}, 7)), TransferReport),
    (Failed("PeerLostError", "b[0] is gone"), TransferReport),
    (Failed("AgentFailedError", "KeyError: 'x'", "Traceback"), Any),
]
"""What agents answer, and what the client's call takes."""


def check_reply(reply: Reply, data: bytes, sent: Outcome, kind: Any) -> None:
    """``data`` came in place of ``sent``: it is read as what it is, or refused, and no failure becomes a success."""
    found: Outcome | None = None
    with contextlib.suppress(msgspec.DecodeError):
        found = decode_outcome(data)
    heard = reply.wait(0.0)
    if found is not None and found.command_id != reply.command_id:
        assert not heard, "that is the answer to another command"
        return
    assert heard
    value = ended(lambda: reply.value(kind))
    if isinstance(found, Failed):
        assert type(value) is error_class(found.kind)
    elif isinstance(value, EthaRayError):
        assert type(value) is AgentFailedError
        assert "its agent's answer cannot be read" in str(value)
        if found is not None:
            with pytest.raises(msgspec.ValidationError):
                msgspec.convert(found.value, kind)
    else:
        assert isinstance(found, Ok)
        assert isinstance(sent, Ok)
        taken = found.value if kind is Any else msgspec.convert(found.value, kind)
        assert msgspec.msgpack.encode(value) == msgspec.msgpack.encode(taken)


def test_each_reply_is_read_or_refused() -> None:
    rng = random.Random(8)
    with listening() as heard, local_cluster(1) as cluster:
        replies, state = cluster.client(0)._connection.pool, cluster.agents[0]._state
        for number in range(1, COUNT + 1):
            sent, kind = rng.choice(OUTCOMES)
            sent = msgspec.structs.replace(sent, command_id=number)
            data = mutated(encode_outcome(sent), rng)
            reply = replies.take("fuzz", "x", number)
            state.put(outcome_key(reply.name), data)
            assert reply._semaphore is not None
            reply._semaphore.release()
            check_reply(reply, data, sent, kind)
            state.delete([outcome_key(reply.name)])
            reply.abandon()
    assert heard.faults == []


def test_replies(monkeypatch: pytest.MonkeyPatch) -> None:
    """What agents answer, changed on its way: every call ends with an error of ours, or as if nothing had been changed."""
    rng, count = random.Random(7), 0
    monkeypatch.setattr(connection, "_GRACE", 0.0)
    with listening() as heard, local_cluster(2) as cluster:
        while count < COUNT // 15:
            first, second, _, _ = cluster.batch(batch_id=f"round {count}")
            with monkeypatch.context() as patch:
                patch.setattr(outcomes, "encode_outcome", lambda outcome: mutated(encode_outcome(outcome), rng))
                for call in asked(first, second) * 5:
                    ended(call)
                    count += 1
            cluster.leave(first, second)
        monkeypatch.undo()
        works(cluster, "at last")
    assert heard.faults == []


def test_the_network() -> None:
    """Bytes between agents of two hosts, some of them changed: a transfer ends with the right ones, or with an error."""
    rng = random.Random(3)
    damage = Damage(rng)
    with listening() as heard, far_agents("auto") as (cluster, relays):
        for number in range(max(4, COUNT // 250)):
            first, second, source, target = cluster.batch(torch.randn(3000), torch.zeros(3000), batch_id=f"round {number}")
            for relay in relays.values():
                relay.garble = damage
            ends = [
                lambda: first.transfer("send", blocking=True, timeout=1.0),  # noqa: B023
                lambda: second.transfer("recv", blocking=True, timeout=1.0),  # noqa: B023
            ]
            sent, received = together(*ends)
            for end in (sent, received):
                assert not isinstance(end, BaseException) or isinstance(end, EthaRayError), end
            assert isinstance(received, EthaRayError) or torch.equal(source, target)
            for relay in relays.values():
                relay.garble = None
            cluster.leave(first, second)
            failed: list[str] = []
            while len(failed) < 3:  # what was damaged before may only be found now, on either channel
                try:
                    works(cluster, f"after {number}, {len(failed)}")
                    break
                except EthaRayError as error:
                    failed.append(f"{type(error).__name__}: {error}")
            else:
                pytest.fail(f"round {number}: nothing crosses any more: {failed}")
    assert damage.count
    assert heard.faults == []


class Damage:
    """Changes every fourth piece that passes."""

    def __init__(self, rng: random.Random) -> None:
        self._rng, self.count = rng, 0

    def __call__(self, data: bytes) -> bytes:
        if self._rng.random() < 0.75:
            return data
        self.count += 1
        return other_bytes(data, self._rng)
