"""The side that has the weights."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from types import TracebackType
from typing import TypeVar

from etha_ray.config import check_timeout
from etha_ray.errors import (
    BatchClosedError,
    ConfigError,
    PeerLostError,
    TransferInProgressError,
    TransferTimeoutError,
)
from etha_ray.report import TransferReport, format_seconds
from etha_ray.weights.agreement import agree
from etha_ray.weights.fanout import Fanout
from etha_ray.weights.link import Link
from etha_ray.weights.member import LEAVE, Given, Member, Patience, deadline_in, remaining
from etha_ray.weights.parties import SENDER, Parties, Seen, Tables, Watcher, seen, sender_slot
from etha_ray.weights.reports import PushReport
from etha_ray.weights.roster import Call, Roster, replica_ids
from etha_ray.weights.session import Session, part_of

logger = logging.getLogger(__name__)

_T = TypeVar("_T")


class Publisher:
    """Made by `etha_ray.publish`: sends its weights to all replicas that have joined, as often as `push` is called.

    Close it, or use it as a context manager. Threads may share it; one push at a time.
    """

    def __init__(self, given: Given, min_replicas: int) -> None:
        if min_replicas < 0:
            raise ConfigError(f"min_replicas {min_replicas} is negative")
        self._min_replicas = min_replicas
        self._changed = threading.Condition()
        self._pushing = threading.Lock()
        self._links: dict[str, Link] = {}
        self._gone: list[Link] = []
        self._seen = seen({})
        self._version = self._tried = 0
        self._began = 0.0  # the push that is under way
        self._misfit: BaseException | None = None  # of a replica that has left, until a push has raised it
        self._closed = False
        self._member = Member(given, sender_slot)
        seat = self._member.seat
        self._leads = seat.rank == 0
        self._tables = Tables(self._member.board)
        self._roster = None if seat.size == 1 else Roster(given.name, seat, self._member.address, self._changed)
        self._watcher = Watcher(self._member.board, self._on_seen)

    # ------------------------------------------------------------------------------------------------- public

    @property
    def name(self) -> str:
        """What receivers ask for."""
        return self._member.name

    @property
    def version(self) -> int:
        """The last version that was pushed; 0 before the first."""
        return self._version

    @property
    def replicas(self) -> list[str]:
        """The replicas that are connected, and get the next push."""
        with self._changed:
            return sorted(replica_ids(self._links))

    def push(self, version: int | None = None, timeout: float | None = 300.0, straggler_timeout: float | None = None) -> PushReport:
        """Send the weights, as they are now, to all replicas that have joined. All ranks of the sender call it together.

        Waits until ``min_replicas`` have joined, then until each has taken the weights in its `Receiver.update`. A replica that dies,
        leaves or is late does not keep the others from theirs: the report says what became of it, and one that was late is tried
        again with the next push. The weights must not be written to meanwhile.

        Args:
            version: what is sent is called so from now on, above all before it; the training step, say. By default one more than the
                last one.
            timeout: seconds for all of it; None for as long as it takes.
            straggler_timeout: seconds that the others get once ``min_replicas`` (one at least) have taken the weights; longer than what a
                transfer takes, as one that is cut short in its midst leaves that replica's weights torn until its next `update`. None:
                until ``timeout``. One that dies, or whose agent stands still, is given up within seconds either way.

        Raises:
            NamesMismatchError, TensorMismatchError, LayoutError: (ValueErrors) the only replica holds something else.
            TransferTimeoutError: (a TimeoutError) not enough replicas joined, or none took the weights.
            PeerLostError, BatchClosedError: a rank of the sender, or the only replica, is gone.
            NotShareableError: (a ValueError) a tensor has other memory than when it was published.
            AgentDiedError: (a ConnectionError) the agent died.
            ConfigError: (a ValueError) the version is not above the last, or not that of the sender's rank 0.
            TransferInProgressError: another push is under way.
        """
        check_timeout(timeout)
        check_timeout(straggler_timeout)
        self._check_version(version)
        if not self._pushing.acquire(blocking=False):
            raise TransferInProgressError(f"weights {self.name!r}: a push is under way; wait for it before the next")
        try:
            self._member.settle()
            return self._push(version, deadline_in(timeout), timeout, straggler_timeout)
        finally:
            self._pushing.release()

    def start_push(
        self, version: int | None = None, timeout: float | None = 300.0, straggler_timeout: float | None = None
    ) -> Future[PushReport]:
        """`push` on a thread of its own, for a process that is sender and receiver at once: ``result()`` of what it returns is its
        report, or raises what `push` raises. The weights must not be written to until then. Raises `ConfigError` for a wrong version."""
        self._check_version(version)
        self._member.settle()
        return in_background("push", lambda: self.push(version, timeout, straggler_timeout))

    def close(self) -> None:
        """Leave: receivers get `BatchClosedError`. May be called more than once.

        Also while the store is away: the agent takes back what is said there of this rank once it answers again.
        """
        with self._changed:
            if self._closed:
                return
            self._closed = True
            links = [*self._links.values(), *self._gone, *([] if self._roster is None else [self._roster.link])]
            self._links = {}
            self._changed.notify_all()
        self._member.withdraw()
        for link in links:
            link.close()
        self._watcher.close()
        deadline = time.monotonic() + LEAVE
        for link in links:
            link.join(max(0.0, deadline - time.monotonic()))
        self._member.close()

    def __enter__(self) -> Publisher:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def __repr__(self) -> str:
        state = "closed" if self._closed else f"replicas={self.replicas}"
        return f"Publisher({self.name!r}, version={self._version}, {state})"

    # ------------------------------------------------------------------------------------------------- a push

    def _check_version(self, version: int | None) -> None:
        if version is not None and (isinstance(version, bool) or not isinstance(version, int) or version <= self._version):
            raise ConfigError(
                f"weights {self.name!r}: version {version!r} is not an integer above {self._version}, the last one that was pushed:"
                " versions count up from 1"
            )

    def _push(self, version: int | None, deadline: float | None, timeout: float | None, straggler_timeout: float | None) -> PushReport:
        began = self._began = time.monotonic()
        self._member.check_unmoved()
        call = self._decide(version, deadline, timeout)
        self._tried = call.version  # also if it fails: other ranks may have sent it
        fanout = Fanout[TransferReport](max(1, self._min_replicas), straggler_timeout, self._hurry)
        fanout.run(call.replicas, lambda replica, identity: self._send(replica, identity, call.version, deadline, fanout))
        reports, failed = fanout.done, fanout.failed
        if failed and not reports and self._min_replicas:
            raise next(iter(failed.values()))
        self._version = call.version
        for replica, error in failed.items():
            logger.warning("weights %r: version %d did not reach replica %r: %s", self.name, call.version, replica, error)
        with self._changed:
            misfits = {replica: _misfit(link, began) for replica, link in self._links.items()}
        failed.update({replica: error for replica, error in misfits.items() if error is not None})
        return PushReport(call.version, time.monotonic() - began, reports, failed)

    def _decide(self, version: int | None, deadline: float | None, timeout: float | None) -> Call:
        """The version, and which replicas get it: decided by rank 0, heard by the others."""
        if self._roster is None:
            return Call(version or self._tried + 1, self._joined(deadline, timeout))
        call = Call(version or self._tried + 1, self._joined(deadline, timeout)) if self._leads else None
        link = self._roster.link
        session = self._wait(lambda: self._session_of(link), f"the sender's other ranks ({self._missing(SENDER)})", deadline, timeout)
        if call is not None:
            self._roster.say(session, call, remaining(deadline))
            return call
        call = self._roster.hear(session, remaining(deadline))
        if version is not None and version != call.version:
            raise ConfigError(
                f"weights {self.name!r}: rank {self._member.seat.rank} pushes version {version}, and rank 0 version {call.version}:"
                " give the same on all ranks"
            )
        return call

    def _joined(self, deadline: float | None, timeout: float | None) -> dict[str, str]:
        """The replicas to push to, once there are enough."""

        def enough() -> dict[str, str] | None:
            ready = replica_ids(self._links)
            if len(ready) >= self._min_replicas:
                return ready
            misfits = [_misfit(link, self._began) for link in self._links.values()]
            if misfits and all(error is not None for error in misfits):
                raise next(error for error in misfits if error is not None)
            if not misfits and self._misfit is not None:
                error, self._misfit = self._misfit, None
                raise error
            return None

        wanted = "a replica" if self._min_replicas == 1 else f"{self._min_replicas} replicas"
        return self._wait(enough, f"{wanted} to join (publish(min_replicas=0) waits for none)", deadline, timeout)

    def _send(self, replica: str, identity: str, version: int, deadline: float | None, fanout: Fanout[TransferReport]) -> TransferReport:
        def found() -> tuple[Link, Session] | None:
            link = self._links.get(replica)
            if fanout.late:
                raise TransferTimeoutError(f"weights {self.name!r}: replica {replica!r}: not all ranks of the sender are connected with it")
            if link is None or link.id != identity:
                # Rank 0 was ready with it, for which all ranks must have registered: it has been here.
                if replica in self._seen.missing:
                    raise PeerLostError(f"weights {self.name!r}: replica {replica!r}: {self._seen.missing[replica]} any more")
                raise BatchClosedError(f"weights {self.name!r}: replica {replica!r} has left, or begun anew")
            session = self._session_of(link)
            return None if session is None else (link, session)

        link, session = self._wait(found, f"replica {replica!r}, which rank 0 is connected with", deadline, remaining(deadline))
        return link.transfer(session, remaining(deadline), version)

    def _hurry(self, replica: str) -> None:
        with self._changed:
            link = self._links.get(replica)
            self._changed.notify_all()
        if link is not None:
            link.hurry()

    def _session_of(self, link: Link) -> Session | None:
        error = link.error_since(self._began)
        if error is not None:
            raise error
        return link.ready

    def _wait(self, look: Callable[[], _T | None], what: str, deadline: float | None, timeout: float | None) -> _T:
        """Wait until ``look``, called while the links stand still, finds something."""
        patience, began = Patience(f"weights {self.name!r}: a push"), time.monotonic()
        with self._changed:
            while True:
                if self._closed:
                    raise BatchClosedError(f"weights {self.name!r}: the publisher was closed")
                found = look()
                if found is not None:
                    return found
                unseen = self._watcher.error_since(began)
                if unseen is not None:
                    raise unseen
                self._watcher.hurry()
                if not patience.wait(self._changed, deadline, lambda: f"{what}; {self._state()}"):
                    raise TransferTimeoutError(
                        f"weights {self.name!r}: waited {format_seconds(timeout or 0.0)} for {what}; {self._state()}"
                    )

    def _missing(self, side: str) -> str:
        return self._seen.missing.get(side, "they are there")

    def _state(self) -> str:
        """Who is there, in words."""
        there = [link for replica, link in self._links.items() if replica not in self._seen.missing]
        parts = [f"{link.name} is {link.state.value}{link.trouble and f' again and again: {link.trouble}'}" for link in there]
        parts += [
            f"{'the sender' if who == SENDER else f'replica {who!r}'}: {missing}" for who, missing in sorted(self._seen.missing.items())
        ]
        if self._watcher.problem:
            parts.append(f"the store: {self._watcher.problem}")
        return "; ".join(parts) or "nobody has called pull with this name, in this pool"

    # ------------------------------------------------------------------------------------------------- who is there

    def _on_seen(self, found: Seen) -> None:
        with self._changed:
            if self._closed:
                return
            self._seen = found
            if found.senders is None:
                return  # a rank of this side is being replaced: what is lost by that says so itself
            if self._roster is not None:
                self._roster.link.offer(Parties(found.senders, ()))
            for replica in found.receivers:
                if replica not in self._links:
                    self._links[replica] = self._link_to(replica)
                absent = found.missing.get(replica)
                self._links[replica].offer(found.parties(replica), "" if absent is None else f"replica {replica!r}: {absent}")
            for replica in [replica for replica in self._links if replica not in found.receivers]:
                if self._links[replica].busy:  # where only its agent died, it is back before that is over, and the same as before
                    continue
                link = self._links.pop(replica)
                self._misfit = _misfit(link, math.inf) or self._misfit
                link.retire()
                self._gone = [*(other for other in self._gone if other.alive), link]
            self._changed.notify_all()

    def _link_to(self, replica: str) -> Link:
        name = f"replica {replica!r}"
        before = next((link for link in reversed(self._gone) if link.name == name), None)
        return Link(name, "not all ranks have called update in time", self._connect_with(replica), self._changed, before)

    def _connect_with(self, replica: str) -> Callable[[Parties], Session]:
        member = self._member

        def connect(parties: Parties) -> Session:
            agreement = agree(member.name, self._tables.of(parties.senders), self._tables.of(parties.receivers))
            batch_id = f"{member.name}/{replica}"
            return Session(member.address, part_of(agreement, "send", member.seat.rank, member.tensors, batch_id, parties.id))

        return connect


def _misfit(link: Link, began: float) -> BaseException | None:
    """Why a replica cannot be connected with, for a push that ``began`` then. One that is lost may come back; one that does not fit will
    not fit later either."""
    error = link.error_since(began)
    return None if isinstance(error, (PeerLostError, BatchClosedError)) else error


def in_background(what: str, call: Callable[[], _T]) -> Future[_T]:
    """Run ``call`` on a thread that the process's end does not wait for."""
    future: Future[_T] = Future()

    def run() -> None:
        try:
            future.set_result(call())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, name=f"etha-ray {what}", daemon=True).start()
    return future
