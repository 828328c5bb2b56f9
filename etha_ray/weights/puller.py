"""The side that takes the weights."""

from __future__ import annotations

import threading
import time
from types import TracebackType

from etha_ray.config import check_name, check_timeout
from etha_ray.errors import BatchClosedError, BatchUnmatchedError, PeerLostError
from etha_ray.report import TransferReport
from etha_ray.tensor_bus.versions import Holding
from etha_ray.weights.agreement import agree
from etha_ray.weights.link import Link, LinkState
from etha_ray.weights.member import LEAVE, Given, Member, Patience, deadline_in, remaining, store_time
from etha_ray.weights.parties import LONGEST_PAUSE, SENDER, Parties, Seen, Tables, Watcher, receiver_slot, seen
from etha_ray.weights.session import Session, part_of


class Receiver:
    """Made by `etha_ray.pull`: takes each version that the publisher pushes, in place, when `update` is called.

    Close it, or use it as a context manager. One thread at a time may update.
    """

    def __init__(self, given: Given, replica: str, deadline: float | None = None) -> None:
        check_name("replica", replica)
        self.replica = replica
        self._changed = threading.Condition()
        self._seen: Seen = seen({})
        self._version = 0
        self._torn = False
        self._receiving: Session | None = None
        self._unsure: Session | None = None  # of the last update, if it failed: its agent may write the tensors yet, or have done so
        self._report: TransferReport | None = None
        self._raised = ""
        self._closed = False
        self._member = Member(given, lambda rank: receiver_slot(replica, rank), deadline)
        self._tables = Tables(self._member.board)
        self._link = Link(f"the sender of {given.name!r}", "not all ranks have called push in time", self._connect, self._changed)
        self._watcher = Watcher(self._member.board, self._on_seen)

    # ------------------------------------------------------------------------------------------------- public

    @property
    def name(self) -> str:
        """What is pulled."""
        return self._member.name

    @property
    def version(self) -> int:
        """The version that the tensors hold: the one received last, which may be one that an `update` had given up waiting for. 0 until
        there was one, and while they are `torn`."""
        return self._holds()[0]

    @property
    def torn(self) -> bool:
        """Whether tensors may hold bytes of two versions: while a version is being received in place, and after an update that ended
        midway, or whose agent was killed meanwhile, until the next one that succeeds."""
        return self._holds()[1]

    @property
    def report(self) -> TransferReport | None:
        """What the last update did; None before the first."""
        return self._report

    def wait_ready(self, timeout: float | None = 300.0) -> None:
        """Wait until all ranks of both sides are connected. Raises what `update` raises, and `BatchUnmatchedError` (a TimeoutError)."""
        check_timeout(timeout)
        self.connect(deadline_in(timeout), timeout)

    def update(self, timeout: float | None = 300.0) -> int:
        """Wait for the next version and take it into the tensors. All ranks of the replica call it together; returns the version.

        After an error the next call connects anew, with whoever is there then.

        Args:
            timeout: seconds to wait; None for as long as it takes.

        Raises:
            NamesMismatchError, TensorMismatchError, LayoutError: (ValueErrors) the sides do not hold the same.
            BatchUnmatchedError, TransferTimeoutError: (TimeoutErrors) there is no sender, or it has not pushed.
            PeerLostError, BatchClosedError: a rank of the sender or of this replica has died, or left.
            BatchTornError: the sender gave up midway: the tensors hold bytes of two versions until the next update.
            NotShareableError: (a ValueError) a tensor has other memory than when it was given to `pull`.
            AgentDiedError: (a ConnectionError) the agent died.
        """
        check_timeout(timeout)
        self._member.check_unmoved()
        deadline = deadline_in(timeout)
        session = self._receiving = self.connect(deadline, timeout)
        try:
            report = self._link.transfer(session, remaining(deadline))
        except (PeerLostError, BatchClosedError):  # nothing had been written, or another error would say so
            self._raised = self._link.id
            raise
        except BaseException:
            if self._unsure is not session:
                self._version, self._torn = self._after(self._unsure)
                self._unsure = session
            raise
        else:
            self._report, self._version, self._torn, self._unsure = report, report.version, False, None
        finally:
            self._receiving = None
        return report.version

    def let_see(self) -> None:
        """Stay a moment, so that the sender learns of this replica, which does not fit it, and can say so too."""
        time.sleep(2 * LONGEST_PAUSE)

    def close(self) -> None:
        """Leave: the publisher goes on without this replica. May be called more than once, also while the store is away."""
        with self._changed:
            if self._closed:
                return
            self._closed = True
        self._member.withdraw()
        self._link.close()
        self._watcher.close()
        self._link.join(LEAVE)
        self._member.close()

    def __enter__(self) -> Receiver:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def __repr__(self) -> str:
        state = "closed" if self._closed else self._link.state.value
        return f"Receiver({self.name!r}, replica={self.replica!r}, version={self.version}, {state})"

    def _holds(self) -> tuple[int, bool]:
        """The version, and whether the tensors are torn."""
        version, torn = self._after(self._unsure)
        receiving = self._receiving
        torn = torn or (receiving is not None and bool(receiving.held.torn))
        return 0 if torn else version, torn

    def _after(self, session: Session | None) -> tuple[int, bool]:
        """The same after what may have come in a session without that an update has said so."""
        held = Holding() if session is None else session.held
        return held.version or self._version, self._torn or bool(held.torn)

    # ------------------------------------------------------------------------------------------------- connecting

    def connect(self, deadline: float | None, timeout: float | None) -> Session:
        """The session with all ranks of both sides, once there is one; waits until ``deadline``, which was ``timeout`` seconds away."""
        patience, began = Patience(f"weights {self.name!r}, replica {self.replica!r}"), time.monotonic()
        stale = self._raised
        if stale and self._link.state is LinkState.FAILED and self._link.id == stale:
            self._begin_anew(stale, deadline)
        with self._changed:
            while True:
                if self._closed:
                    raise BatchClosedError(f"weights {self.name!r}: the receiver was closed")
                session = self._link.ready
                if session is not None:
                    return session
                if self._link.state is LinkState.FAILED and self._link.id != stale and self._link.error is not None:
                    self._raised = self._link.id
                    raise self._link.error
                unseen = self._watcher.error_since(began)
                if unseen is not None:
                    raise unseen
                self._watcher.hurry()
                if not patience.wait(self._changed, deadline, self._state):
                    raise BatchUnmatchedError(
                        f"weights {self.name!r}: replica {self.replica!r} was not connected within {timeout:g} s; waiting for"
                        f" {self._state()}"
                    )

    def _begin_anew(self, stale: str, deadline: float | None) -> None:
        """Have the others connect anew with this rank, if they are the same as before; somebody new, they do so anyway."""
        parties = seen(self._member.board.read(store_time(deadline))).parties(self.replica)
        if parties is not None and parties.id == stale:
            self._member.announce(deadline)

    def _state(self) -> str:
        """Who is missing, in words."""
        missing = self._seen.missing
        parts = [f"the sender: {missing[SENDER]}"] if SENDER in missing else []
        if self.replica in missing:
            parts.append(f"this replica: {missing[self.replica]}")
        elif self.replica not in self._seen.receivers:
            parts.append("this replica: nobody is there")
        if self._watcher.problem:
            parts.append(f"the store: {self._watcher.problem}")
        if self._link.trouble:
            parts.append(f"a try that goes better than the last ({self._link.trouble})")
        return "; ".join(parts) or "all ranks to register: all are there"

    def _on_seen(self, found: Seen) -> None:
        with self._changed:
            self._seen = found
            if found.senders is not None and found.receivers.get(self.replica) is not None and not self._closed:
                self._link.offer(found.parties(self.replica))
            self._changed.notify_all()

    def _connect(self, parties: Parties) -> Session:
        member = self._member
        agreement = agree(member.name, self._tables.of(parties.senders), self._tables.of(parties.receivers))
        batch_id = f"{member.name}/{self.replica}"
        return Session(member.address, part_of(agreement, "recv", member.seat.rank, member.tensors, batch_id, parties.id))
