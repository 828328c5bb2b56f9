"""The program of a benchmark's worker processes: ``python -m etha_ray.bench.worker ROLE``; see `processes`."""

from __future__ import annotations

import logging
import os
import signal
import sys
import time
import traceback
from typing import Any, Protocol

import msgspec
import numpy as np
import torch

from etha_ray.bench.processes import Answer, Request
from etha_ray.bench.store_roles import EtcdRole, WaiterRole
from etha_ray.bench.workload import Shards, SideName, Workload
from etha_ray.config import AgentPaths
from etha_ray.errors import EthaRayError
from etha_ray.kvstore import KVStore, create_store
from etha_ray.layout import MeshSpec
from etha_ray.tensor_bus.agent import TensorBusAgent
from etha_ray.tensor_bus.client import BatchHandler, TensorBusClient
from etha_ray.tensor_bus.command_queue import CommandQueue
from etha_ray.tensor_bus.commands import Ping

Times = list[tuple[float, float]]
"""(start, end) of repeated work, on the monotonic clock, which all processes of a host share."""


class Role(Protocol):
    """A kind of worker: its methods are what it can be asked."""

    def close(self) -> None:
        """Let go of everything; the process ends."""


class AgentRole:
    """An agent, on a thread of its own."""

    def __init__(self) -> None:
        self._agent: TensorBusAgent | None = None
        self._store: KVStore | None = None
        self._proofs = _Proofs()

    def start(self, rank: int, store_url: str, command_queue: str, state: str) -> None:
        """Serve these paths."""
        self._store = create_store(store_url)
        self._agent = TensorBusAgent(rank, self._store, paths=AgentPaths(command_queue, state))
        self._agent.start()

    def proving(self) -> float:
        """Seconds that proving plans has taken since this was last asked."""
        seconds, self._proofs.seconds = self._proofs.seconds, 0.0
        return seconds

    def close(self) -> None:
        """Shut down."""
        if self._agent is not None:
            self._agent.stop()
        if self._store is not None:
            self._store.close()


class _Proofs(logging.Handler):
    """Adds up what agents in this process say that proofs took."""

    def __init__(self) -> None:
        super().__init__(logging.DEBUG)
        self.seconds = 0.0
        said = logging.getLogger("etha_ray.tensor_bus.executor")
        said.setLevel(logging.DEBUG)
        said.addHandler(self)
        said.propagate = False

    def emit(self, record: logging.LogRecord) -> None:
        if isinstance(record.args, tuple) and isinstance(record.args[-1], float):
            self.seconds += record.args[-1]


class ClientRole:
    """A worker beside an agent."""

    def __init__(self) -> None:
        self._client: TensorBusClient | None = None
        self._shards: dict[str, Shards] = {}
        self._handlers: dict[str, BatchHandler] = {}

    def connect(self, rank: int, command_queue: str, state: str) -> None:
        """Make the client."""
        self._client = TensorBusClient(rank, command_queue, state)

    def ping(self, count: int) -> list[float]:
        """Seconds of each of ``count`` round trips to the agent."""
        ping = self._connected().ping
        return _repeat(count, ping)

    def register(self, batch_id: str, workload: Any, side: SideName, index: int) -> float:
        """Hold this rank's shards and register them; seconds of the registration."""
        client, work = self._connected(), msgspec.convert(workload, Workload)
        names: tuple[SideName, SideName] = ("src", "dst") if side == "src" else ("dst", "src")
        for spec in {spec.pair: spec for spec in work.tensors}.values():
            layout = work.layout(spec, side)
            mesh = MeshSpec(layout.mesh_shape, (index,))
            client.init_pair(spec.pair, names[0], names[1], layout.ranks, mesh, _placements(layout.placements))
        shards = self._shards[batch_id] = Shards(work, side, index)
        pairs = [spec.pair for spec in work.tensors]
        start = time.monotonic()
        self._handlers[batch_id] = client.register_tensors(batch_id, list(zip(shards.tensors, pairs, strict=True)), timeout=120.0)
        return time.monotonic() - start

    def fill(self, batch_id: str, version: int) -> None:
        """See `Shards.fill`."""
        self._shards[batch_id].fill(version)

    def wrong(self, batch_id: str, version: int) -> list[str]:
        """See `Shards.wrong`."""
        return self._shards[batch_id].wrong(version)

    def transfer(self, batch_id: str, direction: str, at: float, count: int) -> Times:
        """``count`` transfers one after the other, the first at the moment ``at``."""
        handler = self._handlers[batch_id]
        _sleep_until(at)
        times = []
        for _ in range(count):
            start = time.monotonic()
            handler.transfer("send" if direction == "send" else "recv").result(60.0)
            times.append((start, time.monotonic()))
        return times

    def fail(self, batch_id: str, direction: str) -> tuple[float, str]:
        """A transfer that is to end with an error: when it did (monotonic), and with which."""
        try:
            self._handlers[batch_id].transfer("send" if direction == "send" else "recv").result(60.0)
        except (EthaRayError, TimeoutError) as error:
            return time.monotonic(), type(error).__name__
        return time.monotonic(), "no error"

    def close(self) -> None:
        """Leave the agent."""
        if self._client is not None:
            self._client.close()

    def _connected(self) -> TensorBusClient:
        assert self._client is not None, "connect comes first"
        return self._client


