"""Messages that are nearly right, in an agent's queue, its answers, its store and between hosts.

The agent lives, loses no room, and serves others as before.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import random
import threading
import zlib
from collections import Counter
from collections.abc import Callable
from functools import partial

import posix_ipc
import pytest
import torch

import etha_ray
from etha_ray.errors import EthaRayError, LeaseExpiredError
from etha_ray.kvstore import KVStore
from etha_ray.tensor_bus import connection, outcomes
from etha_ray.tensor_bus.agent import TensorBusAgent
from etha_ray.tensor_bus.batch_handler import BatchHandler
from etha_ray.tensor_bus.board import Board
from etha_ray.tensor_bus.client import TensorBusClient
from etha_ray.tensor_bus.command_queue import CommandQueue
from etha_ray.tensor_bus.commands import BaseCommand, CancelTransfer, decode_outcome, encode_outcome
from etha_ray.tensor_bus.messages import DataMessage, Message, RegistrationClosed, encode_command
from etha_ray.tensor_bus.queue_entry import _AFTER_CHECKSUM, _CHECKSUM, CorruptEntry, unpack_entry
from etha_ray.tensor_bus.records import agent_key, encode
from etha_ray.tensor_bus.semaphores import generate_semaphore_name, open_semaphore
from etha_ray.tensor_bus.state_file import StateFile, outcome_key
from etha_ray.testing import eventually, succeed, together
from tests.security.mutations import mutated, other_bytes
from tests.tensor_bus.cluster import LONG, LocalCluster, local_cluster
from tests.tensor_bus.far import far_agents
from tests.tensor_bus.test_commands import COMMANDS

COUNT = int(os.environ.get("ETHA_RAY_FUZZ", "1500"))
"""Messages of each kind of test; `make fuzz` sends more."""

NO_NAMES = [b"/a\0b", b"\xff\xfe", b"/" + b"x" * 300, b"/../x", b"x", b"/\xed\xa0\x80"]
"""Bytes in the place of a semaphore's name."""

NOT_ANSWERED = (CancelTransfer, DataMessage, RegistrationClosed)

_GROWN = 1 << 17
"""Bytes of a value that has been damaged often enough: again and again it would become as large as memory."""

_ROUND = 150
"""Messages to one client's name, after which it leaves and another comes: what waits for ever then ends."""


def entry_of(body: bytes, name: bytes, command_id: int) -> bytes:
    """As it would stand in the queue, its checksums right."""
    prefix = _AFTER_CHECKSUM.pack(zlib.crc32(body), command_id, len(name)) + name
    return _CHECKSUM.pack(zlib.crc32(prefix)) + prefix + body


def faults(caplog: pytest.LogCaptureFixture) -> list[str]:
    """What agents logged with a traceback: that is nobody's doing but theirs."""
    return [f"{record.getMessage()}: {record.exc_info[1]!r}" for record in caplog.records if record.exc_info and record.exc_info[1]]


def works(cluster: LocalCluster, name: str) -> None:
    """New clients of both agents exchange a tensor."""
    first, second, source, target = cluster.batch(batch_id=name)
    try:
        succeed(lambda: first.transfer("send", blocking=True, timeout=LONG), lambda: second.transfer("recv", blocking=True, timeout=LONG))
        assert torch.equal(source, target)
    finally:
        for handler in (first, second):
            handler.client.close()
            cluster.clients.remove(handler.client)


def of_client(message: Message, client: TensorBusClient, batch_id: str, semaphore: str | None, command_id: int) -> BaseCommand:
    """The message as that client would send it, about its own batch."""
    fields = {name: getattr(message, name) for name in message.__struct_fields__}
    fields |= {"client_id": client.client_id, "semaphore_name": semaphore, "command_id": command_id, "timeout": 0.2}
    if "batch_id" in fields:
        fields["batch_id"] = batch_id
    return type(message)(**fields)


