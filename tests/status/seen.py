"""Agents as they might be seen, for tests that need none."""

from __future__ import annotations

from typing import Any, Literal

from etha_ray.report import Span, TransferReport
from etha_ray.tensor_bus.history import Flow, PastTransfer, Totals, flow_key
from etha_ray.tensor_bus.inspection import Life, SeenAgent
from etha_ray.tensor_bus.records import AgentRecord
from etha_ray.tensor_bus.snapshot import AgentStatus, BatchStatus, PairStatus, TransferStatus

BEGAN = 1_764_000_000.0


def record(rank: int) -> AgentRecord:
    return AgentRecord(rank, f"incarnation {rank}", 100 + rank, 0.0, "host<1>", "h", "", "", f"/c{rank}", f"/s{rank}", "cpu")


def transfer(
    direction: Literal["send", "recv"],
    worker: str,
    others: list[str],
    *,
    sequence: int = 1,
    began: float = 0.0,
    waited: float = 0.25,
    moved: float = 0.5,
    count: int = 1000,
    batch_id: str = "policy",
) -> PastTransfer:
    """A transfer of ``count`` bytes with each other worker; registrations are named after the workers, times are from `BEGAN`."""
    names = ("wait for receivers", "read by receivers") if direction == "send" else ("wait for senders", "move")
    spans = (Span(names[0], 0.0, waited), Span(names[1], waited, moved))
    total, peers = count * len(others), {other: count for other in others}
    keys = [flow_key(worker, other, sequence) if direction == "send" else flow_key(other, worker, sequence) for other in others]
    return PastTransfer(
        batch_id=batch_id,
        direction=direction,
        client_id=f"{sum(map(ord, worker))}-{worker}",
        began=BEGAN + began,
        seconds=waited + moved,
        report=TransferReport(batch_id, direction, total, waited + moved, moved, spans, peers, sequence),
        flows=tuple(Flow(key, other, count) for key, other in zip(keys, others, strict=True)),
    )


def failure(worker: str, batch_id: str = "policy", began: float = 5.0) -> PastTransfer:
    return PastTransfer(batch_id, "recv", f"7-{worker}", BEGAN + began, 1.0, None, "TransferTimeoutError", "t0 did <not> send")


def agent(rank: int, *past: PastTransfer, life: Life = "running", **more: Any) -> SeenAgent:
    totals = Totals(
        sent=sum(each.direction == "send" and each.report is not None for each in past),
        received=sum(each.direction == "recv" and each.report is not None for each in past),
        failed=sum(each.report is None for each in past),
        bytes_received=sum(each.report.bytes for each in past if each.report is not None and each.direction == "recv"),
    )
    status = AgentStatus(
        record=record(rank), began=BEGAN, counts={"workers": 1, "pairs": 1, "batches": 1}, totals=totals, workers=(rank,), **more
    )
    return SeenAgent(rank, life, BEGAN, (f"/c{rank}", f"/s{rank}"), 0.1, record(rank), status, past)


def pair(local: str, remote: str, state: str = "matched", waits_for: str = "") -> PairStatus:
    return PairStatus("weights", local, remote, f"1-{local}", state, 0, "2: S0", waits_for)


def batch(
    state: str = "ready", waits_for: str = "", transfer: TransferStatus | None = None, version: int = 2, torn: str = ""
) -> BatchStatus:
    return BatchStatus("policy", "1-a", state, 3, version, torn, transfer, waits_for)


def pool() -> list[SeenAgent]:
    """Two trainers and two generators after two syncs, and one receive that failed."""
    senders = [
        agent(
            rank,
            *(transfer("send", f"t{rank}", ["g0", "g1"], sequence=step, began=step * 2.0 + 0.1 * rank) for step in (1, 2)),
            pairs=(pair("trainer", "generator"),),
            batches=(batch(),),
        )
        for rank in (0, 1)
    ]
    receivers = [
        agent(
            2 + rank,
            *(transfer("recv", f"g{rank}", ["t0", "t1"], sequence=step, began=step * 2.0 + 0.1) for step in (1, 2)),
            *([failure("g1")] if rank == 1 else []),
            pairs=(pair("generator", "trainer"),),
            batches=(batch(),),
        )
        for rank in (0, 1)
    ]
    return [*senders, *receivers]
