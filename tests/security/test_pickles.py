"""Pickles that would write a file, in the place of everything that another process may write: none of them is ever executed."""

from __future__ import annotations

import contextlib
import io
import os
import pickle
import socket
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

from etha_ray.errors import AgentFailedError, EthaRayError, QueueError
from etha_ray.net import Address
from etha_ray.tensor_bus.command_queue import CommandQueue
from etha_ray.tensor_bus.messages import encode_command
from etha_ray.tensor_bus.state_file import outcome_key
from etha_ray.testing import eventually, together
from tests.security.heard import listening
from tests.security.inputs import all_inputs, entry_of
from tests.security.test_fuzz import ended, of_client, works
from tests.security.test_fuzz_store import heal_the_store
from tests.tensor_bus.cluster import LONG, local_cluster
from tests.tensor_bus.far import far_agents
from tests.tensor_bus.test_commands import COMMANDS


class Bomb:
    """Writes a file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.marker),)

    @property
    def exploded(self) -> bool:
        """Whether that happened."""
        return self.marker.exists()

    def forms(self) -> list[bytes]:
        """As all protocols of pickle have it, and as `torch.save` does."""
        file = io.BytesIO()
        torch.save(self, file)
        return [*(pickle.dumps(self, protocol) for protocol in range(pickle.HIGHEST_PROTOCOL + 1)), file.getvalue()]


@pytest.fixture
def bomb(tmp_path: Path) -> Iterator[Bomb]:
    """One that has not exploded when the test ends, though each of its forms would have."""
    bomb = Bomb(tmp_path / "exploded")
    yield bomb
    assert not bomb.exploded
    *pickles, saved = bomb.forms()
    for load, form in [*((pickle.load, form) for form in pickles), (lambda file: torch.load(file, weights_only=False), saved)]:
        load(io.BytesIO(form))
        bomb.marker.rmdir()


def planted(value: Any, bomb: bytes) -> Iterator[Any]:
    """The value with the bomb in the place of each of its parts, one at a time; also within parts that are encoded themselves."""
    yield bomb
    if isinstance(value, dict):
        for key, each in value.items():
            yield from ({**value, key: other} for other in planted(each, bomb))
    elif isinstance(value, list):
        for at, each in enumerate(value):
            yield from ([*value[:at], other, *value[at + 1 :]] for other in planted(each, bomb))
    elif isinstance(value, bytes):
        with contextlib.suppress(msgspec.DecodeError):
            inner = msgspec.msgpack.decode(value)
            if isinstance(inner, dict | list):
                yield from map(msgspec.msgpack.encode, planted(inner, bomb))


def encodings(value: bytes, bomb: bytes) -> Iterator[bytes]:
    """The bomb; and what `planted` makes of what ``value`` encodes, with all but the pickles of the middle ages."""
    yield bomb
    if bomb[:2] in (b"\x80\x02", b"\x80\x03", b"\x80\x04"):
        return
    with contextlib.suppress(msgspec.DecodeError):
        yield from map(msgspec.msgpack.encode, planted(msgspec.msgpack.decode(value), bomb))


def test_wherever_bytes_are_read(bomb: Bomb, tmp_path: Path) -> None:
    count = 0
    with listening() as heard, all_inputs(tmp_path) as inputs:
        for name, each in inputs.items():
            for form in bomb.forms():
                for data in encodings(each.value, form):
                    with contextlib.suppress(EthaRayError):
                        each.read(data)
                    count += 1
            assert not bomb.exploded, name
    assert count > 10 * len(inputs)
    assert heard.faults == []


def test_in_the_queue_and_in_answers(bomb: Bomb) -> None:
    with listening() as heard, local_cluster(2) as cluster:
        queue, state = CommandQueue(cluster.paths[0].command_queue), cluster.agents[0]._state
        replies = cluster.client(0)._connection.pool
        first, _, _, _ = cluster.batch(batch_id="x")
        for form in bomb.forms():
            queue._append(form, LONG, block=False, waited=False)
            reply = replies.take("pickle", "x", 1)
            queue._append(entry_of(form, reply.name.encode(), 1), LONG, block=False, waited=False)
            assert reply.wait(LONG)
            assert type(ended(reply.value)) is QueueError
            for command in COMMANDS:
                for body in encodings(encode_command(of_client(command, first.client, "x", None, 1)), form):
                    while queue._append(entry_of(body, b"", 1), LONG, block=False, waited=False) is None:
                        eventually(lambda: queue.size() == 0)
            eventually(lambda: queue.size() == 0)
            reply = replies.take("pickle", "x", 2)
            state.put(outcome_key(reply.name), form)
            assert reply._semaphore is not None
            reply._semaphore.release()
            assert reply.wait(LONG)
            assert type(ended(reply.value)) is AgentFailedError
            assert not bomb.exploded
        works(cluster, "at last")
        queue.close(destroy=False)
    assert heard.faults == []


def test_in_the_store(bomb: Bomb) -> None:
    """In place of all that members have there, while they meet."""
    with listening() as heard, local_cluster(2) as cluster:
        for form in bomb.forms():
            one, two = cluster.client(0), cluster.client(1)
            for client, name, other in ((one, "a", "b"), (two, "b", "a")):
                client.init_pair("p", name, other, 1, blocking=False)
            for client in (one, two):
                client.register_tensors("x", [(torch.ones(8), "p")], blocking=False)
            eventually(lambda: cluster.store.list("pair/"))
            for key in cluster.store.list():
                cluster.store.set_bytes(key, form)
            assert isinstance(ended(partial(one.ready_replicas, "p", 1, timeout=LONG)), EthaRayError | list)
            assert isinstance(ended(partial(two.init_pair, "p", "b", "a", 1, timeout=0.1)), EthaRayError)
            for client in (one, two):
                client.close()
                cluster.clients.remove(client)
            heal_the_store(cluster)
            assert not bomb.exploded
        works(cluster, "at last")
    assert heard.faults == []


def test_on_the_network(bomb: Bomb) -> None:
    """Said to a server by nobody it knows, and in place of what agents say to one another."""
    with listening() as heard, far_agents("auto") as (cluster, relays):
        for form in bomb.forms():
            for address in relays:
                to = Address.parse(address)
                with socket.create_connection((to.host, to.port), timeout=LONG) as stranger, contextlib.suppress(OSError):
                    stranger.sendall(form)
                    stranger.shutdown(socket.SHUT_WR)
                    while stranger.recv(4096):
                        pass
            first, second, _, _ = cluster.batch(torch.randn(3000), torch.zeros(3000), batch_id="x")
            for relay in relays.values():
                relay.garble = lambda _, form=form: form  # type: ignore[misc]
            ends = together(
                lambda: first.transfer("send", blocking=True, timeout=0.5),  # noqa: B023
                lambda: second.transfer("recv", blocking=True, timeout=0.5),  # noqa: B023
            )
            assert all(isinstance(end, EthaRayError) for end in ends)
            for relay in relays.values():
                relay.garble = None
            cluster.leave(first, second)
            assert not bomb.exploded
        for tries in range(3):  # what was damaged before may only be found now, on either channel
            with contextlib.suppress(EthaRayError):
                works(cluster, f"at last {tries}")
                break
        else:
            pytest.fail("nothing crosses any more")
    assert heard.faults == []
