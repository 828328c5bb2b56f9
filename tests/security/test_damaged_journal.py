"""What the agent before left in its state file, damaged: the next one takes up the rest, and serves."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import msgspec
import pytest

from etha_ray.config import AgentPaths
from etha_ray.kvstore import MemoryStore
from etha_ray.processes import pid_namespace, process_start_time
from etha_ray.tensor_bus.agent import TensorBusAgent
from etha_ray.tensor_bus.client import TensorBusClient
from etha_ray.tensor_bus.commands import Announce, Hello, InitPair, RegisterTensors
from etha_ray.tensor_bus.journal import JoinedPair
from etha_ray.tensor_bus.messages import Message, encode_command
from etha_ray.tensor_bus.state_file import JOURNAL, StateFile, holding_key
from etha_ray.testing import eventually
from tests.tensor_bus.cluster import LONG

CLIENT = f"{os.getpid()}-c"


def _mesh(shape: tuple[int, ...]) -> dict[str, bytes]:
    values = {"mesh_shape_payload": shape, "placements_payload": ("S0",), "coordinate_payload": (0,)}
    return {name: msgspec.msgpack.encode(value) for name, value in values.items()}


def test_the_next_agent_takes_up_the_rest(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.ERROR)
    hello = Hello(pid=os.getpid(), start_time=process_start_time(os.getpid()) or 0.0, pid_namespace=pid_namespace(), client_id=CLIENT)

    def joined(name: str, slot: str, **more: bytes) -> bytes:
        command = InitPair(name, "a", 1, "b", client_id=CLIENT, **more)
        return msgspec.msgpack.encode(JoinedPair(encode_command(command), slot))

    def kept(command: Message) -> bytes:
        command.client_id = CLIENT
        return encode_command(command)

    journal = {
        f"{CLIENT}:hello": kept(hello),
        f"{CLIENT}:pair:1": joined("of two, it says", "00000000", **_mesh((2,))),
        f"{CLIENT}:pair:2": joined("no place", "00000000.x"),
        f"{CLIENT}:pair:3": joined("good", "00000000.00000001"),
        f"{CLIENT}:batch:1": kept(RegisterTensors("held", [])),
        f"{CLIENT}:batch:2": kept(RegisterTensors("of no pair", [("nobody's", b"")])),
        f"{CLIENT}:notice:1": kept(Announce("topic", "slot", b"data")),
        f"{CLIENT}:notice:2": b"\xc1",
        "other:hello": kept(hello),
        "": b"",
        "\xff": b"",
    }
    paths = AgentPaths(command_queue=str(tmp_path / "queue.lmdb"), state=str(tmp_path / "state.lmdb"))
    state = StateFile(paths.state, create=True)
    state.put_all({JOURNAL + key.encode("latin-1"): value for key, value in journal.items()})
    state.put(holding_key(CLIENT, "held"), b"\xc1")
    state.close()

    store = MemoryStore()
    agent = TensorBusAgent(0, store, paths=paths, threads=1)
    agent.start()
    try:
        [worker] = agent._service._workers.all()
        assert (worker.client_id, list(worker.pairs), list(worker.batches)) == (CLIENT, ["good"], [])
        eventually(lambda: list(store.list("notice/")) == ["notice/topic/slot"])
        client = TensorBusClient(0, paths.command_queue, paths.state, LONG)
        client.ping(LONG)
        client.close()
    finally:
        agent.stop(LONG)
    said = [record.getMessage() for record in caplog.records]
    assert sum("cannot be read" in line for line in said) >= 4
    for what in ("pair 'of two, it says'", "pair 'no place'", "batch 'held'", "batch 'of no pair'"):
        assert any(line.startswith(f"{what} cannot be taken up again: ") for line in said), said
    assert not any(record.exc_info for record in caplog.records)
