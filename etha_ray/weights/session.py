"""One rank's part of what connects two sides: a client of its own, pairs, and one batch with all that crosses.

A client of its own, so that all of it is gone from the agent and the store when the session is closed, and whatever happens to
one receiver is nothing to the others.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from etha_ray.errors import AgentDiedError, BatchClosedError, LayoutError, TransferTimeoutError, UnknownBatchError
from etha_ray.layout import MeshSpec
from etha_ray.report import TransferReport
from etha_ray.tensor_bus.client import TensorBusClient
from etha_ray.tensor_bus.tensors import Piece, Registrable
from etha_ray.tensor_bus.versions import Holding
from etha_ray.weights.agreement import Agreement, PairPlan
from etha_ray.weights.shares import Rows, Share, Span

logger = logging.getLogger(__name__)

Direction = Literal["send", "recv"]


@dataclass(frozen=True)
class AgentAddress:
    """Which agent a client is of, so that others can be made."""

    rank: int
    queue_path: str
    state_path: str

    @classmethod
    def of(cls, client: TensorBusClient) -> AgentAddress:
        """The agent of ``client``."""
        return cls(client.agent_rank, str(client.command_queue.lmdb_path), client.agent_state_lmdb_path)

    def client(self) -> TensorBusClient:
        """A new client of it."""
        return TensorBusClient(self.rank, self.queue_path, self.state_path)


@dataclass(frozen=True)
class SeatInPair:
    """One rank's place in one pair."""

    name: str
    spec: MeshSpec
    placements: tuple[str, ...]


@dataclass(frozen=True)
class Part:
    """What one rank registers: its pairs, and its tensors with the names of their pairs, in the order of both sides."""

    direction: Direction
    batch_id: str
    pairs: tuple[SeatInPair, ...]
    tensors: tuple[tuple[Registrable, str], ...]


def part_of(
    agreement: Agreement, direction: Direction, rank: int, tensors: Mapping[tuple[str, ...], torch.Tensor], batch_id: str, session: str
) -> Part:
    """One rank's part of what crosses.

    Args:
        direction: "send" on the sender, "recv" on the receiver.
        tensors: what this rank holds, by `NamedTensor.key`.
        session: tells the pairs from those of earlier sessions.
    """
    seal = torch.zeros(1, dtype=torch.uint8)  # one byte that joins all ranks, also those that hold nothing of what crosses
    names = [f"{batch_id}/{session}/{index}" for index in range(len(agreement.pairs))]
    seats = (_seat(name, plan, direction, rank) for name, plan in zip(names, agreement.pairs, strict=True))
    pairs = tuple(seat for seat in seats if seat is not None)
    entries: list[tuple[Registrable, str]] = [(seal, names[0])]
    for crossing in agreement.crossings:
        share = crossing.source if direction == "send" else crossing.target
        if rank in share.ranks:
            entries.append((_cut(tensors[share.key], share, share.ranks.index(rank)), names[crossing.pair]))
    return Part(direction, batch_id, pairs, tuple(entries))


def _seat(name: str, plan: PairPlan, direction: Direction, rank: int) -> SeatInPair | None:
    ranks, layout = (plan.source_ranks, plan.source) if direction == "send" else (plan.target_ranks, plan.target)
    if rank not in ranks:
        return None
    return SeatInPair(name, MeshSpec(layout.mesh_shape, layout.coordinate(ranks.index(rank))), layout.placements)


def _cut(tensor: torch.Tensor, share: Share, index: int) -> Registrable:
    """What a rank registers for a share: its tensor, rows of it, or those of them that lie in a span of the global one."""
    if share.cut is None:
        return tensor
    local = getattr(tensor, "_local_tensor", tensor).detach()
    if isinstance(share.cut, Rows):
        return local.narrow(0, share.cut.start, share.cut.size)
    return _span(local, share, share.cut, index)


def _span(local: torch.Tensor, share: Share, span: Span, index: int) -> Piece:
    region = share.layout.region(index, span.whole)
    if any(len(intervals) > 1 for intervals in region.intervals):
        raise LayoutError(
            f"{share.names[0]!r} is a part of a fused tensor held as {share.layout}, of which a rank holds more than one box: shard the"
            " fused tensor plainly, or hold its parts one by one"
        )
    bounds = [intervals[0] if intervals else (0, 0) for intervals in region.intervals]
    begin, end = bounds[0]
    start = min(max(begin, span.start), span.start + span.size)
    stop = max(start, min(end, span.start + span.size))
    rows = local.narrow(0, max(0, min(start - begin, local.shape[0])), stop - start)
    offsets = [start - span.start, *(at for at, _ in bounds[1:])]
    return Piece(rows, share.shape, offsets if rows.numel() else [0] * rows.dim())


class Session:
    """A part registered with an agent. Registers without waiting; `ready` says when the others have, too.

    Raises what `TensorBusClient` and its `init_pair` and `register_tensors` raise.
    """

    def __init__(self, address: AgentAddress, part: Part) -> None:
        self._direction = part.direction
        self._last = Holding()
        self._client = address.client()
        local, remote = ("sender", "receiver") if part.direction == "send" else ("receiver", "sender")
        try:
            for seat in part.pairs:
                # Tokens and torch's placements are the same to init_pair.
                placements: Sequence[Any] = seat.placements
                self._client.init_pair(seat.name, local, remote, seat.spec.size, seat.spec, placements, blocking=False)
            self._handler = self._client.register_tensors(part.batch_id, part.tensors, blocking=False)
        except BaseException:
            self._client.close()
            raise

    def ready(self, timeout: float) -> bool:
        """Whether all ranks of both sides are registered; waits so many seconds for it. Raises what made it fail."""
        try:
            self._handler.wait_ready(timeout)
        except TimeoutError:  # not all are there, or a busy agent has not said so: the one is as little an end as the other
            return False
        return True

    def transfer(self, timeout: float | None, version: int | None = None) -> TransferReport:
        """Send, or receive, all that crosses. Raises what `TensorBusClient.transfer` raises."""
        semaphore: Any = self._handler.transfer(self._direction, blocking=True, timeout=timeout, version=version)  # type: ignore[arg-type]
        report: TransferReport = semaphore.result()
        return report

    def hurry(self, only_if_lost: bool = False) -> None:
        """Have a transfer that is under way end now, as if its time were up; ``only_if_lost``: if it waits for somebody who is gone, to be
        back. May not be heard: say it again."""
        self._handler.client._batches.hurry(self._handler.batch_id, only_if_lost)

    @property
    def held(self) -> Holding:
        """What its tensors hold, as its agent says, or said when this was closed."""
        with contextlib.suppress(BatchClosedError, UnknownBatchError):
            return self._handler._holding()
        return self._last

    def close(self, because: str = "") -> None:
        """Leave; all others are told, and ``because`` of whose loss, where it is for that."""
        self._last = self.held
        try:
            self._client.close(because)
        except (AgentDiedError, TransferTimeoutError) as error:
            logger.warning("weights: %s", error)
