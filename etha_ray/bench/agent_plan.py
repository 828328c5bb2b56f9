"""One agent's part of a model's plan, made and measured in a process of its own, which has planned nothing before.

The processes are forked from one that has imported what planning needs, so none of them pays for imports, and what one
has cached no other sees.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Literal

import msgspec

from etha_ray.bench.moe import Form, ModelTensor, Moe
from etha_ray.bench.processes import BenchError
from etha_ray.layout import Layout, Pieces
from etha_ray.plan import Route, Side, routes_into, routes_out_of, turns

Role = Literal["source", "target"]

GPUS_PER_HOST = 8
_TIMEOUT = 600.0


@dataclass(frozen=True)
class AgentPlan:
    """What one agent's plan took.

    Attributes:
        seconds: from names, shapes and layouts to all of its routes.
        cpu_seconds: of these, those on the CPU: what is left of them on a machine with nothing else to do.
        peak_mib: resident memory at its highest, less that before planning; the plan is still held.
        tensors: parameters of the model; each of them is asked about.
        routes: what this agent gives to one other agent, or gets from it, of one tensor; over all tensors.
        boxes: copies that these routes have together.
    """

    seconds: float
    cpu_seconds: float
    peak_mib: float
    tensors: int
    routes: int
    boxes: int


def measure(ranks: int, form: Form, role: Role, position: int) -> AgentPlan:
    """The plan of the agent at mesh position ``position`` of one side of `Moe`. Raises `BenchError` if it cannot be made."""
    context = get_context("forkserver")
    context.set_forkserver_preload([__name__])
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_answer, args=(sender, ranks, form, role, position), daemon=True)
    process.start()
    sender.close()
    try:
        if not receiver.poll(_TIMEOUT):
            raise BenchError(f"the plan of {role} {position} of {ranks} ranks was not made in {_TIMEOUT:g} s")
        return msgspec.msgpack.decode(receiver.recv_bytes(), type=AgentPlan)
    except EOFError:
        raise BenchError(f"the process that plans for {role} {position} of {ranks} ranks died; its log is above") from None
    finally:
        receiver.close()
        process.kill()  # it has answered, or never will
        process.join()


def _answer(sender: Connection, ranks: int, form: Form, role: Role, position: int) -> None:
    with contextlib.closing(sender):
        sender.send_bytes(msgspec.msgpack.encode(make(Moe(ranks, form), role, position)))


def make(model: Moe, role: Role, position: int) -> AgentPlan:
    """`measure` in this process: the peak also counts what other threads take meanwhile, and earlier plans are cached."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    before = _resident("VmRSS")
    start, cpu = time.perf_counter(), time.process_time()
    plan = routes_of_agent(list(model.tensors()), role, position)
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    peak = _resident("VmHWM") - before
    boxes = sum(len(route.boxes) for routes in plan for route in routes)
    return AgentPlan(seconds, cpu, peak, len(plan), sum(map(len, plan)), boxes)


def routes_of_agent(tensors: Iterable[ModelTensor], role: Role, position: int) -> list[tuple[Route, ...]]:
    """Per tensor, the routes out of or into the agent at ``position``: what an agent plans when it registers a batch."""
    listed = list(tensors)
    givers, takers = listed[0].source.ranks, listed[0].target.ranks
    hosts = tuple(f"host{agent // GPUS_PER_HOST}" for agent in range(givers + takers))
    source, target = _Seats(tuple(range(givers)), hosts[:givers]), _Seats(tuple(range(givers, givers + takers)), hosts[givers:])
    ask = routes_into if role == "target" else routes_out_of
    return [
        ask(source.side(tensor.source), target.side(tensor.target), tensor.shape, position, turn)
        for tensor, turn in zip(listed, turns(tensor.shape for tensor in listed), strict=True)
    ]


class _Seats:
    """The agents of one group, and one `Side` of theirs for each layout."""

    def __init__(self, agents: tuple[int, ...], hosts: tuple[str, ...]) -> None:
        self._agents, self._hosts = agents, hosts
        self._sides: dict[Layout | Pieces, Side] = {}

    def side(self, layout: Layout | Pieces) -> Side:
        found = self._sides.get(layout)
        if found is None:
            found = self._sides[layout] = Side(layout, self._agents, self._hosts)
        return found


def _resident(name: str) -> float:
    """Resident memory of this process by its name in /proc, in MiB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name):
            return int(line.split()[1]) / 1024
    raise BenchError(f"/proc/self/status has no {name}: memory can be measured on Linux only")
