"""Who is there: the ranks of the sender and of each receiver, as they have announced themselves."""

from __future__ import annotations

import logging
import re
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice

from etha_ray.errors import AgentDiedError, BatchClosedError, EthaRayError, StoreError
from etha_ray.tensor_bus.board import Board
from etha_ray.tensor_bus.records import fingerprint
from etha_ray.weights.tables import Notice, Table, decode_notice, decode_table

logger = logging.getLogger(__name__)

SENDER = "sender"
_RANK = re.compile(r"[0-9]{8}")
_LISTED = 16
"""Ranks that a message has room for."""
_FIRST_PAUSE = 0.005
LONGEST_PAUSE = 1.0
"""Seconds after which everybody has looked again who is there."""
_LAST_LOOK = 2.0
"""Seconds that the end of a look is waited for."""


@dataclass(frozen=True)
class Parties:
    """All ranks of the sender and of one receiver, in order. ``id`` differs as soon as one of them has begun anew."""

    senders: tuple[Notice, ...]
    receivers: tuple[Notice, ...]

    @property
    def id(self) -> str:
        """The same on all ranks that see the same."""
        return fingerprint(*(tuple(notice.token for notice in side) for side in (self.senders, self.receivers)))[:16]


@dataclass(frozen=True)
class Seen:
    """What is announced.

    Attributes:
        senders: by rank; None until all are there.
        receivers: of each replica, by rank; None where some are missing.
        missing: who is not there, in words, by "sender" or replica.
    """

    senders: tuple[Notice, ...] | None
    receivers: Mapping[str, tuple[Notice, ...] | None]
    missing: Mapping[str, str]

    def parties(self, replica: str) -> Parties | None:
        """The sender and a replica, once both are complete."""
        receivers = self.receivers.get(replica)
        return None if self.senders is None or receivers is None else Parties(self.senders, receivers)


def sender_slot(rank: int) -> str:
    """Where a rank of the sender announces itself."""
    return f"{SENDER}/{rank:08d}"


def receiver_slot(replica: str, rank: int) -> str:
    """Where a rank of a receiver announces itself."""
    return f"receiver/{replica}/{rank:08d}"


def seen(notices: Mapping[str, bytes]) -> Seen:
    """What notices, by slot, say. Raises `StoreError` for what is none."""
    sides: dict[str, dict[int, Notice]] = {SENDER: {}}
    for slot, data in notices.items():
        side, _, rank = slot.rpartition("/")
        if not _RANK.fullmatch(rank):
            raise StoreError(f"a notice of weights is in slot {slot!r}, which is no rank's: another program writes to this namespace")
        sides.setdefault(side, {})[int(rank)] = decode_notice(data)
    complete = {side: _complete(by_rank) for side, by_rank in sides.items()}
    receivers = {side.partition("/")[2]: found for side, found in complete.items() if side != SENDER}
    missing = {side.partition("/")[2] or side: _missing(sides[side]) for side, found in complete.items() if found is None}
    return Seen(complete[SENDER], receivers, missing)


def _complete(by_rank: Mapping[int, Notice]) -> tuple[Notice, ...] | None:
    sizes = {notice.world_size for notice in by_rank.values()}
    if sizes != {len(by_rank)} or sorted(by_rank) != list(range(len(by_rank))):
        return None
    return tuple(by_rank[rank] for rank in sorted(by_rank))


def _missing(by_rank: Mapping[int, Notice]) -> str:
    sizes = sorted({notice.world_size for notice in by_rank.values()})
    if not sizes:
        return "nobody is there"
    if len(sizes) > 1:
        return f"its ranks say that there are {' or '.join(map(str, sizes))} of them"
    absent = islice((rank for rank in range(sizes[0]) if rank not in by_rank), _LISTED + 1)
    shown = [str(rank) if number < _LISTED else "..." for number, rank in enumerate(absent)]
    return f"ranks [{', '.join(shown)}] of {sizes[0]} are not there"


class Tables:
    """Tables by their digests, each read once."""

    def __init__(self, board: Board) -> None:
        self._board = board
        self._known: dict[str, Table] = {}

    def of(self, notices: Sequence[Notice]) -> list[Table]:
        """The tables of these ranks."""
        for digest in {notice.table for notice in notices} - self._known.keys():
            self._known[digest] = decode_table(self._board.body(digest))
        return [self._known[notice.table] for notice in notices]


class Watcher:
    """Looks who is there, on a thread of its own: often while somebody waits, else once a second.

    Args:
        board: where all announce themselves.
        on_seen: called on that thread with what is there, after each look.
    """

    def __init__(self, board: Board, on_seen: Callable[[Seen], None]) -> None:
        self._board = board
        self._on_seen = on_seen
        self._closed = False
        self._wake = threading.Event()
        self._error: EthaRayError | None = None
        self._looked = 0.0
        self.problem = ""
        """What kept it from looking the last time, in words."""
        self._thread = threading.Thread(target=self._run, name="etha-ray watch weights", daemon=True)
        self._thread.start()

    def error_since(self, moment: float) -> EthaRayError | None:
        """Why nobody can be seen: its client is closed, and this has ended; or its agent was gone, without a successor yet, at a look
        that began after ``moment``, by the monotonic clock. What an earlier one saw may be over."""
        return self._error if self._looked > moment or isinstance(self._error, BatchClosedError) else None

    def hurry(self) -> None:
        """Somebody waits: look often again."""
        self._wake.set()

    def close(self) -> None:
        """End it. It is over when this returns, unless a store that does not answer holds up its last look: that tells nobody any more."""
        self._closed = True
        self._wake.set()
        if self._thread is not threading.current_thread():
            self._thread.join(_LAST_LOOK)

    def _run(self) -> None:
        pause = _FIRST_PAUSE
        while not self._closed:
            began = time.monotonic()
            try:
                found = seen(self._board.read())
                if self._closed:
                    return
                self._on_seen(found)
                self._error, self.problem = None, ""
            except AgentDiedError as error:  # it may only have stood still, or has a successor soon
                self._error, self._looked = error, began
            except BatchClosedError as error:
                self._error = error
                return
            except (EthaRayError, TimeoutError) as error:  # a store that is away: what is connected needs none
                self.problem = str(error)
            except Exception as error:  # whatever it is, others go on, and who waits hears of it
                logger.exception("who publishes and pulls cannot be seen")
                self.problem = f"{type(error).__name__}: {error}"
            if self._wake.wait(pause):
                self._wake.clear()
                pause = _FIRST_PAUSE
            pause = min(pause * 1.5, LONGEST_PAUSE)
