"""What an agent serves, as it is now: for `etha-ray status`, and for clients that want to know what they wait for.

The loop makes it twice a second; it is in the agent's state file, so that it can be read without asking the agent, also of one
that is stuck.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from itertools import islice

import msgspec

from etha_ray.errors import StoreUnavailableError
from etha_ray.tensor_bus.batch import Batch
from etha_ray.tensor_bus.history import Totals
from etha_ray.tensor_bus.pair import Pair, PairState
from etha_ray.tensor_bus.records import AgentRecord
from etha_ray.tensor_bus.workers import Worker

ASK_STORE = frozenset({"init_pair", "register_tensors", "ready_replicas", "announce", "withdraw", "read_notices", "read_body"})
"""The commands that an agent asks the store for."""

_LISTED = 128
"""Pairs, and batches, that are listed at most."""


class PairStatus(msgspec.Struct, frozen=True, omit_defaults=True):
    """One worker's place in a pair. ``waits_for`` says who has not come, in words."""

    name: str
    local: str
    remote: str
    client_id: str
    state: str
    index: int | None = None
    layout: str | None = None
    waits_for: str = ""
    error: str = ""


class TransferStatus(msgspec.Struct, frozen=True, omit_defaults=True):
    """A transfer under way, since ``began`` (seconds since the epoch)."""

    direction: str
    state: str
    began: float
    waits_for: str = ""


class BatchStatus(msgspec.Struct, frozen=True, omit_defaults=True):
    """One worker's registration of a batch. ``waits_for`` is about the registration.

    ``version`` is what its tensors hold, 0 before the first transfer and while they are torn; then ``torn`` says why.
    """

    batch_id: str
    client_id: str
    state: str
    transfers: int = 0
    version: int = 0
    torn: str = ""
    transfer: TransferStatus | None = None
    waits_for: str = ""
    error: str = ""


class AgentStatus(msgspec.Struct, frozen=True, omit_defaults=True):
    """One agent. ``workers`` are pids. Of very many pairs and batches the first are listed; ``counts`` has how many there are.

    ``store_silent_since``: since when the store does not answer, in seconds since the epoch; 0 while it does.
    """

    record: AgentRecord
    began: float
    counts: dict[str, int]
    totals: Totals
    workers: tuple[int, ...] = ()
    pairs: tuple[PairStatus, ...] = ()
    batches: tuple[BatchStatus, ...] = ()
    store_silent_since: float = 0.0


def counts(workers: Iterable[Worker]) -> dict[str, int]:
    """How many workers, pairs and batches there are."""
    found = list(workers)
    return {
        "workers": len(found),
        "pairs": sum(len(worker.pairs) for worker in found),
        "batches": sum(len(worker.batches) for worker in found),
    }


def snapshot(record: AgentRecord, began: float, workers: Iterable[Worker], totals: Totals, store_silent_since: float) -> AgentStatus:
    """What these workers have. On the loop only."""
    found = list(workers)
    pairs = (_pair(pair) for worker in found for pair in worker.pairs.values())
    batches = (_batch(batch) for worker in found for batch in worker.batches.values())
    return AgentStatus(
        record=record,
        began=began,
        counts=counts(found),
        totals=totals,
        workers=tuple(worker.pid for worker in found[:_LISTED]),
        pairs=tuple(islice(pairs, _LISTED)),
        batches=tuple(islice(batches, _LISTED)),
        store_silent_since=store_silent_since,
    )


def silent_store(what: str, since: float) -> StoreUnavailableError:
    """The error of ``what`` the store was to be asked for, which has not answered since then (seconds since the epoch)."""
    return StoreUnavailableError(
        f"{what}: the store of its agent has not answered for {time.time() - since:.1f} s: see that it runs and that the agent's host"
        " reaches it, then call again"
    )


def waited_for(status: AgentStatus, client_id: str, what: str, name: str) -> str:
    """What a command of this client waits for, in words; empty where the agent does not know, or it waits for nobody.

    ``what`` is "init_pair", "register_tensors", "transfer" or "wait_version", and ``name`` the pair's or the batch's.
    """
    if status.store_silent_since and what in ASK_STORE:
        return f"the store has not answered for {time.time() - status.store_silent_since:.0f} s"
    if what == "init_pair":
        return next((pair.waits_for for pair in status.pairs if (pair.client_id, pair.name) == (client_id, name)), "")
    for batch in status.batches:
        if (batch.client_id, batch.batch_id) == (client_id, name):
            transfer = batch.transfer
            return batch.waits_for or (transfer.waits_for if transfer is not None and what != "register_tensors" else "")
    return ""


def _pair(pair: Pair) -> PairStatus:
    member, job = pair.member, pair.job
    return PairStatus(
        name=pair.name,
        local=pair.local_name,
        remote=pair.remote_name,
        client_id=member.client_id,
        state=pair.state.value,
        index=member.index,
        layout=member.layout,
        waits_for=job.cancellation.waits_for if job is not None else "",
        error=str(pair.error) if pair.state is PairState.FAILED else "",
    )


def _batch(batch: Batch) -> BatchStatus:
    transfer, job = batch.transfer, batch.job
    return BatchStatus(
        batch_id=batch.batch_id,
        client_id=batch.client_id,
        state=batch.state.value,
        transfers=batch.completed,
        version=batch.holding.version,
        torn=batch.holding.why if batch.holding.torn and not (transfer is not None and transfer.moving_since) else "",
        transfer=None
        if transfer is None
        else TransferStatus(
            direction=transfer.command.transfer_type,
            state=transfer.state.value,
            began=transfer.began,
            waits_for=batch.waits_for(transfer),
        ),
        waits_for=job.cancellation.waits_for if job is not None else "",
        error=str(batch.closed or batch.loss or ""),
    )
