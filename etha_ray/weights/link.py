"""What a rank has with one replica, kept up on a thread of its own.

States::

    IDLE ──► CONNECTING ──► READY       a session in which all ranks of both sides are registered
      ▲           └───────► FAILED      `error` says why; so does a session that was lost in a transfer

`offer` says who is there: others than before end what was, and a new session is made with them. FAILED stays so until then, but for an
agent's death: it is CONNECTING with the next one `_AGAIN` later, and what was said of the last is not said of that. What passes
(`_PASSING`) is tried again without becoming FAILED; `trouble` says what it was.
"""

from __future__ import annotations

import enum
import logging
import threading
import time
from collections.abc import Callable

from etha_ray.errors import (
    AgentDiedError,
    AgentNotFoundError,
    BatchClosedError,
    PeerLostError,
    StoreUnavailableError,
    TransferTimeoutError,
    UnknownBatchError,
    UnknownPairError,
)
from etha_ray.report import TransferReport
from etha_ray.weights.parties import Parties
from etha_ray.weights.session import Session

logger = logging.getLogger(__name__)

_SLICE = 0.1
"""Seconds that a registration is waited for before it is looked whether somebody else is there by now."""

_CAUSE = 400
"""Characters of why a session is left, which may be why another was."""

_AGAIN = 1.0
"""Seconds after which what could not be done for a reason that passes is tried again."""

_PASSING = (StoreUnavailableError, TimeoutError, UnknownPairError, UnknownBatchError)
"""A store that is away, a busy agent, or one that does not know what the one before it died of hearing. What another version wrote, or a
store that is full, is as it is at the next look too."""

_NEXT_AGENT = (AgentDiedError, AgentNotFoundError)
"""What the agent that comes next makes good; the second, where the last one had died before it was asked."""


class LinkState(enum.Enum):
    """See the top of this file."""

    IDLE = "idle"
    CONNECTING = "connecting"
    READY = "ready"
    FAILED = "failed"