class Sent:
    """Damaged commands to one queue: how many of them are none, and the semaphores of those that must be answered."""

    def __init__(self, queue: CommandQueue, rng: random.Random) -> None:
        self._queue, self._rng = queue, rng
        self._semaphores: dict[str, tuple[posix_ipc.Semaphore, int]] = {}
        self._ids = itertools.count(1)
        self.corrupt = self.answered = 0

    def send(self, client: TensorBusClient, batch_id: str) -> None:
        """One of any kind; somebody waits for every fifth of those that have an answer."""
        rng, command, number = self._rng, self._rng.choice(COMMANDS), next(self._ids)
        semaphore = None
        if not isinstance(command, NOT_ANSWERED) and rng.random() < 0.2:
            semaphore = open_semaphore(generate_semaphore_name("fuzz", batch_id), create=True)
        name = "" if semaphore is None else semaphore.name
        body = mutated(encode_command(of_client(command, client, batch_id, name or None, number)), rng)
        entry = entry_of(body, name.encode() if rng.random() < 0.95 else rng.choice(NO_NAMES), number)
        entry = entry if rng.random() < 0.95 else other_bytes(entry, rng)
        found = unpack_entry(0, entry)
        self.corrupt += isinstance(found, CorruptEntry)
        if semaphore is not None:
            if found.semaphore_name == name and found.command_id == number and not isinstance(found, NOT_ANSWERED):
                self._semaphores[name] = semaphore, number
            else:
                semaphore.unlink()
                semaphore.close()
        self._queue._append(entry, block=False, waited=False)

    def hear(self, state: StateFile) -> None:
        """Each of them is answered: that it was no command, with an error, or as if it had been right."""
        for name, (semaphore, number) in self._semaphores.items():
            semaphore.acquire(LONG)
            data = state.get(outcome_key(name))
            assert data is not None
            assert decode_outcome(data).command_id == number
            semaphore.unlink()
            semaphore.close()
        self.answered += len(self._semaphores)
        self._semaphores.clear()


def test_commands(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.ERROR)
    rng = random.Random(20261126)
    with local_cluster(2) as cluster:
        queue, state = CommandQueue(cluster.paths[0].command_queue), StateFile(cluster.paths[0].state)
        capacity, sent = queue.capacity, Sent(queue, rng)
        for start in range(0, COUNT, _ROUND):
            name = f"round {start}"
            first, second, _, _ = cluster.batch(batch_id=name)
            for _ in range(min(_ROUND, COUNT - start)):
                sent.send(first.client, name)
            for handler in (first, second):
                with contextlib.suppress(EthaRayError):  # it was closed by one of the messages
                    handler.client.close()
                cluster.clients.remove(handler.client)
            sent.hear(state)
        works(cluster, "at last")
        eventually(lambda: queue.size() == 0)
        with queue._lock, queue._transaction() as txn:
            *_, now, used = queue._read_state(txn)
        assert (now, used) == (capacity, 0)
        queue.close(destroy=False)
        state.close()
    said = [record.getMessage() for record in caplog.records]
    assert sum("dropped the corrupt entry" in line for line in said) == sent.corrupt > COUNT // 10
    assert sent.answered > COUNT // 20
    assert faults(caplog) == []


def asked(first: BatchHandler, second: BatchHandler) -> list[Callable[[], object]]:
    """Calls that are answered at once, and two that wait for the other side."""
    return [
        lambda: first.client.ping(0.05),
        lambda: first.client.ready_replicas(f"pair of {first.batch_id}", 1, timeout=0.05),
        lambda: first.client.query_transfer_signal(first.batch_id, timeout=0.05),
        lambda: first.client.init_pair(f"pair of {first.batch_id}", "a", "b", 1, timeout=0.05),
        lambda: first.client.register_tensors(first.batch_id, [(torch.ones(1), f"pair of {first.batch_id}")], timeout=0.05),
        lambda: second.transfer("recv").result(0.05),
        lambda: first.transfer("send", blocking=True, timeout=0.05),
    ]


