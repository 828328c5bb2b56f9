"""The pairs of an agent's workers: who joins, who leaves. Owned by the agent's loop, and touched by no other thread."""

from __future__ import annotations

import logging
import secrets
import threading
import time
from collections.abc import Callable
from functools import partial

import msgspec

from etha_ray.config import HEARTBEAT_INTERVAL
from etha_ray.errors import ConfigError, EthaRayError, PairMismatchError, PairTimeoutError, StoreError
from etha_ray.kvstore import KVStore
from etha_ray.layout import Layout
from etha_ray.tensor_bus.commands import InitPair
from etha_ray.tensor_bus.jobs import Job, Jobs
from etha_ray.tensor_bus.journal import Journal
from etha_ray.tensor_bus.members import give_back, slot_of
from etha_ray.tensor_bus.outcomes import Outcomes
from etha_ray.tensor_bus.pair import Match, Pair, PairState, layout_of, match
from etha_ray.tensor_bus.records import AgentRecord, MemberRecord
from etha_ray.tensor_bus.snapshot import silent_store
from etha_ray.tensor_bus.state_file import StateFile, pair_state_key
from etha_ray.tensor_bus.withdrawals import Withdrawals
from etha_ray.tensor_bus.workers import Worker

logger = logging.getLogger(__name__)


