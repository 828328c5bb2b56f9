"""A model's shards of all ranks of both sides on one device, and the ways by which they get from one side to the other there.

The copies are those that agents would do: the executor's moves, prepared by the joint transport.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import msgspec
import torch

from etha_ray.accelerator import Accelerator
from etha_ray.bench.bus import check_arrived
from etha_ray.bench.workload import Shards, SideName, Workload
from etha_ray.plan import Side
from etha_ray.tensor_bus.agreement import AgreedTensor, Held
from etha_ray.tensor_bus.executor import Part, inflows
from etha_ray.tensor_bus.pair import Match
from etha_ray.tensor_bus.records import AgentRecord, MemberRecord
from etha_ray.transport.base import CopyProgram, OneSidedTransport
from etha_ray.transport.joint import Move, prepare

_HOST = "host"


class Reshard:
    """All source ranks' shards, all target ranks', and what fills the latter from the former."""

    def __init__(self, workload: Workload, accelerator: Accelerator, source_dtype: str | None = None) -> None:
        """``source_dtype``: of the sources, where it is not that of the targets."""
        given = msgspec.structs.replace(workload, dtype=source_dtype or workload.dtype)
        casts = given.dtype != workload.dtype
        self.workload = workload
        self._device = accelerator.device
        self.sources = [Shards(given, "src", index, self._device, casts) for index in range(workload.src)]
        self.targets = [Shards(workload, "dst", index, self._device, casts) for index in range(workload.dst)]
        self.bytes_read = workload.moved_bytes // workload.itemsize * given.itemsize
        self.bytes_written = workload.moved_bytes
        places = range(len(workload.tensors))
        self._agreed = [AgreedTensor(_held(workload, place, "dst"), _held(given, place, "src")) for place in places]

    @cached_property
    def moves(self) -> list[Move]:
        """What agents would copy, for all target ranks."""
        return [inflow.move for index in range(self.workload.dst) for inflow in inflows(self._part(index), self._open, _no_relay).moves]

    def prepare(self, transport: OneSidedTransport) -> CopyProgram:
        """The program that an agent would prepare, but for all target ranks at once."""
        return prepare(self.moves, transport, None)

    def verified(self, what: str, program: CopyProgram, version: int) -> None:
        """Write new data at the sources, move it, and compare all of it at the targets. Raises `BenchError`."""
        for shards in self.sources:
            shards.fill(version)
        program.run()
        check_arrived(what, [shards.wrong(version) for shards in self.targets])

    def copy_each(self) -> None:
        """The same by torch: one call for each move."""
        for move in self.moves:
            source = move.sources[0]
            assert isinstance(source, torch.Tensor)
            move.target.copy_(source)

    def gather_and_slice(self) -> None:
        """The same as it is done without a plan: each tensor whole, then the part of it that each target rank wants."""
        for position, spec in enumerate(self.workload.tensors):
            parts = [shards.tensors[position] for shards in self.sources]
            whole = torch.cat(parts, int(spec.src[1:])) if spec.src.startswith("S") else parts[0]
            for index, shards in enumerate(self.targets):
                for start, local, size in self.workload.layout(spec, "dst").region(index, spec.shape).boxes():
                    shards.tensors[position][_slices(local, size)].copy_(whole[_slices(start, size)])

    def _part(self, index: int) -> Part:
        sides = (("dst", self.workload.dst), ("src", self.workload.src))
        local, remote = (tuple(_member(name, rank, count) for rank in range(count)) for name, count in sides)
        tensors = self.targets[index].tensors
        return Part("bench", "bench", Match(local, remote, index), range(len(tensors)), tensors, self._agreed)

    def _open(self, source: int, positions: Sequence[int]) -> list[torch.Tensor]:
        return [self.sources[source].tensors[position] for position in positions]


def _held(workload: Workload, position: int, side: SideName) -> Held:
    spec, ranks = workload.tensors[position], workload.ranks(side)
    seats = Side(workload.layout(spec, side), tuple(range(ranks)), (_HOST,) * ranks)
    return Held(workload.torch_dtype, spec.shape, seats, lossy=False)


def _member(side: str, index: int, count: int) -> MemberRecord:
    """Somebody who is not there: moves carry names of whom they are from."""
    agent = AgentRecord(index, f"{side}{index}", 0, 0.0, _HOST, _HOST, "", "", "", "", "")
    return MemberRecord(f"{side}{index}", side, "", count, None, index, "", 0, 0.0, agent)


def _no_relay(_: int, __: Sequence[int]) -> None:
    return None


def _slices(start: Sequence[int], size: Sequence[int]) -> tuple[slice, ...]:
    return tuple(slice(first, first + count) for first, count in zip(start, size, strict=True))
