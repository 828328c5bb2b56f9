"""Agents, clients and worker processes for the tests of the bus.

`LocalCluster` runs agents on threads of the test's own process, `ProcessCluster` runs them as processes. Both check at their end
that nothing is left of them in /dev/shm or on disk. `Worker` is a process that calls functions for a test.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import resource
import secrets
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import Replicate, Shard

from etha_ray.config import AgentPaths, agent_paths
from etha_ray.errors import AgentNotFoundError, EthaRayError
from etha_ray.layout import MeshSpec
from etha_ray.tensor_bus.client import BatchHandler, TensorBusClient
from etha_ray.tensor_bus.command_queue import CommandQueue
from etha_ray.tensor_bus.leftovers import remove_files
from etha_ray.tensor_bus.records import SECRET_KEY
from etha_ray.tensor_bus.semaphores import queue_semaphore_name
from etha_ray.tensor_bus.state_file import StateFile
from etha_ray.tensor_bus.transfer_state import UnderWay
from etha_ray.tensor_bus.watch import find_agent
from etha_ray.testing import TensorBus, eventually, succeed
from tests.fresh import fresh

LONG = 45.0
"""Seconds that are never reached, unless something that must happen does not."""

SHM = Path("/dev/shm")


def left_in_shm(pids: set[int], paths: list[AgentPaths]) -> list[str]:
    """What these processes and the queues at these paths have in /dev/shm."""
    queues = {f"sem.{queue_semaphore_name(path.command_queue, role).removeprefix('/')}" for path in paths for role in ("items", "space")}
    marks = [mark for pid in pids for mark in (f"_{pid}_", f".{pid}.")]
    ours = ("sem.command_", "etha_ray.", "torch_")
    return [name for name in os.listdir(SHM) if name in queues or (name.startswith(ours) and any(mark in name for mark in marks))]


class Side:
    """One worker's part of a pair: its client, its place, and its local tensors of the global ones."""

    def __init__(
        self, client: TensorBusClient, name: str, other: str, size: int, spec: MeshSpec | None, placements: list[Any] | None
    ) -> None:
        self.client, self.name, self.other, self.size, self.spec, self.placements = client, name, other, size, spec, placements

    def join(self, pair: str = "pair", **more: Any) -> None:
        self.client.init_pair(pair, self.name, self.other, self.size, self.spec, self.placements, **{"timeout": LONG, **more})

    def cut(self, whole: torch.Tensor) -> torch.Tensor:
        """A copy of this worker's part of a global tensor."""
        return whole.clone() if self.spec is None else local_part(whole, self.spec, self.placements or [])


def local_part(whole: torch.Tensor, spec: MeshSpec, placements: list[Any]) -> torch.Tensor:
    """DTensor's rule by torch.chunk itself, so that it says nothing about the code under test."""
    part = whole
    for size, at, placement in zip(spec.shape, spec.coordinate, placements, strict=True):
        if isinstance(placement, Shard):
            chunks = part.chunk(size, placement.dim)
            part = chunks[at] if at < len(chunks) else part.narrow(placement.dim, 0, 0)
        else:
            assert isinstance(placement, Replicate)
    return part.clone()


def registered(
    one: TensorBusClient, two: TensorBusClient, pair: str, source: torch.Tensor, target: torch.Tensor, batch_id: str = "x"
) -> tuple[BatchHandler, BatchHandler]:
    """A batch of one tensor on both sides of a pair."""
    first, second = succeed(
        lambda: one.register_tensors(batch_id, [(source, pair)], timeout=LONG),
        lambda: two.register_tensors(batch_id, [(target, pair)], timeout=LONG),
    )
    return first, second


