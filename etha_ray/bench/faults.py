"""``bench faults``: how long after a process dies, or stands still, a call that waits for it ends with its error."""

from __future__ import annotations

import os
import shutil
import signal
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import ExitStack

from etha_ray.bench.bus import Bus, open_bus
from etha_ray.bench.figures import BenchResult, Figure, describe_machine, median, progress
from etha_ray.bench.processes import BenchError, WorkerProcess, Workers
from etha_ray.bench.workload import uniform
from etha_ray.config import FAILURE_TIMEOUT
from etha_ray.errors import ConfigError
from etha_ray.tensor_bus.inspection import inspect_agent
from etha_ray.tensor_bus.leftovers import sweep

_INTO_THE_CALL = 1.0
"""Seconds in which workers get into the calls that they are to be told in."""
_NOTICED = 60.0
_LOOK = 0.01
_BESIDE = 1.0
"""Seconds beside `FAILURE_TIMEOUT` in which silence is noticed: both sides look twice a second."""

_WHAT = {
    "worker_killed": "SIGKILL of the receiver, until the sender's call raised",
    "agent_killed": "SIGKILL of the receiver's agent, until the sender's call raised",
    "own_agent_killed": "the same, until a call of the receiver raised",
    "agent_stopped": "SIGSTOP of the receiver's agent, until the sender's call raised",
    "own_agent_stopped": "the same, until a call of the receiver raised",
    "store_stopped": "SIGSTOP of etcd, until both agents say that it is silent",
}
_SENDER, _RECEIVER = ("send", "PeerLostError"), ("recv", "AgentDiedError")
"""What a worker is in, and how that is to end."""


def run_faults(count: int = 5) -> BenchResult:
    """Measure each fault ``count`` times, every time on agents and workers of its own.

    Where no etcd is installed the store's is left out, and named with the reason on stderr and in the result's ``machine`` under
    ``left_out``.

    Raises `ConfigError` for a count below 1, `BenchError` when a call ends otherwise than it should, or a process fails.
    """
    if count < 1:
        raise ConfigError(f"{count} repetitions of each fault are none: give at least 1")
    machine, program = describe_machine(), shutil.which("etcd")
    if program is None:
        machine["left_out"] = "store_stopped: etcd is not installed (apt-get install etcd-server)"
        progress(f"left out: {machine['left_out']}")
    samples: dict[str, list[float]] = defaultdict(list)
    for number in range(count):
        progress(f"round {number + 1} of {count}")
        for measured in (_agents(), _worker_and_store(program)):
            for name, seconds in measured:
                samples[name].append(seconds)
    return BenchResult("faults", [*_figures(samples), Figure("repetitions_count", count, "of each fault")], [], machine)


def _figures(samples: Mapping[str, list[float]]) -> Iterator[Figure]:
    for name, what in _WHAT.items():
        if name in samples:
            reach = FAILURE_TIMEOUT + _BESIDE if name.endswith("agent_stopped") else FAILURE_TIMEOUT
            yield Figure(f"{name}_p50_s", median(samples[name]), what)
            yield Figure(f"{name}_max_s", max(samples[name]), "the same, the longest", reach=reach)


def _agents() -> Iterator[tuple[str, float]]:
    """An agent is stopped, goes on, and is killed; its worker waits in one batch, and the sender in another."""
    with open_bus(2) as bus:
        for number, verb in ((signal.SIGSTOP, "stopped"), (signal.SIGKILL, "killed")):
            for way in ("send", "recv"):
                bus.register(f"{verb} {way}", uniform(1, 4096))
            waiting = {bus.clients[0]: _SENDER, bus.clients[1]: _RECEIVER}
            told = _strike(bus.agents[1].pid, number, verb, waiting)
            yield from ((f"{name}_{verb}", seconds) for name, seconds in zip(("agent", "own_agent"), told, strict=True))
    sweep()  # what the killed one had


def _worker_and_store(program: str | None) -> Iterator[tuple[str, float]]:
    """The etcd is stopped, where there is one, and goes on; then a worker is killed."""
    with ExitStack() as stack:
        url, etcd = None, 0
        if program is not None:
            server = stack.enter_context(Workers()).start("etcd", "etcd")
            url, etcd = f"etcd://{server.call('start', program=program)}", int(server.call("pid"))
        bus = stack.enter_context(open_bus(2, url))
        if etcd:
            began = time.monotonic()
            os.kill(etcd, signal.SIGSTOP)
            try:
                noticed = _all_say(bus, silent=True)
            finally:
                os.kill(etcd, signal.SIGCONT)
            yield "store_stopped", noticed - began
            _all_say(bus, silent=False)
        bus.register("killed send", uniform(1, 4096))
        (told,) = _strike(bus.clients[1].pid, signal.SIGKILL, "killed", {bus.clients[0]: _SENDER})
        yield "worker_killed", told
    sweep()


def _strike(victim: int, number: signal.Signals, verb: str, waiting: Mapping[WorkerProcess, tuple[str, str]]) -> list[float]:
    """Seconds until the call of each who waits has raised."""
    for worker, (way, _) in waiting.items():
        worker.ask("fail", batch_id=f"{verb} {way}", direction=way)
    time.sleep(_INTO_THE_CALL)
    began = time.monotonic()
    os.kill(victim, number)
    try:
        told = [worker.answer(_NOTICED) for worker in waiting]
    finally:
        if number is signal.SIGSTOP:
            os.kill(victim, signal.SIGCONT)
    for (_, error), (way, expected) in zip(told, waiting.values(), strict=True):
        if error != expected:
            raise BenchError(f"agent or worker {verb}: a {way} that waited for it ended with {error} instead of {expected}")
    return [moment - began for moment, _ in told]


def _all_say(bus: Bus, *, silent: bool) -> float:
    """The moment when all agents say that their store is silent, or that it is not."""
    deadline = time.monotonic() + _NOTICED
    while time.monotonic() < deadline:
        seen = [inspect_agent(rank, paths) for rank, paths in enumerate(bus.paths)]
        if all(one is not None and one.status is not None and bool(one.status.store_silent_since) is silent for one in seen):
            return time.monotonic()
        time.sleep(_LOOK)
    raise BenchError(f"the agents have not noticed within {_NOTICED:g} s that their etcd {'stands still' if silent else 'goes on'}")