class Pairing:
    """Lets workers join and leave pairs.

    Args:
        record: who the agent is.
        store: where agents find one another.
        state: the agent's state file.
        jobs: what runs beside the loop.
        outcomes: what answers commands.
        journal: what the next agent here would have to know.
        withdrawals: what gives places back.
    """

    def __init__(
        self,
        record: AgentRecord,
        store: KVStore,
        state: StateFile,
        jobs: Jobs,
        outcomes: Outcomes,
        journal: Journal,
        withdrawals: Withdrawals,
    ) -> None:
        self._record = record
        self._store = store
        self._state = state
        self._jobs = jobs
        self._outcomes = outcomes
        self._journal = journal
        self._withdrawals = withdrawals
        self._members = 0
        self._leaving: dict[tuple[str, str], list[threading.Event]] = {}

    def join(self, worker: Worker, command: InitPair) -> None:
        """A worker takes its place in a pair; it is answered once both sides are complete."""
        layout, index = layout_of(command)
        if command.local_name == command.remote_name:
            raise ConfigError(f"pair {command.pair_name!r}: both sides are called {command.local_name!r}: give each a name of its own")
        member = self._member(worker, command, layout, index)
        pair = worker.pairs.get(command.pair_name)
        if pair is None or pair.state is PairState.FAILED:
            self._members += 1
            pair = Pair(command.pair_name, command.local_name, command.remote_name, member, slot_of(member, self._members))
            worker.pairs[pair.name] = pair
            self._journal.joined(command, pair.slot)
        else:
            _check_same(pair, member)
        pair.waiting.append(command)
        if pair.job is None:
            # Also for one that was matched: the other side may have left since, and is waited for then.
            self._match(pair, command.timeout)

    def restore(self, worker: Worker, command: InitPair, slot: str) -> None:
        """A worker has had this place in a pair, served by an agent that died: take it again, however long that takes."""
        layout, index = layout_of(command)
        member = self._member(worker, command, layout, index)
        if index is None:
            self._members = max(self._members, int(slot.rpartition(".")[2]))
        pair = worker.pairs[command.pair_name] = Pair(command.pair_name, command.local_name, command.remote_name, member, slot)
        self._match(pair, None)

    def _member(self, worker: Worker, command: InitPair, layout: Layout | None, index: int | None) -> MemberRecord:
        return MemberRecord(
            attempt=secrets.token_hex(16),
            peer=command.local_name,
            remote=command.remote_name,
            world_size=command.expected_world_size,
            layout=None if layout is None else layout.encode(),
            index=index,
            client_id=command.client_id,
            worker_pid=worker.pid,
            worker_start_time=worker.start_time,
            agent=self._record,
        )

    def _match(self, pair: Pair, timeout: float | None) -> None:
        leaving = tuple(self._leaving.get((pair.name, pair.local_name), ()))
        work = partial(match, self._store, pair.name, pair.member, pair.slot, timeout, leaving)
        pair.job = self._jobs.start(f"pair {pair.name}", work, partial(self._over, pair))

    def leave(self, pair: Pair, reason: str, then: Callable[[], None]) -> None:
        """Give a worker's place back; ``then`` runs once the place is free, or the store found to be away.

        Who joins meanwhile in its stead, such as a new client of the same process, does so after that: the two are never there at once.
        """
        pair.leaving.append(then)
        self._hold_back(pair)
        if pair.job is not None:
            pair.job.cancellation.cancel(reason)
        else:
            self._give_back(pair)

    def _left(self, pair: Pair) -> None:
        assert pair.left is not None
        if pair.left.is_set():
            return  # given back before, when it could not be matched
        pair.left.set()
        leaving = self._leaving[pair.name, pair.local_name]
        leaving.remove(pair.left)
        if not leaving:
            del self._leaving[pair.name, pair.local_name]

    def expire_waiting(self, pair: Pair, store_silent_since: float) -> None:
        """Answer those whose time is up, and the job they wait for has not ended: it has no time limit, or a longer one, or waits for a
        store that has not answered since then (seconds since the epoch; 0 where it does)."""
        for command in list(pair.waiting):
            sent, timeout = command.timestamp, command.timeout
            if sent is not None and timeout is not None and time.time() - sent > timeout + HEARTBEAT_INTERVAL:
                pair.waiting.remove(command)
                self._outcomes.failed(command, _late(pair, timeout, store_silent_since))

    def _over(self, pair: Pair, job: Job[Match]) -> None:
        pair.match, pair.error, pair.job = job.value, job.error, None
        pair.state = PairState.MATCHED if pair.match is not None else PairState.FAILED
        if pair.match is not None:
            self._state.put(pair_state_key(pair.name), msgspec.msgpack.encode("matched"))
        else:
            self._journal.left(pair.member.client_id, pair.name)
        waiting, pair.waiting = pair.waiting, []
        for command in waiting:
            if pair.error is None:
                self._outcomes.ok(command)
            else:
                self._outcomes.failed(command, pair.error)
        if pair.leaving or isinstance(pair.error, StoreError):
            self._give_back(pair)

    def _hold_back(self, pair: Pair) -> None:
        if pair.left is None:
            pair.left = threading.Event()
            self._leaving.setdefault((pair.name, pair.local_name), []).append(pair.left)

    def _give_back(self, pair: Pair) -> None:
        callbacks, pair.leaving = pair.leaving, []

        def tried() -> None:
            for callback in callbacks:
                callback()

        if pair.match is None and not isinstance(pair.error, StoreError):  # it holds none; else the store may know better than we do
            self._left(pair)
            tried()
        else:
            self._hold_back(pair)
            work = partial(give_back, self._store, pair.name, pair.member, pair.slot)
            self._withdrawals.start(f"leave pair {pair.name!r}", work, tried, partial(self._left, pair))


def _late(pair: Pair, timeout: float, store_silent_since: float) -> EthaRayError:
    if store_silent_since:
        return silent_store(f"init_pair for {pair.name!r}: no answer within {timeout:g} s", store_silent_since)
    return PairTimeoutError(f"pair {pair.name!r} was not complete within {timeout:g} s; an earlier init_pair still waits")


def _check_same(pair: Pair, member: MemberRecord) -> None:
    known = pair.member
    for what in ("peer", "remote", "world_size", "layout", "index"):
        before, now = getattr(known, what), getattr(member, what)
        if before != now:
            raise PairMismatchError(
                f"pair {pair.name!r} was initialised by this client with {what} {before!r}, now with {now!r}:"
                " use another pair name, or a second client for the other side"
            )