class LocalCluster(TensorBus):
    """A bus of this process whose end checks that nothing is left."""

    def side(self, name: str, other: str, ranks: list[int], mesh: tuple[int, ...] | None, placements: list[Any] | None) -> list[Side]:
        """Clients on these agents, one for each mesh position."""
        sides = []
        for index, rank in enumerate(ranks):
            spec = None if mesh is None else MeshSpec(mesh, tuple(int(at) for at in torch.unravel_index(torch.tensor(index), mesh)))
            sides.append(Side(self.client(rank), name, other, len(ranks), spec, placements))
        return sides

    def pair(self, name: str = "pair", ranks: tuple[int, int] = (0, 1)) -> tuple[TensorBusClient, TensorBusClient]:
        """Two clients without meshes, "a" and "b", joined."""
        one, two = self.client(ranks[0]), self.client(ranks[1])
        succeed(lambda: one.init_pair(name, "a", "b", 1, timeout=LONG), lambda: two.init_pair(name, "b", "a", 1, timeout=LONG))
        return one, two

    def batch(
        self,
        source: torch.Tensor | None = None,
        target: torch.Tensor | None = None,
        batch_id: str = "batch",
        ranks: tuple[int, int] = (0, 1),
    ) -> tuple[BatchHandler, BatchHandler, torch.Tensor, torch.Tensor]:
        """A pair with a registered batch: handlers of "a" and "b", and their tensors. Give tensors to choose them."""
        one, two = self.pair(f"pair of {batch_id}", ranks)
        source = torch.arange(12.0).reshape(3, 4) if source is None else source
        target = torch.zeros_like(source) if target is None else target
        first, second = registered(one, two, f"pair of {batch_id}", source, target, batch_id)
        return first, second, source, target

    def leave(self, *handlers: BatchHandler) -> None:
        """Close the clients of these, which may have been closed by what a test did to them."""
        for handler in handlers:
            with contextlib.suppress(EthaRayError):
                handler.client.close()
            self.clients.remove(handler.client)

    def time_is_up(self, rank: int) -> None:
        """End the transfers of this agent's workers that wait, as their timeouts would: when the test is ready for it, and no sooner."""
        agent = self.agents[rank]

        def under_way() -> list[UnderWay]:
            batches = [batch for worker in agent._service._workers.all() for batch in list(worker.batches.values())]
            return [batch.transfer for batch in batches if batch.transfer is not None]

        eventually(under_way)
        for transfer in under_way():
            transfer.deadline = 0.0
        agent._jobs.wake()

    def close(self) -> None:
        self.stop()
        left = left_in_shm({os.getpid()}, list(self.paths.values()))
        assert left == [], left
        assert not any(Path(path.state).parent.exists() for path in self.paths.values())
        left = sorted(self.store.list().keys() - {SECRET_KEY})
        assert left == [], left
        super().close()


@contextlib.contextmanager
def local_cluster(agents: int | list[int] = 2, **more: Any) -> Iterator[LocalCluster]:
    with LocalCluster(agents, **more) as cluster:
        yield cluster


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def run_agent(arguments: list[str]) -> None:
    """What ``python -m etha_ray.tensor_bus.agent`` does."""
    from etha_ray.tensor_bus.agent import main

    main(arguments)


