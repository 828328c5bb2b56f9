"""What a rank has with one replica, kept up on a thread of its own.

States::

    IDLE ──► CONNECTING ──► READY       a session in which all ranks of both sides are registered
      ▲           └───────► FAILED      `error` says why; so does a session that was lost in a transfer

`offer` says who is there: others than before end what was, and a new session is made with them. FAILED stays so until then.
"""

from __future__ import annotations

import enum
import logging
import threading
import time
from collections.abc import Callable

from etha_ray.weights.parties import Parties
from etha_ray.weights.session import Session

logger = logging.getLogger(__name__)

_SLICE = 0.1
"""Seconds that a registration is waited for before it is looked whether somebody else is there by now."""


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
        connect: makes a session with all ranks of both sides; does not wait for them.
        changed: notified, while it is held, when the state changes; several links may share it.
    """

    def __init__(self, name: str, connect: Callable[[Parties], Session], changed: threading.Condition) -> None:
        self.name = name
        self.state = LinkState.IDLE
        self.error: BaseException | None = None
        self.session: Session | None = None
        self._connect = connect
        self._changed = changed
        self._wanted: Parties | None = None
        self._held: Parties | None = None
        self._closed = False
        self._thread = threading.Thread(target=self._run, name=f"etha-ray link {name}", daemon=True)
        self._thread.start()

    @property
    def id(self) -> str:
        """Of those it is connected with, or tries to be; empty if nobody is there."""
        return "" if self._wanted is None else self._wanted.id

    @property
    def alive(self) -> bool:
        """Whether its thread still runs, after `close`."""
        return self._thread.is_alive()

    def offer(self, parties: Parties | None) -> None:
        """Say who is there; None if they are not all there."""
        with self._changed:
            if parties != self._wanted:
                self._wanted = parties
                self._changed.notify_all()

    def fail(self, session: Session, error: BaseException) -> None:
        """A transfer found that ``session`` is lost."""
        with self._changed:
            if self.session is session:
                self.session, self.error, self.state = None, error, LinkState.FAILED
                self._changed.notify_all()
        session.close()

    def close(self) -> None:
        """Leave. The thread ends soon after; `join` waits for it."""
        with self._changed:
            self._closed = True
            self._wanted = None
            self._changed.notify_all()

    def join(self) -> None:
        """Wait until everything is left, after `close`."""
        self._thread.join()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closed or self._wanted != self._held)
                wanted, self._held = self._wanted, self._wanted
                old, self.session, self.error = self.session, None, None
                self.state = LinkState.IDLE if wanted is None else LinkState.CONNECTING
                self._changed.notify_all()
                closed = self._closed
            if old is not None:
                old.close()
            if closed:
                return
            if wanted is not None:
                self._meet(wanted)

    def _meet(self, wanted: Parties) -> None:
        session = None
        began = time.monotonic()
        try:
            session = self._connect(wanted)
            while not session.ready(_SLICE):
                if self._wanted != wanted:
                    break
        except Exception as error:  # becomes what a push or an update raises
            logger.info("weights: %s cannot be connected: %s", self.name, error)
            self._settle(wanted, None, error)
            if session is not None:
                session.close()
            return
        if not self._settle(wanted, session, None):
            session.close()
        else:
            logger.info("weights: connected with %s in %.2f s", self.name, time.monotonic() - began)

    def _settle(self, wanted: Parties, session: Session | None, error: BaseException | None) -> bool:
        with self._changed:
            if self._wanted != wanted:
                return False
            self.session, self.error = session, error
            self.state = LinkState.FAILED if session is None else LinkState.READY
            self._changed.notify_all()
            return True
