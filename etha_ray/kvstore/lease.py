"""A lease: keys that vanish when their owner stops renewing.

A `Lease` renews itself on a thread of its own, three times in its time to live, until it is closed, its store is closed, or its
process ends. What a backend does for it is a `Grant`.

A lease ends once and never comes back. Its owner counts from before each request, by its own monotonic clock, so it takes the lease for
over no later than the store does.
"""

from __future__ import annotations

import atexit
import logging
import threading
import time
import weakref
from types import TracebackType
from typing import TYPE_CHECKING, Protocol

from etha_ray.errors import LeaseExpiredError, StoreClosedError, StoreError, StoreUnavailableError
from etha_ray.kvstore.keys import text_as_bytes
from etha_ray.kvstore.patience import ATTEMPT

if TYPE_CHECKING:
    from etha_ray.kvstore.base import KVStore

logger = logging.getLogger(__name__)

_RENEWALS = 3
"""In one time to live: one may be lost, and one late."""
_RETRIES = 20
"""The same while the store cannot be reached."""
_LEAVE_TIMEOUT = 1.0


class Grant(Protocol):
    """A backend's side of one lease. Keys are whole keys; every method may raise what the store's own methods raise."""

    @property
    def ttl(self) -> float:
        """Seconds that the keys stay after the last renewal; at least what was asked for."""

    def put(self, full: str, data: bytes) -> None:
        """Stores ``data`` under the lease. Raises `LeaseExpiredError` if it is over, and then stores nothing."""

    def renew(self) -> None:
        """Starts the time to live again. Raises `LeaseExpiredError` if it is over."""

    def revoke(self) -> None:
        """Removes the keys now. No error if the lease is over. Also called while the store is being closed, before its ``_close``."""


class Lease:
    """Keys of a `KVStore` that are there as long as somebody renews the lease; made by `KVStore.lease`.

    A key set under the lease and then written by anything else, or under another lease, is the lease's no more.
    Safe for any number of threads. A context manager that closes itself.
    """

    def __init__(self, store: KVStore, ttl: float, renew: bool) -> None:
        self._store = store
        self._lock = threading.Lock()
        self._renewing = threading.Lock()  # so that nothing of a lease is written after `close`
        self._end = ""  # why it is over; empty while it is not
        self._closed = self._revoked = False
        self._stop = threading.Event()
        asked = time.monotonic()
        self._grant = store._grant(ttl)
        self._good_until = asked + self._grant.ttl
        self._unanswered: float | None = None  # since when it is asked in vain
        self._keeper: threading.Thread | None = None
        if renew:
            self._keeper = threading.Thread(target=self._keep, name="etha-ray-lease", daemon=True)
            _KEPT.add(self)
            self._keeper.start()

    @property
    def ttl(self) -> float:
        """Seconds that the keys stay after the last renewal, as the backend granted them: at least what was asked for."""
        return self._grant.ttl

    @property
    def alive(self) -> bool:
        """Whether the lease is neither closed nor lost, as far as this process knows; once False, always False."""
        with self._lock:
            if not self._end and time.monotonic() >= self._good_until:
                self._end = f"it was not renewed within {self.ttl:g} s"
            return not self._end

    @property
    def silence(self) -> float:
        """Seconds for which the store has been asked for renewals in vain; 0 if it answered the last one, or has not been asked since."""
        since = self._unanswered
        return 0.0 if since is None else time.monotonic() - since

    def set(self, key: str, value: str, *, component: str | None = None) -> None:
        """Stores ``value`` as UTF-8 under the lease, replacing what was there. Raises what `set_bytes` raises."""
        self.set_bytes(key, text_as_bytes(key, value), component=component)

    def set_bytes(self, key: str, data: bytes, *, component: str | None = None) -> None:
        """Stores ``data`` under the lease, replacing what was there.

        Raises `LeaseExpiredError` if the lease is over, and what `KVStore.set_bytes` raises.
        """
        full = self._store._full(key, component)
        value = self._store._checked(key, data)
        self._check_alive()
        try:
            self._grant.put(full, value)
        except LeaseExpiredError:
            self._lose("the store says so")
            raise

    def renew(self) -> None:
        """Starts the time to live again. Raises `LeaseExpiredError` if it is over already."""
        self._store._check_open()
        try:
            with self._renewing:
                asked = self._ask()
        finally:
            if self._closed:
                self._revoke()
        self._check_alive()  # an answer that came too late does not bring back what this process has taken for lost
        with self._lock:
            self._good_until = max(self._good_until, asked + self.ttl)

    def close(self) -> None:
        """Removes the lease's keys now. Closing twice is fine; a backend that cannot be reached is no error, time ends the lease.

        Where a renewal has been unanswered for some seconds it is not waited for any longer: the keys go when that is over.
        """
        with self._lock:
            if self._closed:
                return
            self._closed = True
        self._lose("it was closed")
        self._revoke()

    def __enter__(self) -> Lease:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<Lease of {self.ttl:g} s {'alive' if self.alive else 'over'} in {self._store!r}>"

    def _check_alive(self) -> None:
        if not self.alive:
            raise LeaseExpiredError(f"{self!r} has ended ({self._end}) and its keys are gone; take a new one with KVStore.lease")

    def _ask(self) -> float:
        """Renews; when that was asked for. Holds `_renewing`."""
        self._check_alive()
        asked = time.monotonic()
        self._unanswered = self._unanswered or asked
        try:
            self._grant.renew()
        except LeaseExpiredError:
            self._unanswered = None
            self._lose("the store says so")
            raise
        except StoreUnavailableError:
            raise
        except StoreError:
            self._unanswered = None  # an answer, if not the one that was wanted
            raise
        self._unanswered = None
        return asked

    def _revoke(self) -> None:
        """Once the lease is closed; who renews it meanwhile does it afterwards, if it takes longer than who closes it waits."""
        if not self._renewing.acquire(timeout=ATTEMPT):
            logger.debug("%r is being renewed in a store that does not answer", self)
            return
        try:
            if not self._revoked:
                self._revoked = True
                self._grant.revoke()
        except StoreError as error:
            logger.debug("%r runs out by itself: %s", self, error)
        finally:
            self._renewing.release()

    def _lose(self, why: str) -> None:
        with self._lock:
            self._end = self._end or why
        self._stop.set()
        self._store._leases.discard(self)

    def _keep(self) -> None:
        """Renews until the lease is over; a store that is away for a while is asked again and again."""
        pause = self.ttl / _RENEWALS
        while not self._stop.wait(pause):
            try:
                self.renew()
                pause = self.ttl / _RENEWALS
            except (LeaseExpiredError, StoreClosedError) as error:
                logger.debug("%r is not renewed any more: %s", self, error)
                return
            except StoreError as error:
                logger.debug("%r could not be renewed: %s", self, error)
                pause = self.ttl / _RETRIES


_KEPT: weakref.WeakSet[Lease] = weakref.WeakSet()


@atexit.register
def _stop_keeping() -> None:
    """A thread that is inside a client library's C++ code while the interpreter goes away may abort the process."""
    for lease in list(_KEPT):
        lease._stop.set()
    for lease in list(_KEPT):
        if lease._keeper is not None:
            lease._keeper.join(_LEAVE_TIMEOUT)
