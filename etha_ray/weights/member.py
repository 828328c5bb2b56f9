"""One rank of one side: its tensors, its agent, and how it announces itself."""

from __future__ import annotations

import contextlib
import logging
import secrets
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from etha_ray.config import check_name
from etha_ray.cuda.marks import settle
from etha_ray.errors import EthaRayError, NotShareableError
from etha_ray.layout import MeshSpec
from etha_ray.memory import ExportedTensors, export_tensors
from etha_ray.report import format_bytes
from etha_ray.tensor_bus.board import Board
from etha_ray.tensor_bus.bootstrap import bootstrap_client
from etha_ray.tensor_bus.client import TensorBusClient
from etha_ray.tensor_bus.records import fingerprint
from etha_ray.weights.layouts import Layouts, PlacementsOf, find_seat
from etha_ray.weights.names import Rename, Source, among, named_tensors, patterns
from etha_ray.weights.session import AgentAddress
from etha_ray.weights.tables import Notice, encode_notice, encode_table, make_table

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

logger = logging.getLogger(__name__)

_FIRST_WORD = 10.0
_NEXT_WORD = 60.0

_STORE = 30.0
"""Seconds for what the agent is asked of the store, where the caller gives no less."""

LEAVE = 10.0
"""Seconds for which who leaves waits for an agent, or for threads of its own, in each step: what is late then is done without it."""


@dataclass(frozen=True)
class Given:
    """What `publish` and `pull` were called with, of what both take."""

    source: Source
    name: str
    rename: Rename = None
    only: str | Iterable[str] | None = None
    strict: bool = True
    buffers: bool = False
    placements: PlacementsOf = None
    mesh: DeviceMesh | MeshSpec | None = None
    world_size: int | None = None
    rank: int | None = None
    client: TensorBusClient | None = None


class Member:
    """Shares the tensors with the agent, and announces this rank.

    Args:
        given: what the user said.
        slot: where a rank of this side announces itself.
        deadline: until when it may be announced, by the monotonic clock.

    Raises:
        ConfigError, LayoutError: see `names`, `layouts`.
        ValueError, ConnectionError: there is no agent; see `bootstrap_client`.
        MemoryHandleError: a tensor's memory cannot be shared; see `memory.export_tensors`.
        CoordinateTakenError: another process is this rank of this side already.
    """

    def __init__(self, given: Given, slot: Callable[[int], str], deadline: float | None = None) -> None:
        check_name("the weights' name", given.name)
        only = patterns(given.only)
        every = named_tensors(given.source, given.rename, given.buffers)
        crossing = among(every, only)
        self.seat = find_seat((one.tensor for one in every), given.mesh, given.world_size, given.rank)
        table = make_table(every, Layouts(self.seat, given.mesh, given.placements), only, given.strict)
        self.name = given.name
        self.tensors = {one.key: one.tensor for one in crossing}
        self._own_names = {one.key: one.own for one in crossing}
        self._slot = slot(self.seat.rank)
        self._owned, self._announced = given.client is None, False
        self._exported: ExportedTensors | None = None
        self.client = bootstrap_client(connection_timeout=store_time(deadline))[0] if given.client is None else given.client
        # Here, on the caller's thread, and once: nobody else writes to the tensors while they are moved to shared memory.
        try:
            self._exported = export_tensors(list(self.tensors.values()), [repr(one.own) for one in crossing], self.client.for_agent)
            logger.info("weights %r: %s in %d tensors", self.name, format_bytes(self._exported.nbytes), len(self.tensors))
            self._places = {key: self._place(key) for key in self.tensors}
            self.address = AgentAddress.of(self.client)
            self.board = Board(self.client, f"weights/{self.name}")
            self._table = encode_table(table)
            self.announce(deadline)
        except BaseException:
            self.close()
            raise

    def announce(self, deadline: float | None = None) -> None:
        """Say that this rank is there, or that it begins anew."""
        notice = Notice(secrets.token_hex(8), self.seat.size, fingerprint(self._table))
        self._announced = True  # by its agent, which goes on when this gives up
        self.board.announce(self._slot, encode_notice(notice), self._table, store_time(deadline))

    def settle(self) -> None:
        """Wait until what this thread's current stream was given has written the tensors that are on a GPU: other threads send them."""
        if self._exported is not None and self._exported.gpu is not None:
            settle(self._exported.gpu)

    def check_unmoved(self) -> None:
        """Raise `NotShareableError` if a tensor has other memory than when it was published: its new values would not cross."""
        moved = [self._own_names[key] for key, place in self._places.items() if self._place(key) != place]
        if moved:
            raise NotShareableError(
                f"weights {self.name!r}: {moved[:5]} ({len(moved)} in all) have other memory than when they were given (.data was"
                " set, or the module was moved): write values in place, with copy_, or publish again"
            )

    def withdraw(self) -> None:
        """Be there no more. First of all when leaving: nobody then connects anew with who is about to be gone."""
        if self._announced:
            self._announced = False
            # What an agent that is gone knew is gone with it, and one whose store is away takes this back later.
            with contextlib.suppress(EthaRayError, TimeoutError):
                self.board.withdraw(self._slot, LEAVE)

    def close(self) -> None:
        """Leave."""
        self.withdraw()
        if self._owned:
            self.client.close()
        if self._exported is not None:
            self._exported.close()

    def _place(self, key: tuple[str, ...]) -> int:
        tensor = self.tensors[key]
        return int(getattr(tensor, "_local_tensor", tensor).untyped_storage().data_ptr())


class Patience:
    """Says in the log what is waited for, when that takes long: after 10 seconds, then every minute."""

    def __init__(self, what: str) -> None:
        self._what = what
        self._began = time.monotonic()
        self._next = self._began + _FIRST_WORD

    def wait(self, changed: threading.Condition, deadline: float | None, for_what: Callable[[], str]) -> bool:
        """Wait a moment for ``changed``, which is held; False once ``deadline``, by the monotonic clock, has passed."""
        now = time.monotonic()
        if deadline is not None and now >= deadline:
            return False
        if now >= self._next:
            self._next = now + _NEXT_WORD
            logger.warning("%s: for %.0f s by now it waits for %s", self._what, now - self._began, for_what())
        changed.wait(0.2 if deadline is None else min(0.2, deadline - now))
        return True


def deadline_in(timeout: float | None) -> float | None:
    """``timeout`` seconds from now, by the monotonic clock."""
    return None if timeout is None else time.monotonic() + timeout


def remaining(deadline: float | None) -> float | None:
    """Seconds until ``deadline``, 0 once it has passed."""
    return None if deadline is None else max(0.0, deadline - time.monotonic())


def store_time(deadline: float | None) -> float:
    """Seconds that an agent has for what it is asked of the store, by a call that is to be over then."""
    left = remaining(deadline)
    return _STORE if left is None else min(_STORE, left)
