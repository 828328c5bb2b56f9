"""Registering a batch: a job that opens this worker's memory, finds the other members, and prepares the transfer.

The job publishes a `BatchRecord` for each pair of the batch (`published`) and reads those of all other members; what they hold,
`manifests` has in few bytes. Once a pair is complete it compares what everyone registered (`agreement`), opens the senders' memory and
prepares the copies (`registered`); then it publishes the digests of what it saw, ``agreed``, and of its plan, ``plan``. The
batch is ready when every member has published the same: each of them is then ready too.

A batch id is used again and again, by members that do not wait for one another, so what is read may be left over:

- A record that has agreed to something else belongs to a registration that is over, or is about to look again. What does not
  fit it is no error until the time is up.
- A record without memory behind it is being withdrawn, and is waited for to go away.
- A member that saw all agree may close at once, before the others have seen it. It has told their agents by then (`Registration.confirm`);
  a member whose set falls apart lets its loop read what came in (`settle`) before it takes up a new set.
- A member that goes away before it saw all agree tells those with whom it had agreed (`Registration.agreed_with`), as they may have.
- A worker that was replaced (other ``attempt``) makes the others read the pair again.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch

from etha_ray.errors import BatchUnmatchedError, EthaRayError, HandleExpiredError, TensorMismatchError
from etha_ray.kvstore import KVStore
from etha_ray.memory import decode_handle, open_tensors
from etha_ray.tensor_bus.agreement import agree, difference, set_digest
from etha_ray.tensor_bus.commands import RegisteredTensor
from etha_ray.tensor_bus.executor import Part
from etha_ray.tensor_bus.jobs import Backoff, Cancellation
from etha_ray.tensor_bus.manifests import Manifests, said
from etha_ray.tensor_bus.members import gone_among, is_refused, raise_if_refused, refuse
from etha_ray.tensor_bus.pair import Match, Pair, PairState, rematch
from etha_ray.tensor_bus.published import Published
from etha_ray.tensor_bus.records import BatchRecord, PlanInputs, Standing, batch_prefix, decode, encode, fingerprint, verdict_key
from etha_ray.tensor_bus.registered import AgreedPart, Peer, Registered, connect
from etha_ray.tensor_bus.state_file import StateFile
from etha_ray.tensor_bus.ways import Ways

__all__ = ["Peer", "Registered", "Registration", "Request"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Request:
    """What a registration job works from."""

    batch_id: str
    registration: str
    pairs: dict[str, Pair]
    tensors: Sequence[tuple[str, RegisteredTensor]]
    bucket_size: int
    timeout: float | None
    after: threading.Event | None
    """Set once this worker's earlier batch of the same id is withdrawn; None if there is none."""
    standing: Standing | None = None
    """What this worker did with the batch before."""


_Records = tuple[list[BatchRecord | None], list[BatchRecord | None]]
_Set = tuple[list[BatchRecord], list[BatchRecord]]