class ProcessCluster:
    """Agents that are processes, meeting in a TCP store that this process serves."""

    def __init__(
        self, count: int, *, as_modules: bool = False, restarts: bool = False, run: Callable[[list[str]], None] | None = None
    ) -> None:
        from etha_ray.kvstore.tcp import TorchTCPStore

        self.namespace = f"test-{os.getpid()}-{secrets.token_hex(4)}"
        self.master = TorchTCPStore("127.0.0.1", 0, None, True, LONG, namespace=self.namespace)
        self.url = f"tcp://127.0.0.1:{self.master.port}?master=0"
        self.paths = [agent_paths(rank, self.namespace) for rank in range(count)]
        self.as_modules = as_modules
        self._run = run or run_agent
        self.restarts = restarts
        self.pids: list[int] = []
        self.every_pid: set[int] = set()
        self.workers: list[Worker] = []
        self._processes: dict[int, Any] = {}
        self._killed = False
        for rank in range(count):
            self.start_agent(rank)

    def start_agent(self, rank: int) -> None:
        arguments = ["--store", self.url, "--rank", str(rank), "--namespace", self.namespace, "--threads", "1"]
        arguments += ["--restarts"] * self.restarts
        process: Any
        if self.as_modules:
            process = subprocess.Popen([sys.executable, "-m", "etha_ray.tensor_bus.agent", *arguments])
        else:
            process = fresh.Process(target=self._run, args=(arguments,), daemon=True)
            process.start()
        self.every_pid.add(process.pid)
        self._processes[process.pid] = process
        self.pids[rank : rank + 1] = [process.pid]

    def worker(self) -> Worker:
        worker = Worker()
        self.every_pid.add(worker.pid)
        self.workers.append(worker)
        return worker

    def client(self, rank: int) -> TensorBusClient:
        return TensorBusClient(rank, self.paths[rank].command_queue, self.paths[rank].state, LONG)

    def kill(self, pid: int) -> None:
        self._killed |= pid in self._processes
        os.kill(pid, signal.SIGKILL)
        self.wait(pid)

    def pause(self, pid: int, agent: int | None = None) -> None:
        """SIGSTOP, of an agent or of a worker of ``agent``; returns when all its threads stand still, none in the midst of a transaction:
        nobody could write until it ends."""
        paths = self.paths[self.pids.index(pid) if agent is None else agent]
        tasks = Path(f"/proc/{pid}/task")
        while True:
            os.kill(pid, signal.SIGSTOP)
            eventually(lambda: all((task / "stat").read_text().rpartition(")")[2].split()[0] == "T" for task in tasks.iterdir()))
            look = threading.Thread(target=self._write_nothing, args=(paths,), daemon=True)
            look.start()
            look.join(2.0)
            if not look.is_alive():
                return
            os.kill(pid, signal.SIGCONT)
            look.join()

    @staticmethod
    def _write_nothing(paths: AgentPaths) -> None:
        queue, state = CommandQueue(paths.command_queue), StateFile(paths.state)
        queue.size()
        state.delete([])
        queue.close(destroy=False)
        state.close()

    def wait(self, pid: int) -> None:
        process = self._processes.get(pid)
        if isinstance(process, subprocess.Popen):
            process.wait(LONG)
        elif process is not None:
            process.join(LONG)
        for worker in self.workers:
            if worker.pid == pid:
                worker.process.join(LONG)

    def close(self) -> None:
        for worker in self.workers:
            worker.close()
        for rank, pid in enumerate(self.pids):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)
                self._let_start(rank, pid)
                os.kill(pid, signal.SIGTERM)
        for pid in self.pids:
            self.wait(pid)
        for pid in self.every_pid:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.master.close()
        if self._killed:  # an agent that was killed cleans nothing up: that is the next pool's first act
            for paths in self.paths:
                assert remove_files(paths)

    def _let_start(self, rank: int, pid: int) -> None:
        """Wait until an agent that has just been started serves: before that it is not there to be told to end."""
        process = self._processes[pid]
        alive = process.poll() is None if isinstance(process, subprocess.Popen) else process.is_alive()
        if alive:
            with contextlib.suppress(AgentNotFoundError):
                state, _ = find_agent(rank, self.paths[rank].state, self.paths[rank].command_queue, LONG)
                state.close()

    def check_clean(self) -> None:
        """After `close`: nothing is left."""
        left = left_in_shm(self.every_pid, self.paths)
        assert left == [], left
        folder = Path(self.paths[0].state).parent
        assert not folder.exists()


@contextlib.contextmanager
def process_cluster(
    count: int = 2, *, as_modules: bool = False, restarts: bool = False, run: Callable[[list[str]], None] | None = None
) -> Iterator[ProcessCluster]:
    """``restarts``: the agents say that somebody starts them again if they die; the test does."""
    cluster = ProcessCluster(count, as_modules=as_modules, restarts=restarts, run=run)
    try:
        yield cluster
    finally:
        cluster.close()
    cluster.check_clean()


