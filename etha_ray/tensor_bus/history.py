"""What an agent's transfers came to: the last ones in full, all of them in numbers.

The loop notes a transfer when it ends, in memory. Twice a second the agent writes what is new into its state file, for `etha-ray
status` and `trace`, and hands it to whoever observes it (`etha_ray.metrics`): neither is on the path of a transfer.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from typing import Literal, TypeAlias

import msgspec

from etha_ray.report import TransferReport

KEPT = 64
"""Transfers that are kept in full."""

_FLOWS = 256
"""Peers of one transfer that are kept in full."""

_UNSEEN = 20_000
"""Transfers that wait for the observer at most; what comes on top of them is not observed."""


class Flow(msgspec.Struct, frozen=True, array_like=True):
    """What went between this worker and one other; both ends have a `Flow` of the same ``key``."""

    key: str
    peer: str
    bytes: int


class PastTransfer(msgspec.Struct, frozen=True, omit_defaults=True):
    """A transfer that is over.

    ``began`` is in seconds since the epoch, ``seconds`` from then to its end. One that failed has no ``report`` but the error's
    class, ``kind``, and ``message``. ``client_id`` begins with the worker's pid.
    """

    batch_id: str
    direction: Literal["send", "recv"]
    client_id: str
    began: float
    seconds: float
    report: TransferReport | None = None
    kind: str = ""
    message: str = ""
    flows: tuple[Flow, ...] = ()

    @property
    def pid(self) -> int:
        """The worker's process."""
        return int(self.client_id.partition("-")[0])


class Totals(msgspec.Struct, omit_defaults=True):
    """All transfers of an agent since it started, in numbers; ``errors`` counts all failed commands by their error's class."""

    sent: int = 0
    received: int = 0
    failed: int = 0
    bytes_sent: int = 0
    bytes_received: int = 0
    errors: dict[str, int] = {}


Observer: TypeAlias = Callable[[Sequence[PastTransfer], Mapping[str, int], Mapping[str, int]], None]
"""Called twice a second with the transfers that ended since, the failed commands since by error class, and how many workers,
pairs and batches there are."""


def flow_key(source: str, target: str, sequence: int) -> str:
    """What both ends call the bytes of the ``sequence``-th send from one registration to another."""
    return f"{source[:16]}-{target[:16]}-{sequence}"


class History:
    """Notes what ends. On the loop only, but for `last` and `take`."""

    def __init__(self, *, observed: bool) -> None:
        self.totals = Totals()
        self._past: deque[PastTransfer] = deque(maxlen=KEPT)
        self._number = 0
        self._saved = 0
        self._unseen: deque[PastTransfer] | None = deque(maxlen=_UNSEEN) if observed else None
        self._errors: deque[str] = deque(maxlen=_UNSEEN)

    def note(self, past: PastTransfer) -> None:
        """A transfer ended."""
        if len(past.flows) > _FLOWS:
            past = msgspec.structs.replace(past, flows=past.flows[:_FLOWS])
        totals, report = self.totals, past.report
        if report is None:
            totals.failed += 1
        elif past.direction == "send":
            totals.sent += 1
            totals.bytes_sent += report.bytes
        else:
            totals.received += 1
            totals.bytes_received += report.bytes
        self._past.append(past)
        self._number += 1
        if self._unseen is not None:
            self._unseen.append(past)

    def failed(self, kind: str) -> None:
        """A command was answered with an error of this class."""
        self.totals.errors[kind] = self.totals.errors.get(kind, 0) + 1
        if self._unseen is not None:
            self._errors.append(kind)

    def unsaved(self) -> dict[int, PastTransfer]:
        """The transfers that ended since the last call, each with the place it takes among `KEPT`."""
        new = min(self._number - self._saved, len(self._past))
        first = self._number - new
        self._saved = self._number
        return {(first + offset) % KEPT: past for offset, past in enumerate(list(self._past)[len(self._past) - new :])}

    def last(self) -> list[PastTransfer]:
        """The transfers that are kept, the oldest first. From any thread."""
        return list(self._past.copy())

    def take(self) -> tuple[list[PastTransfer], dict[str, int]]:
        """What an observer has not seen yet. From any one thread."""
        unseen = self._unseen or deque()
        past = [unseen.popleft() for _ in range(len(unseen))]
        return past, dict(Counter(self._errors.popleft() for _ in range(len(self._errors))))
