"""The demo: starts its processes, has them sync, and looks at their agents before it ends them."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from etha_ray.config import agent_paths
from etha_ray.decoding import Decoder
from etha_ray.demo.roles import GENERATORS, TRAINERS, agent, worker
from etha_ray.errors import AgentFailedError
from etha_ray.explanation import Explanation, explain
from etha_ray.kvstore.tcp import TorchTCPStore
from etha_ray.layout import Layout
from etha_ray.report import TransferReport
from etha_ray.tensor_bus.inspection import SeenAgent, agents_here
from etha_ray.tensor_bus.leftovers import remove_files

_ANSWER_TIMEOUT = 90.0
_LEAVE_TIMEOUT = 10.0

_reports = Decoder(TransferReport)


@dataclass(frozen=True)
class SyncResult:
    """One sync: seconds from saying go to the last worker's end, what each `transfer` returned, and whether every byte was right."""

    step: int
    seconds: float
    sends: tuple[TransferReport, ...]
    receives: tuple[TransferReport, ...]
    exact: bool

    @property
    def bytes(self) -> int:
        """What crossed."""
        return sum(report.bytes for report in self.receives)


@dataclass(frozen=True)
class Demo:
    """What the demo came to: its syncs, how the agents looked after them, and the plan of the weights cut by columns."""

    syncs: tuple[SyncResult, ...]
    agents: tuple[SeenAgent, ...]
    namespace: str
    plan: Explanation


def run_demo(steps: int = 4, width: int = 1024, on_sync: Callable[[SyncResult], None] = lambda sync: None) -> Demo:
    """Sync a model of 16 float32 weights from two trainers (FSDP shards) to two generators (tensor-parallel shards).

    Eight processes on this machine's CPUs, four of them agents; no Ray.

    Args:
        steps: syncs.
        width: of each weight, width x width.
        on_sync: called after each sync.

    Raises:
        AgentFailedError: a process of the demo died, or does not answer.
        EthaRayError: a transfer failed.
    """
    namespace = f"demo-{os.getpid()}"
    store = TorchTCPStore("127.0.0.1", 0, None, True, _ANSWER_TIMEOUT, namespace=namespace)
    with contextlib.closing(store), _processes(store.port, namespace, width) as pipes:
        _ask(pipes, None)
        syncs = []
        for step in range(1, steps + 1):
            _ask(pipes, str(step).encode())
            began = time.perf_counter()
            reports = [_reports.decode(answer) for answer in _ask(pipes, b"go")]
            seconds = time.perf_counter() - began
            exact = _ask(pipes, None) == [b"1"] * len(pipes)
            syncs.append(SyncResult(step, seconds, tuple(reports[:TRAINERS]), tuple(reports[TRAINERS:]), exact))
            on_sync(syncs[-1])
        agents = _settled(namespace, steps)
        for pipe in pipes:
            pipe.send_bytes(b"0")
    sides = Layout.decode(f"{TRAINERS}: S0"), Layout.decode(f"{GENERATORS}: S1")
    return Demo(tuple(syncs), tuple(agents), namespace, explain(*sides, (width, width), 4))


@contextlib.contextmanager
def _processes(port: int, namespace: str, width: int) -> Iterator[list[Any]]:
    """The agents, and the workers' pipes, trainers first; ended on every way out."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["etha_ray.demo.roles"])  # loads torch once for all eight
    url = f"tcp://127.0.0.1:{port}?master=0"
    started: list[Any] = []
    pipes: list[Any] = []
    try:
        for rank in range(TRAINERS + GENERATORS):
            started.append(context.Process(target=agent, args=(rank, url, namespace), daemon=True))
            started[-1].start()
        agents = list(started)
        for side, count in (("trainer", TRAINERS), ("generator", GENERATORS)):
            for rank in range(count):
                pipe, end = context.Pipe()
                started.append(context.Process(target=worker, args=(side, rank, namespace, width, end), daemon=True))
                started[-1].start()
                end.close()
                pipes.append(pipe)
        yield pipes
        for process in started[len(agents) :]:
            process.join(_LEAVE_TIMEOUT)
    finally:
        for process in reversed(started):  # workers first
            process.terminate()
        for process in started:
            process.join(_LEAVE_TIMEOUT)
            if process.is_alive():
                process.kill()
                process.join()
        for rank in range(TRAINERS + GENERATORS):
            remove_files(agent_paths(rank, namespace))


def _ask(pipes: Sequence[Any], what: bytes | None) -> list[bytes]:
    """Say something to all workers, or nothing, and hear what each says next."""
    for pipe in pipes if what is not None else ():
        pipe.send_bytes(what)
    return [_heard(pipe) for pipe in pipes]


def _heard(pipe: Any) -> bytes:
    try:
        if pipe.poll(_ANSWER_TIMEOUT):
            answer: bytes = pipe.recv_bytes()
            return answer
    except EOFError:
        raise AgentFailedError("a process of the demo died; what it said stands above") from None
    raise AgentFailedError(f"a process of the demo has not answered for {_ANSWER_TIMEOUT:g} s: the machine is overloaded")


def _settled(namespace: str, transfers: int) -> list[SeenAgent]:
    """The agents once they have written what they know of the transfers, which they do twice a second."""
    deadline = time.monotonic() + _LEAVE_TIMEOUT
    while True:
        agents = agents_here(namespace)
        written = all(agent.status is not None and agent.status.totals.sent + agent.status.totals.received >= transfers for agent in agents)
        if written or time.monotonic() >= deadline:
            return agents
        time.sleep(0.05)
