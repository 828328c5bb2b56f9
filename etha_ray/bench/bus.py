"""A bus to measure: agents and workers in processes of their own, with a store and a folder that go with them."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec

from etha_ray.bench.figures import progress
from etha_ray.bench.processes import BenchError, WorkerProcess, Workers, call_all
from etha_ray.bench.workload import SideName, Workload
from etha_ray.config import AgentPaths
from etha_ray.kvstore.tcp import TorchTCPStore
from etha_ray.tensor_bus.leftovers import remove_files

_HEAD_START = 0.02
"""Seconds in which all workers get to know when to begin."""


class Bus:
    """Agents and, beside each, one worker."""

    def __init__(
        self, folder: Path, paths: Sequence[AgentPaths], agents: Sequence[WorkerProcess], clients: Sequence[WorkerProcess]
    ) -> None:
        self.folder = folder
        self.paths = paths
        self.agents = agents
        self.clients = clients

    def register(self, batch_id: str, workload: Workload) -> float:
        """Register a batch: the first workers are its sources, the next its targets. Seconds of the slowest."""
        data = msgspec.to_builtins(workload)
        seats = list(_seats(workload))
        for client, (side, index) in zip(self.clients, seats, strict=True):
            client.ask("register", batch_id=batch_id, workload=data, side=side, index=index)
        return max(float(client.answer()) for client in self.clients)

    def sync(self, batch_id: str, workload: Workload, count: int = 1) -> list[float]:
        """``count`` transfers of a batch; of each, the seconds from the first call to the last completion."""
        at = time.monotonic() + _HEAD_START
        for client, (side, _) in zip(self.clients, _seats(workload), strict=True):
            direction = "send" if side == "src" else "recv"
            client.ask("transfer", batch_id=batch_id, direction=direction, at=at, count=count)
        return spans([client.answer() for client in self.clients])

    def verified_sync(self, batch_id: str, workload: Workload, version: int) -> None:
        """Write new data at the sources, sync, and compare all of it at the targets. Raises `BenchError`."""
        call_all(self.clients[: workload.src], "fill", batch_id=batch_id, version=version)
        self.sync(batch_id, workload)
        wrong = call_all(self.clients[workload.src :], "wrong", batch_id=batch_id, version=version)
        check_arrived("the bus", wrong)


def _seats(workload: Workload) -> Iterator[tuple[SideName, int]]:
    yield from (("src", index) for index in range(workload.src))
    yield from (("dst", index) for index in range(workload.dst))


def check_arrived(what: str, wrong: Sequence[Sequence[str]]) -> None:
    """Raise `BenchError` if any target rank has tensors that hold wrong bytes."""
    for index, names in enumerate(wrong):
        if names:
            raise BenchError(f"{what} moved wrong bytes: target rank {index} holds other data in {len(names)} tensors, first {names[0]!r}")


def spans(times: Sequence[Sequence[tuple[float, float]]]) -> list[float]:
    """Seconds from the first start to the last end, for each repetition; ``times`` has a list a worker."""
    return [max(end for _, end in moment) - min(start for start, _ in moment) for moment in zip(*times, strict=True)]


@contextlib.contextmanager
def open_bus(ranks: int, store_url: str | None = None) -> Iterator[Bus]:
    """A bus of ``ranks`` agents and as many workers, with a TCPStore of its own unless it is given a store. All of it is gone when the
    block is left, however it is left."""
    progress(f"starting {ranks} agents and {ranks} workers")
    with contextlib.ExitStack() as stack:
        folder = Path(tempfile.mkdtemp(prefix="etha_ray_bench_"))
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        paths = [AgentPaths(str(folder / f"command{rank}.lmdb"), str(folder / f"state{rank}.lmdb")) for rank in range(ranks)]
        for each in paths:
            stack.callback(remove_files, each)
        if store_url is None:
            store = TorchTCPStore("127.0.0.1", 0, None, True, wait_for_workers=False)
            stack.callback(store.close)
            store_url = f"tcp://127.0.0.1:{store.port}"
        agents, clients = stack.enter_context(Workers()), stack.enter_context(Workers())
        yield _connect(folder, paths, store_url, agents, clients)


def _connect(folder: Path, paths: Sequence[AgentPaths], store_url: str, agents: Workers, clients: Workers) -> Bus:
    bus = Bus(
        folder,
        paths,
        [agents.start("agent", f"agent {rank}") for rank in range(len(paths))],
        [clients.start("client", f"worker {rank}") for rank in range(len(paths))],
    )
    for call, workers, more in (("start", bus.agents, {"store_url": store_url}), ("connect", bus.clients, {})):
        for rank, (worker, each) in enumerate(zip(workers, paths, strict=True)):
            worker.ask(call, rank=rank, command_queue=each.command_queue, state=each.state, **more)
        for worker in workers:
            worker.answer()
    return bus


class MemoryWatch:
    """Samples the private memory (RssAnon) of processes in the background: mapped shared memory does not count."""

    def __init__(self, pids: Sequence[int], pause: float = 0.005) -> None:
        self._pids = list(pids)
        self._pause = pause
        self._before = [_private_bytes(pid) for pid in pids]
        self._peak = list(self._before)
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def __enter__(self) -> MemoryWatch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    @property
    def extra_mib(self) -> float:
        """The most that any of the processes had above what it had at the start, in MiB."""
        return max(peak - before for peak, before in zip(self._peak, self._before, strict=True)) / 2**20

    def _sample(self) -> None:
        while not self._over.wait(self._pause):
            self._peak = [max(peak, _private_bytes(pid)) for peak, pid in zip(self._peak, self._pids, strict=True)]


def _private_bytes(pid: int) -> int:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    return 0
