"""The agents' own words, summed up: one row an agent, a pair, a batch and a sync, and what is wrong."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import msgspec

from etha_ray.status.syncs import Sync, syncs
from etha_ray.tensor_bus.inspection import Life, SeenAgent
from etha_ray.tensor_bus.snapshot import AgentStatus

_SYNCS = 20
"""Syncs that are listed."""

_PROBLEMS: dict[Life, str] = {
    "dead": "was killed and left its files: the pool's end (`etha-ray down`) or the next `etha-ray up` removes them",
    "stuck": "runs, and its loop has not turned for {age:.0f} s: the process is stopped or its store does not answer; restart it",
    "unreachable": "does not answer: its node is cut off, or it is being restarted",
}


class AgentRow(msgspec.Struct, frozen=True):
    """One agent. ``pid`` is None where it is not known, ``beat_age`` (seconds) too; ``began`` is in seconds since the epoch."""

    rank: int
    life: Life
    device: str
    hostname: str
    pid: int | None
    beat_age: float | None
    began: float | None
    workers: int
    pairs: int
    batches: int
    sent: int
    received: int
    failed: int
    bytes_sent: int
    bytes_received: int
    errors: dict[str, int]


class SideRow(msgspec.Struct, frozen=True):
    """One side of a pair: how many of its workers are known, and how they hold their tensors."""

    name: str
    workers: int
    layout: str | None


class PairRow(msgspec.Struct, frozen=True):
    """One pair. ``state`` is "matched" once all known workers are; ``waits_for`` says who has not come."""

    name: str
    sides: list[SideRow]
    state: str
    waits_for: str


class BatchRow(msgspec.Struct, frozen=True):
    """One batch. ``transfers`` is what each worker has completed, at most. ``waits`` are in words, one for each worker that waits.

    ``version`` is the highest that a worker holds; ``gb_per_s`` and ``seconds`` are of the last sync, None before the first.
    """

    batch_id: str
    workers: int
    state: str
    transfers: int
    version: int
    waits: list[str]
    bytes: int | None
    seconds: float | None
    gb_per_s: float | None


class SyncRow(msgspec.Struct, frozen=True):
    """What crossed at one time. Times are in seconds, ``began`` since the epoch. ``error`` is empty where all succeeded."""

    batch_id: str
    began: float
    seconds: float
    wait_seconds: float
    move_seconds: float
    bytes: int
    gb_per_s: float
    workers: int
    version: int
    error: str


class Overview(msgspec.Struct, frozen=True):
    """A pool at one moment (seconds since the epoch). ``problems`` say what is wrong and what to do; empty when all is well."""

    namespace: str
    time: float
    problems: list[str]
    agents: list[AgentRow]
    pairs: list[PairRow]
    batches: list[BatchRow]
    syncs: list[SyncRow]

    def as_dict(self) -> dict[str, Any]:
        """What JSON has of it."""
        found: dict[str, Any] = msgspec.to_builtins(self)
        return found


def overview(namespace: str, agents: Sequence[SeenAgent], time: float) -> Overview:
    """Sum up what was seen of a pool's agents at ``time`` (seconds since the epoch)."""
    known = syncs(agents)
    statuses = [(agent, agent.status) for agent in agents if agent.status is not None and agent.life in ("running", "stuck")]
    return Overview(
        namespace=namespace,
        time=time,
        problems=[f"agent {agent.rank} {_PROBLEMS[agent.life].format(age=agent.beat_age)}" for agent in agents if agent.life in _PROBLEMS]
        + [
            f"agent {agent.rank} has had no answer of its store for {time - status.store_silent_since:.0f} s: transfers go on, and nothing"
            " can be registered; see that the store runs and can be reached"
            for agent, status in statuses
            if status.store_silent_since
        ],
        agents=[_agent(agent) for agent in agents],
        pairs=_pairs([status for _, status in statuses]),
        batches=_batches(statuses, known),
        syncs=[_sync(sync) for sync in known[-_SYNCS:]],
    )