class QueueRole:
    """A command queue with nobody at the other end: what the queue alone costs."""

    def put_and_take(self, path: str, count: int) -> tuple[list[float], list[float]]:
        """Seconds of each of ``count`` enqueues and dequeues, in turns, in one process that never sleeps."""
        queue, ping = CommandQueue(path), Ping()
        try:
            puts, takes = [], []
            for _ in range(count):
                puts.extend(_repeat(1, lambda: queue.enqueue(ping)))
                takes.extend(_repeat(1, lambda: queue.dequeue(block=True)))
        finally:
            queue.close()
        return puts, takes

    def close(self) -> None:
        """Nothing is kept."""


class CopyRole:
    """Copies in shared memory as fast as this machine lets it."""

    def __init__(self) -> None:
        self._source = self._target = torch.empty(0)

    def hold(self, nbytes: int, threads: int) -> None:
        """Two buffers in shared memory, all of their pages touched; torch copies with ``threads`` threads."""
        torch.set_num_threads(threads)
        self._source, self._target = torch.empty(nbytes, dtype=torch.uint8), torch.empty(nbytes, dtype=torch.uint8)
        for tensor in (self._source, self._target):
            tensor.untyped_storage().share_memory_()
            tensor.fill_(1)

    def copy(self, at: float, how: str) -> Times:
        """Copy one buffer into the other at the moment ``at``, by torch or by NumPy (libc's memmove)."""
        source, target = self._source.numpy(), self._target.numpy()
        _sleep_until(at)
        start = time.monotonic()
        if how == "torch":
            self._target.copy_(self._source)
        else:
            np.copyto(target, source)
        return [(start, time.monotonic())]

    def close(self) -> None:
        """The buffers go with the process."""


_ROLES: dict[str, type[Role]] = {
    "agent": AgentRole,
    "client": ClientRole,
    "queue": QueueRole,
    "copy": CopyRole,
    "waiter": WaiterRole,
    "etcd": EtcdRole,
}


def _placements(tokens: tuple[str, ...]) -> list[Any]:
    from torch.distributed.tensor import Replicate, Shard

    return [Replicate() if token == "R" else Shard(int(token[1:])) for token in tokens]


def _sleep_until(moment: float) -> None:
    time.sleep(max(0.0, moment - time.monotonic()))


def _repeat(count: int, work: Any) -> list[float]:
    clock, seconds = time.perf_counter, []
    for _ in range(count):
        start = clock()
        work()
        seconds.append(clock() - start)
    return seconds


def main() -> None:
    """Answer requests until standard input closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the benchmark ends its workers itself
    channel = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever prints goes to stderr: stdout carries answers only
    role = _ROLES[sys.argv[1]]()
    try:
        for line in sys.stdin.buffer:
            request = msgspec.json.decode(line, type=Request)
            try:
                answer = Answer(value=getattr(role, request.call)(**request.arguments))
            except Exception:  # becomes the answer
                answer = Answer(error=traceback.format_exc())
            channel.write(msgspec.json.encode(answer) + b"\n")
            channel.flush()
    finally:
        role.close()


if __name__ == "__main__":
    main()