class Registration:
    """One registration under way. Runs on a job's thread; `close` afterwards withdraws what it published.

    Args:
        store, state, ways: the agent's.
        request: what to register.
        settle: returns once the agent's loop has handled all messages that have come in.
    """

    def __init__(self, store: KVStore, state: StateFile, ways: Ways, request: Request, settle: Callable[[Cancellation], None]) -> None:
        self._store = store
        self._ways = ways
        self._request = request
        self._settle = settle
        self._manifests = Manifests(store)
        self._published = Published(store, state, ways.network, self._manifests, request.batch_id, request.registration)
        self._inputs: dict[str, PlanInputs] = {}
        self._confirmed: set[str] = set()
        self.withdrawn = False
        """Whether nothing of it is left in the store, now that it is closed."""
        self.agreed_with: dict[str, Peer] = {}
        """The other members of each set that this one has agreed to: any of them may take it for ready. By registration."""

    def run(self, cancellation: Cancellation) -> Registered:
        """Register, and wait until every member is ready.

        Raises:
            BatchUnmatchedError, TensorMismatchError, LayoutError, NoTransportError, MemoryHandleError, StoreError,
            TransferCancelledError; and whatever made a pair of the batch fail.
        """
        request = self._request
        deadline = None if request.timeout is None else time.monotonic() + request.timeout
        backoff = Backoff(cancellation, deadline)
        grouped: dict[str, list[RegisteredTensor]] = {}
        for pair_name, tensor in request.tensors:
            grouped.setdefault(pair_name, []).append(tensor)
        result = Registered()
        try:
            while request.after is not None and not request.after.is_set():
                if request.standing is None:  # who registers again has nobody who waits for an answer
                    self._store.exists(verdict_key(request.registration))  # if the store is away, that one cannot be closed
                if not backoff.wait():
                    raise BatchUnmatchedError(f"batch {request.batch_id!r}: this worker's earlier batch of that id is still being closed")
            matches = self._matches(grouped, backoff, cancellation)
            own = self._open_own(grouped, result)
            for name in grouped:
                self._published.publish(name, matches[name], grouped[name], own[name], request.standing)
            self._meet(matches, own, result, backoff, cancellation)
        except BaseException:
            result.close()
            try:
                self.close()
            except EthaRayError as error:
                logger.warning("batch %r could not be withdrawn: %s", request.batch_id, error)
            raise
        return result

    @property
    def has_agreed(self) -> bool:
        """Whether others may take this member for ready by now. From any thread."""
        return any(self._published.agreed)

    @property
    def agreed(self) -> tuple[str, ...]:
        """What this member agreed to, by pair; once it is ready, what all have agreed to."""
        return self._published.agreed

    def confirm(self, agreed: Iterable[str]) -> None:
        """Another member saw that all agreed to these sets. From any thread."""
        self._confirmed.update(agreed)

    def close(self) -> None:
        """Withdraw what was published. May be called more than once."""
        self._published.withdraw()
        self._store.delete(verdict_key(self._request.registration))
        self.withdrawn = True

    # ------------------------------------------------------------------------------------------------ own side

    def _matches(self, names: dict[str, list[RegisteredTensor]], backoff: Backoff, cancellation: Cancellation) -> dict[str, Match]:
        matches = {}
        for name in names:
            pair = self._request.pairs[name]
            while pair.state is PairState.MATCHING:
                cancellation.waits_for = f"pair {name!r} is not complete: {pair.remote_name!r} has not come"
                if not backoff.wait():
                    raise BatchUnmatchedError(
                        f"batch {self._request.batch_id!r}: pair {name!r} is not complete yet after {self._request.timeout:g} s:"
                        f" wait until {pair.remote_name!r} has called init_pair"
                    )
            if pair.match is None:
                assert pair.error is not None
                raise pair.error
            matches[name] = pair.match
            backoff.reset()
        return matches

    def _open_own(self, grouped: dict[str, list[RegisteredTensor]], result: Registered) -> dict[str, list[torch.Tensor]]:
        labels = [f"tensor {place} of batch {self._request.batch_id!r}" for name in grouped for place in self._places(name)]
        handles = [decode_handle(tensor.handle) for tensors in grouped.values() for tensor in tensors]
        opened = open_tensors(handles, labels=labels, gpu=self._ways.gpu)
        result.opened.append(opened)
        tensors = iter(opened.tensors)
        own = {name: [next(tensors) for _ in entries] for name, entries in grouped.items()}
        handles_here = iter(opened.handles)
        self._published.show({name: [next(handles_here) for _ in entries] for name, entries in grouped.items()}, own)
        return own

    def _places(self, pair_name: str) -> list[int]:
        """Where the tensors of a pair stand among all that were registered."""
        return [place for place, (name, _) in enumerate(self._request.tensors) if name == pair_name]

    # --------------------------------------------------------------------------------------------- all members

    def _meet(
        self,
        matches: dict[str, Match],
        own: dict[str, list[torch.Tensor]],
        result: Registered,
        backoff: Backoff,
        cancellation: Cancellation,
    ) -> None:
        prepared: dict[str, str] = {}
        plans: dict[str, str] = {}
        known: set[str] = set()
        problem: EthaRayError | None = None
        while True:
            raise_if_refused(self._store, self._request.registration, known)
            found = {name: self._records(name, matches) for name in matches}
            self._repeat(matches, found)
            known = {record.registration for sides in found.values() for side in sides for record in side if record is not None}
            if self._differ(matches, found):
                backoff.reset()
                continue
            sets = _complete_sets(found)
            digests = {name: set_digest(self._request.batch_id, name, matches[name], *sets[name]) for name in sets}
            if prepared and digests != prepared:
                self._settle(cancellation)
            if prepared and all(self._is_agreed(name, prepared[name], sets, plans) for name in prepared):
                return
            if digests != prepared:
                prepared, problem = {}, None
            if digests and not prepared:
                try:
                    self._prepare(matches, own, sets, result)
                except EthaRayError as error:
                    self._published.agree({}, {})
                    if not isinstance(error, HandleExpiredError) and self._is_final(matches, sets, digests):
                        self._refuse_all(error, known)
                        raise
                    problem = error
                else:
                    prepared = digests
                    plans = {name: fingerprint(encode(inputs)) for name, inputs in self._inputs.items()}
                    self.agreed_with |= result.others
                    self._published.agree(digests, plans)
                    backoff.reset()
                    continue
            elif digests and _all_agree(sets, digests):
                misfit = self._compare_plans(sets, plans)
                if misfit is not None:
                    self._refuse_all(misfit, known)
                    raise misfit
            cancellation.waits_for = _absent(matches, found)
            if not backoff.wait():
                if problem is not None and not isinstance(problem, HandleExpiredError):
                    raise problem
                # Memory that is gone is of somebody who goes, and whose successor has not come in time.
                raise BatchUnmatchedError(self._missing(matches, found) + (f" (the last try: {problem})" if problem else "")) from problem

    def _repeat(self, matches: dict[str, Match], found: dict[str, _Records]) -> None:
        """Publish again what is gone from the store of this member's own."""
        for name, (local, _) in found.items():
            if local[matches[name].index] is None:
                self._published.repeat(name)

    def _differ(self, matches: dict[str, Match], found: dict[str, _Records]) -> bool:
        """Say what others cannot know, once the first member of this side has said its own; whether there was anything."""
        firsts = {name: local[0] for name, (local, _) in found.items() if not matches[name].paired}
        return any([self._published.differ(name, first) for name, first in firsts.items() if first is not None])

    def _is_agreed(self, pair_name: str, digest: str, sets: dict[str, _Set], plans: dict[str, str]) -> bool:
        """Whether all members of a pair have agreed to this set: their records say so, or one that is gone again said so."""
        if digest in self._confirmed:
            return True
        return pair_name in sets and _all_agree({pair_name: sets[pair_name]}, {pair_name: digest}, plans)

    def _refuse_all(self, error: EthaRayError, known: set[str]) -> None:
        mine = self._request.registration
        # This one first: who is told and registers again at once must see that this record is to go.
        refuse(self._store, [mine], error, known)
        refuse(self._store, known - {mine}, error, [mine])

    def _compare_plans(self, sets: dict[str, _Set], plans: dict[str, str]) -> EthaRayError | None:
        """What differs between this member's plan and another's, once that one has said what it was made from.

        Members that read the same records plan alike, unless they are not of one version.
        """
        for name, sides in sets.items():
            self._manifests.store(plans[name], self._inputs[name])
            for record in (record for side in sides for record in side):
                if record.plan != plans[name] and (other := self._manifests.find(record.plan, PlanInputs)) is not None:
                    return TensorMismatchError(self._plan_misfit(name, record, other))
        return None

    def _plan_misfit(self, pair_name: str, record: BatchRecord, other: PlanInputs) -> str:
        position, mine, theirs = difference(self._inputs[pair_name], other)
        where = f"batch {self._request.batch_id!r}, pair {pair_name!r}"
        if position is not None:
            where += f", tensor {position}"
        return (
            f"{where}: two members made different plans from the same records: {mine!r} and {theirs!r} (registration"
            f" {record.registration}): run the same versions of etha_ray and torch on both sides"
        )

    def _records(self, pair_name: str, matches: dict[str, Match]) -> _Records:
        """Everyone's record, in the order of both sides; the match is read again if members were replaced."""
        match = matches[pair_name]
        sides = match.local, match.remote
        by_attempt: dict[str, BatchRecord] = {}
        keys: dict[str, str] = {}
        for members in sides:
            prefix = batch_prefix(self._request.batch_id, pair_name, members[0].peer)
            for key, value in self._store.list(prefix).items():
                record = decode(value, BatchRecord, key)
                by_attempt[record.attempt], keys[record.attempt] = record, key
        gone = gone_among(self._store, (member for members in sides for member in members))
        strangers = by_attempt.keys() - {member.attempt for members in sides for member in members}
        if gone or strangers:
            fresh, attempts = rematch(self._store, pair_name, match)
            for attempt in strangers - attempts:
                self._store.delete(keys[attempt])  # of a worker that died with its agent: nobody else removes it
            if fresh is not None:
                matches[pair_name] = fresh
                sides = fresh.local, fresh.remote
        local, remote = ([None if m.attempt in gone else by_attempt.get(m.attempt) for m in members] for members in sides)
        return local, remote

    def _is_final(self, matches: dict[str, Match], sets: dict[str, _Set], digests: dict[str, str]) -> bool:
        """Whether everyone else is looking at the same set right now, so that what does not fit will not fit later either."""
        mine = self._request.registration
        others = [(name, record) for name, sides in sets.items() for side in sides for record in side if record.registration != mine]
        if any(record.agreed not in ("", digests[name]) or is_refused(self._store, record.registration) for name, record in others):
            return False
        # One that was refused removes its record first, then the refusal: it may have done both since the set was read.
        again = _complete_sets({name: self._records(name, matches) for name in matches})
        return again.keys() == sets.keys() and all(_registrations(again[name]) == _registrations(sets[name]) for name in sets)

    def _prepare(self, matches: dict[str, Match], own: dict[str, list[torch.Tensor]], sets: dict[str, _Set], result: Registered) -> None:
        """Compare, plan, open the senders' memory and prepare the copies."""
        parts = []
        for name, match in matches.items():
            local, remote = sets[name]
            manifests = [[self._manifests.read(record) for record in side] for side in (local, remote)]
            agreement = agree(self._request.batch_id, name, match, *manifests)
            part = Part(self._request.batch_id, name, match, self._places(name), own[name], agreement.tensors)
            parts.append(AgreedPart(part, agreement, local, remote))
            self._inputs[name] = agreement.inputs
        result.take(connect(self._ways, parts, self._request.bucket_size))

    def _missing(self, matches: dict[str, Match], found: dict[str, _Records]) -> str:
        return (
            f"batch {self._request.batch_id!r} was not registered by everyone within {self._request.timeout:g} s:"
            f" {_absent(matches, found)}."
            " Call register_tensors with this batch id on every rank of both sides"
        )