class Link:
    """Keeps a session with whoever is offered.

    Args:
        name: whom it connects with, for messages.
        late: what it means that a transfer was not over in time, in words.
        connect: makes a session with all ranks of both sides; does not wait for them.
        changed: notified, while it is held, when the state changes; several links may share it.
        after: one that was retired, and has the same places in pairs: this one begins when that has left them.
    """

    def __init__(
        self, name: str, late: str, connect: Callable[[Parties], Session], changed: threading.Condition, after: Link | None = None
    ) -> None:
        self.name = name
        self._late = late
        self.state = LinkState.IDLE
        self.error: BaseException | None = None
        self.trouble = ""
        self.session: Session | None = None
        self._connect = connect
        self._changed = changed
        self._after = after
        self._wanted: Parties | None = None
        self._held: Parties | None = None
        self._failed_at = 0.0
        self._busy = 0
        self._retired = self._closed = False
        self._absent = ""
        self._thread = threading.Thread(target=self._run, name=f"etha-ray link {name}", daemon=True)
        self._thread.start()

    @property
    def id(self) -> str:
        """Of those whom its state is about; empty if nobody is there."""
        return "" if self._held is None else self._held.id

    @property
    def ready(self) -> Session | None:
        """The session, if it is READY and with those who are there now."""
        return self.session if self._wanted == self._held else None

    def error_since(self, moment: float) -> BaseException | None:
        """Why it is FAILED. An agent's death counts only after ``moment``, by the monotonic clock: with the next one it is tried again."""
        stale = isinstance(self.error, _NEXT_AGENT) and self._failed_at < moment
        return None if stale or self.state is not LinkState.FAILED else self.error

    @property
    def busy(self) -> bool:
        """Whether a transfer is under way."""
        return self._busy > 0

    @property
    def alive(self) -> bool:
        """Whether its thread still runs."""
        return self._thread.is_alive()

    def offer(self, parties: Parties | None, absent: str = "") -> None:
        """Say who is there; None if they are not all there, and who is ``absent`` then."""
        with self._changed:
            self._absent = absent
            if parties != self._wanted:
                self._wanted = parties
                self._changed.notify_all()

    def transfer(self, session: Session, timeout: float | None, version: int | None = None) -> TransferReport:
        """`Session.transfer`; a session that is lost by that makes this FAILED. What is offered meanwhile waits until it is over:
        the agents say best why it fails, if it does."""
        with self._changed:
            self._busy += 1
        try:
            return session.transfer(timeout, version)
        except (PeerLostError, BatchClosedError) as error:
            with self._changed:
                if self.session is session:
                    self.session, self.error, self.state = None, error, LinkState.FAILED
            # The others may hear of this before they hear who died.
            session.close(str(error)[:_CAUSE] if isinstance(error, PeerLostError) else "")
            raise
        except TransferTimeoutError as error:
            raise TransferTimeoutError(f"{self.name}: {self._late} ({error})") from error
        finally:
            with self._changed:
                self._busy -= 1
                self._changed.notify_all()

    def hurry(self) -> None:
        """`Session.hurry`, where a transfer is under way."""
        with self._changed:
            session = self.session if self._busy else None
        if session is not None:
            session.hurry()

    def retire(self) -> None:
        """Leave once no transfer is under way. The thread ends soon after; `join` waits for it."""
        with self._changed:
            self._retired = True
            self._wanted = None
            self._changed.notify_all()

    def close(self) -> None:
        """Leave now: a transfer that is under way fails. The thread ends soon after; `join` waits for it."""
        with self._changed:
            self._closed = True
            self._wanted = None
            self._changed.notify_all()

    def join(self, seconds: float | None = None) -> None:
        """Wait until everything is left, after `close` or `retire`; what takes longer than that, for a store that does not answer, is left
        all the same when that is over."""
        self._thread.join(seconds)

    def _run(self) -> None:
        after, self._after = self._after, None
        if after is not None:
            after.join()
        while True:
            self._wait_for_work()
            with self._changed:
                if not self._has_to_do():
                    continue
                wanted, self._held = self._wanted, self._wanted
                old, self.session, self.error, self.trouble = self.session, None, None, ""
                self.state = LinkState.IDLE if wanted is None else LinkState.CONNECTING
                self._changed.notify_all()
                over, because = self._closed or self._retired, "" if self._closed else self._absent
            if old is not None:
                old.close(because)
            if over:
                return
            while wanted is not None and not self._meet(wanted):
                with self._changed:
                    if self._changed.wait_for(self._has_to_do, _AGAIN):
                        break
                    self.state, self.error = LinkState.CONNECTING, None
                    self._changed.notify_all()

    def _wait_for_work(self) -> None:
        """Until there may be something to do. A transfer with those who were there before may meanwhile wait for somebody who has begun
        anew, and will not be back: where an agent died, nobody could tell it, or the next one, who left."""
        with self._changed:
            self._changed.wait_for(lambda: self._has_to_do() or self._outdated)
            if self._changed.wait_for(self._has_to_do, _AGAIN):
                return
            session = self.session if self._outdated else None
        if session is not None:
            session.hurry(only_if_lost=True)

    @property
    def _outdated(self) -> bool:
        """Whether a transfer is under way with others than those who are there now."""
        return self._busy > 0 and self._wanted is not None and self._wanted != self._held

    def _has_to_do(self) -> bool:
        return self._closed or (not self._busy and (self._retired or self._wanted != self._held))

    def _meet(self, wanted: Parties) -> bool:
        """Whether this has come to an end with them: what passes is none, nor is an agent's death."""
        session = None
        began = time.monotonic()
        try:
            session = self._connect(wanted)
            while not session.ready(_SLICE):
                if self._wanted != wanted:
                    break
        except Exception as error:  # becomes what a push or an update raises, unless it passes
            passes = isinstance(error, _PASSING)
            logger.info("weights: %s cannot be connected: %s", self.name, error)
            if passes:
                self.trouble = str(error)
            else:
                self._settle(wanted, None, error)
            if session is not None:
                session.close()
            return not (passes or isinstance(error, _NEXT_AGENT))
        if not self._settle(wanted, session, None):
            session.close()
        else:
            logger.info("weights: connected with %s in %.2f s", self.name, time.monotonic() - began)
        return True

    def _settle(self, wanted: Parties, session: Session | None, error: BaseException | None) -> bool:
        with self._changed:
            if self._wanted != wanted:
                return False
            self.session, self.error, self.trouble = session, error, ""
            self.state = LinkState.FAILED if session is None else LinkState.READY
            self._failed_at = time.monotonic()
            self._changed.notify_all()
            return True
