"""A lease: keys that vanish when their owner stops renewing.

A `Lease` renews itself on a thread of its own, three times in its time to live, until it is closed, its store is closed, or its
process ends. What a backend does for it is a `Grant`.
"""

from __future__ import annotations

import threading
import time
from typing import Protocol

from etha_ray.errors import LeaseExpiredError, StoreError


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
        """Removes the keys now. No error if the lease is over."""