class Worker:
    """A process that calls functions ``f(state, *args)`` for a test; ``state`` is a dict that it keeps between calls."""

    def __init__(self) -> None:
        self._pipe, end = fresh.Pipe()
        self.process = fresh.Process(target=_work, args=(end,), daemon=True)
        self.process.start()
        end.close()
        assert self.process.pid is not None
        self.pid: int = self.process.pid

    def start(self, function: Callable[..., Any], *args: Any) -> None:
        self._pipe.send((function, args))

    def result(self, timeout: float = LONG) -> Any:
        assert self._pipe.poll(timeout), "the worker does not answer"
        value = self._pipe.recv()
        if isinstance(value, BaseException):
            raise value
        return value

    def answers(self) -> bool:
        """Whether the call is over."""
        return bool(self._pipe.poll(0))

    def call(self, function: Callable[..., Any], *args: Any) -> Any:
        self.start(function, *args)
        return self.result()

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._pipe.send(None)
        self.process.join(LONG)
        self._pipe.close()


def _work(pipe: Any) -> None:
    torch.set_num_threads(1)
    state: dict[str, Any] = {}
    while (call := pipe.recv()) is not None:
        function, args = call
        try:
            result = function(state, *args)
        except BaseException as error:
            result = error
        pipe.send(result)
    client = state.get("client")
    if client is not None:
        client.close()


# --- what workers do


def serve_group(state: dict[str, Any]) -> int:
    """Serve the store of a process group that is to be made; its port."""
    state["store"] = dist.TCPStore("127.0.0.1", 0, None, True, wait_for_workers=False)
    return int(state["store"].port)


def process_group(state: dict[str, Any], rank: int, size: int, port: int) -> None:
    """Make the process group whose store rank 0 serves."""
    store = state["store"] if rank == 0 else dist.TCPStore("127.0.0.1", port, None, False, wait_for_workers=False)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size)


def connect(state: dict[str, Any], rank: int, paths: AgentPaths) -> int:
    state["client"] = TensorBusClient(rank, paths.command_queue, paths.state, LONG)
    state["handlers"], state["tensors"] = {}, {}
    return os.getpid()


def join_pair(
    state: dict[str, Any], pair: str, name: str, other: str, size: int, spec: MeshSpec | None, placements: list[Any] | None
) -> None:
    state["client"].init_pair(pair, name, other, size, spec, placements, timeout=LONG)


def register(state: dict[str, Any], batch_id: str, tensors: list[tuple[torch.Tensor, str]], timeout: float = LONG) -> None:
    copies = [(tensor.clone(), pair) for tensor, pair in tensors]
    state["tensors"][batch_id] = [tensor for tensor, _ in copies]
    state["handlers"][batch_id] = state["client"].register_tensors(batch_id, copies, timeout=timeout)


def transfer(state: dict[str, Any], batch_id: str, direction: str, timeout: float = LONG) -> Any:
    return state["handlers"][batch_id].transfer(direction, blocking=True, timeout=timeout).result(0)


def wait_ready(state: dict[str, Any], batch_id: str) -> None:
    state["handlers"][batch_id].wait_ready(LONG)


def start_transfer(state: dict[str, Any], batch_id: str, direction: str) -> None:
    state["semaphore"] = state["handlers"][batch_id].transfer(direction)


def close_batch(state: dict[str, Any], batch_id: str) -> None:
    state["handlers"].pop(batch_id).close()


def fill(state: dict[str, Any], batch_id: str, add: float) -> None:
    for tensor in state["tensors"][batch_id]:
        tensor.add_(add)


def die_sharing(state: dict[str, Any]) -> None:
    """Have torch move a storage into shared memory, and be killed after it has named the file: by the system, as the file is too large."""
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (mmap.PAGESIZE, mmap.PAGESIZE))
    torch.ones(10_000).share_memory_()


def read(state: dict[str, Any], batch_id: str) -> list[torch.Tensor]:
    return [tensor.clone() for tensor in state["tensors"][batch_id]]
