"""What a trainer and a generator have in common: a place in their own process group, and one on the bus.

These are plain classes; `actors.job` makes Ray actors of them. The methods of all ranks of a side are called together.
"""

from __future__ import annotations

import os
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import ray
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import TCPStore  # type: ignore[attr-defined]
from torch.distributed.device_mesh import DeviceMesh

import etha_ray
from actors.sharding import Crossing, Side, global_digests

SIDE_NAMES: dict[Side, str] = {"source": "trainer", "target": "generator"}
"""What the two sides are called, on the bus and on the screen."""

_BATCH = "weights"
# Seconds. Long ones: they only end a job whose other side is lost in a way that the bus cannot notice.
_MATCH_TIMEOUT = 120.0
_TRANSFER_TIMEOUT = 300.0


@dataclass(frozen=True)
class Seat:
    """Where a worker sits: its rank among `ranks` of its side, its Ray node, and the agent that serves it in the pool `namespace`.

    Without an `agent_rank` it is one of its node's, or that of its GPU, if it has one (`gpu`).
    """

    side: Side
    rank: int
    ranks: int
    node_id: str
    agent_rank: int | None
    namespace: str
    gpu: bool = False


@dataclass(frozen=True)
class Moved:
    """What one worker saw of one sync: bytes per member of the other side, and how long its call took."""

    seconds: float
    nbytes: int
    peers: dict[str, int]


class Worker(ABC):
    """One process of a side. `crossings` are the tensors that cross, in the same order everywhere."""

    def __init__(self, seat: Seat, crossings: Sequence[Crossing]) -> None:
        torch.set_num_threads(1)  # several workers share the cores
        self.seat = seat
        self.device = "cuda" if seat.gpu else "cpu"  # Ray gave this process one alone
        self.crossings = tuple(crossings)
        self.mesh: DeviceMesh | etha_ray.MeshSpec = etha_ray.MeshSpec((seat.ranks,), (seat.rank,))
        self._rendezvous: TCPStore | None = None
        self._client: etha_ray.TensorBusClient | None = None

    @abstractmethod
    def build(self) -> Mapping[str, Tensor]:
        """Make what this worker holds, once its group stands: name to local tensor, whose storage stays where it is."""

    def open_rendezvous(self) -> tuple[str, int]:
        """Serve the place where this side's workers meet; returns its host and port. Rank 0 only, before `join`."""
        host: str = ray.util.get_node_ip_address()  # type: ignore[no-untyped-call]
        # Port 0: the system chooses a free one, and nobody can take it in between.
        self._rendezvous = TCPStore(host, 0, is_master=True, wait_for_workers=False)
        return host, self._rendezvous.port

    def join(self, host: str, port: int) -> None:
        """Form the side's process group and build this worker's part of the model. A collective."""
        if self._rendezvous is None:
            self._rendezvous = TCPStore(host, port, is_master=False)
        backend = "cpu:gloo,cuda:nccl" if self.seat.gpu else "gloo"
        dist.init_process_group(backend, store=self._rendezvous, rank=self.seat.rank, world_size=self.seat.ranks)
        self.weights = self.build()

    def connect(self) -> None:
        """Register the weights on the bus, once for all syncs; returns when both sides have. All workers of both sides."""
        seat = self.seat
        if seat.agent_rank is not None:
            os.environ["AGENT_RANK"] = str(seat.agent_rank)
        os.environ["ETHA_RAY_NAMESPACE"] = seat.namespace
        self._client, _ = etha_ray.bootstrap_client()
        local, remote = SIDE_NAMES[seat.side], SIDE_NAMES["target" if seat.side == "source" else "source"]
        for pair, placement in sorted({each.pair: each.placement(seat.side) for each in self.crossings}.items()):
            self._client.init_pair(pair, local, remote, seat.ranks, device_mesh=self.mesh, placements=[placement], timeout=_MATCH_TIMEOUT)
        tensors = [(self.weights[each.name], each.pair) for each in self.crossings]
        self._batch = self._client.register_tensors(_BATCH, tensors, timeout=_MATCH_TIMEOUT)

    def sync(self) -> Moved:
        """Send, or receive, one version of all weights. All workers of both sides."""
        direction: Literal["send", "recv"] = "send" if self.seat.side == "source" else "recv"
        began = time.monotonic()
        report = self._batch.transfer(direction, blocking=True, timeout=_TRANSFER_TIMEOUT).result()
        return Moved(time.monotonic() - began, report.bytes, report.peers)

    def digests(self) -> dict[str, str]:
        """The digest of every whole tensor, as this rank sees it. A collective."""
        return global_digests(self._local_weights(), self.crossings, self.seat.side, self.seat.ranks)

    def close(self) -> None:
        """Leave the bus and the group."""
        if self._client is not None:
            self._client.close()
        if dist.is_initialized():
            dist.destroy_process_group()

    def _local_weights(self) -> Mapping[str, Tensor]:
        return self.weights