def _agent(agent: SeenAgent) -> AgentRow:
    status, record = agent.status, agent.record
    counts = status.counts if status is not None else {}
    totals = status.totals if status is not None else None
    return AgentRow(
        rank=agent.rank,
        life=agent.life,
        device=record.device if record is not None else "",
        hostname=record.hostname if record is not None else "",
        pid=record.pid if record is not None else None,
        beat_age=agent.beat_age,
        began=status.began if status is not None else None,
        workers=counts.get("workers", 0),
        pairs=counts.get("pairs", 0),
        batches=counts.get("batches", 0),
        sent=totals.sent if totals else 0,
        received=totals.received if totals else 0,
        failed=totals.failed if totals else 0,
        bytes_sent=totals.bytes_sent if totals else 0,
        bytes_received=totals.bytes_received if totals else 0,
        errors=dict(totals.errors) if totals else {},
    )


def _pairs(statuses: Iterable[AgentStatus]) -> list[PairRow]:
    found: dict[str, list[Any]] = {}
    for status in statuses:
        for pair in status.pairs:
            found.setdefault(pair.name, []).append(pair)
    rows = []
    for name, members in sorted(found.items()):
        sides = Counter(member.local for member in members)
        layouts = {member.local: member.layout for member in members}
        states = {member.state for member in members}
        # Each of them says it in the same words.
        waits = next((member.waits_for for member in members if member.waits_for), "")
        error = next((member.error for member in members if member.error), "")
        state = "failed" if "failed" in states else "matched" if states == {"matched"} else "matching"
        rows.append(PairRow(name, [SideRow(side, count, layouts[side]) for side, count in sorted(sides.items())], state, error or waits))
    return rows


def _batches(statuses: Sequence[tuple[SeenAgent, AgentStatus]], known: Sequence[Sync]) -> list[BatchRow]:
    found: dict[str, list[tuple[int, Any]]] = {}
    for agent, status in statuses:
        for batch in status.batches:
            found.setdefault(batch.batch_id, []).append((agent.rank, batch))
    last = {sync.batch_id: sync for sync in known if not sync.failed}
    rows = []
    for batch_id, members in sorted(found.items()):
        states = [batch.state for _, batch in members]
        sync = last.get(batch_id)
        waits = []
        for rank, batch in members:
            if batch.torn:
                waits.append(f"agent {rank}: torn, {batch.torn}")
            if batch.error:
                waits.append(f"agent {rank}: {batch.error}")
            elif batch.waits_for:
                waits.append(f"agent {rank} registers: {batch.waits_for}")
            elif batch.transfer is not None:
                waits.append(f"agent {rank} {batch.transfer.direction}: {batch.transfer.waits_for or 'bytes move'}")
        rows.append(
            BatchRow(
                batch_id=batch_id,
                workers=len(members),
                state=next((state for state in ("lost", "closed", "registering") if state in states), "ready"),
                transfers=max(batch.transfers for _, batch in members),
                version=max(batch.version for _, batch in members),
                waits=waits,
                bytes=None if sync is None else sync.bytes,
                seconds=None if sync is None else sync.ended - sync.began,
                gb_per_s=None if sync is None else sync.gb_per_s,
            )
        )
    return rows


def _sync(sync: Sync) -> SyncRow:
    reports = [part.past.report for part in sync.parts if part.past.report is not None]
    failed = next((part.past for part in sync.parts if part.past.report is None), None)
    return SyncRow(
        batch_id=sync.batch_id,
        began=sync.began,
        seconds=sync.ended - sync.began,
        wait_seconds=max((report.seconds - report.move_seconds for report in reports), default=0.0),
        move_seconds=sync.move_seconds,
        bytes=sync.bytes,
        gb_per_s=sync.gb_per_s,
        workers=len(sync.parts),
        version=max((report.version for report in reports), default=0),
        error="" if failed is None else f"{failed.kind}: {failed.message}",
    )