def test_replies(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """What agents answer, changed on its way: every call ends with an error of ours, or as if nothing had been changed."""
    rng, count = random.Random(7), 0
    monkeypatch.setattr(connection, "_GRACE", 0.0)
    with local_cluster(2) as cluster:
        while count < COUNT // 5:
            first, second, _, _ = cluster.batch(batch_id=f"round {count}")
            with monkeypatch.context() as patch:
                patch.setattr(outcomes, "encode_outcome", lambda outcome: mutated(encode_outcome(outcome), rng))
                for call in asked(first, second) * 5:
                    with contextlib.suppress(EthaRayError, TimeoutError):
                        call()
                    count += 1
            for handler in (first, second):
                with contextlib.suppress(EthaRayError):
                    handler.client.close()
                cluster.clients.remove(handler.client)
        monkeypatch.undo()
        works(cluster, "at last")
    assert faults(caplog) == []


def test_the_network(caplog: pytest.LogCaptureFixture) -> None:
    """Bytes between agents of two hosts, some of them changed: a transfer ends with the right ones, or with an error."""
    rng = random.Random(3)
    damage = Damage(rng)
    with far_agents("auto") as (cluster, relays):
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
            for handler in (first, second):
                with contextlib.suppress(EthaRayError):
                    handler.client.close()
                cluster.clients.remove(handler.client)
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
    assert faults(caplog) == []


class Damage:
    """Changes every fourth piece that passes."""

    def __init__(self, rng: random.Random) -> None:
        self._rng, self.count = rng, 0

    def __call__(self, data: bytes) -> bytes:
        if self._rng.random() < 0.75:
            return data
        self.count += 1
        return other_bytes(data, self._rng)


def damage_the_store(store: KVStore, rng: random.Random, times: int) -> None:
    """Values there become nearly right ones, whoever they are of: agents' records too."""
    for _ in range(times):
        if found := sorted((key, value) for key, value in store.list().items() if 0 < len(value) < _GROWN):
            key, value = rng.choice(found)
            store.set_bytes(key, mutated(value, rng))


def heal_the_store(cluster: LocalCluster) -> None:
    """What cannot be read any more is left there by who it was of. Agents' records are of their leases again."""
    cluster.store.delete_prefix("")
    for agent in cluster.agents.values():

        def is_there(agent: TensorBusAgent = agent) -> bool:
            with contextlib.suppress(LeaseExpiredError):  # where this process stood still; another is on its way
                agent._presence.lease.set_bytes(agent_key(agent.rank), encode(agent.record))
                return True
            return False

        eventually(is_there)


def test_the_store(caplog: pytest.LogCaptureFixture) -> None:
    """What pairs and registrations read there, changed by a stranger at any moment."""
    rng = random.Random(42)
    with local_cluster(2) as cluster:
        store = cluster.store
        for _ in range(max(4, COUNT // 100)):
            one, two = cluster.client(0), cluster.client(1)
            for client, name, other in ((one, "a", "b"), (two, "b", "a")):
                client.init_pair("p", name, other, 1, blocking=False)
            for client in (one, two):
                client.register_tensors("x", [(torch.ones(8), "p")], blocking=False)
            damage_the_store(store, rng, 25)
            for client in (one, two):
                client.close()
                cluster.clients.remove(client)
            heal_the_store(cluster)
        works(cluster, "at last")
    assert faults(caplog) == []


def test_what_is_said_beside_transfers_in_the_store(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    """Notices, their tables, who holds which version: publishers and receivers go on, or end with an error of ours."""
    monkeypatch.setattr(connection, "_GRACE", 0.0)
    rng, ended = random.Random(11), Counter[str]()
    with local_cluster(2) as cluster:
        store = cluster.store
        for number in range(max(4, COUNT // 100)):
            one, two = cluster.client(0), cluster.client(1)
            name, done = f"policy{number}", threading.Event()

            def give(client: TensorBusClient, name: str) -> None:
                with etha_ray.publish({"w": torch.ones(8)}, name, client=client, world_size=1, rank=0) as publisher:
                    publisher.push(timeout=0.5)
                    publisher.push(timeout=0.5)

            def take(client: TensorBusClient, name: str) -> None:
                with etha_ray.pull({"w": torch.zeros(8)}, name, client=client, world_size=1, rank=0, timeout=0.5) as receiver:
                    receiver.update(0.5)
                    receiver.update(0.5)

            def ask(client: TensorBusClient, name: str) -> None:
                for _ in range(20):
                    Board(client, f"weights/{name}").read(timeout=0.5)
                    client.ready_replicas(name, 1, timeout=0.5)

            def damage(done: threading.Event) -> None:
                while not done.wait(rng.random() * 0.01):
                    damage_the_store(store, rng, 1)

            damaging = threading.Thread(target=damage, args=(done,))
            damaging.start()
            try:
                results = together(*[partial(call, client, name) for call, client in ((give, one), (take, two), (ask, one))])
            finally:
                done.set()
                damaging.join()
            for result in results:
                assert result is None or isinstance(result, EthaRayError), result
                ended[type(result).__name__] += 1
            for client in (one, two):
                with contextlib.suppress(EthaRayError):
                    client.close()
                cluster.clients.remove(client)
            heal_the_store(cluster)
        works(cluster, "at last")
    assert len(ended) > 1, f"some go on, and some end with an error: {ended}"
    assert faults(caplog) == []