def _absent(matches: dict[str, Match], found: dict[str, _Records]) -> str:
    """Who has not registered yet, in words."""
    parts = []
    for name, match in matches.items():
        for members, records in zip((match.local, match.remote), found[name], strict=True):
            missing = [index for index, record in enumerate(records) if record is None]
            if missing:
                parts.append(f"{members[0].peer!r} lacks index {missing} of {len(records)} (pair {name!r})")
    return "; ".join(parts) or "all have registered, and not all of them are ready"


def _complete_sets(found: dict[str, _Records]) -> dict[str, _Set]:
    """The records of all pairs; nothing unless everyone's is there, and says what that member holds."""
    if any(record is None for sides in found.values() for side in sides for record in side):
        return {}
    sets = {name: (_present(local), _present(remote)) for name, (local, remote) in found.items()}
    return sets if all(said(side) for sides in sets.values() for side in sides) else {}


def _all_agree(sets: dict[str, _Set], digests: dict[str, str], plans: dict[str, str] | None = None) -> bool:
    return all(
        record.agreed == digests[name] and (plans is None or record.plan == plans[name])
        for name, sides in sets.items()
        for side in sides
        for record in side
    )


def _registrations(sides: _Set) -> list[str]:
    return [record.registration for side in sides for record in side]


def _present(records: list[BatchRecord | None]) -> list[BatchRecord]:
    return [record for record in records if record is not None]
