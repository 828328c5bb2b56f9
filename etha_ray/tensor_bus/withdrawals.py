"""Takes back from the store what this agent's workers said there, however long the store is away.

What stays there by mistake is believed for as long as the worker's process and its agent live: its place in a pair would be taken, and
who registers its batch again would wait for ever. So what cannot be taken back now is tried again until it can. Owned by the loop.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

from etha_ray.errors import StoreError
from etha_ray.tensor_bus.jobs import Job, Jobs

logger = logging.getLogger(__name__)


def _nothing() -> None:
    pass


@dataclass(frozen=True)
class _Owed:
    name: str
    withdraw: Callable[[], None]
    done: Callable[[], None]


@dataclass(frozen=True, eq=False)
class _Begun:
    """A first time that is under way, and who is told when it is over."""

    tell: Callable[[], None]


class Withdrawals:
    """What has to be taken back. ``jobs`` do it."""

    def __init__(self, jobs: Jobs) -> None:
        self._jobs = jobs
        self._owed: list[_Owed] = []
        self._job: Job[None] | None = None
        self._begun: list[_Begun] = []
        self._silent = False

    def start(self, name: str, withdraw: Callable[[], None], tried: Callable[[], None], done: Callable[[], None] = _nothing) -> None:
        """Run ``withdraw`` on a thread, again and again while the store is away.

        The loop runs ``done`` once nothing is left there, and ``tried`` after the first time, or once the store is known to be silent:
        nobody waits for a store that is away.
        """

        def over(job: Job[None]) -> None:
            if job.error is None:
                done()
            elif isinstance(job.error, StoreError):
                logger.warning("%s: the store is away, this is tried again (%s)", name, job.error)
                self._owed.append(_Owed(name, withdraw, done))
            else:
                logger.error("%s failed", name, exc_info=job.error)
                done()
            if begun in self._begun:
                self._begun.remove(begun)
                begun.tell()

        begun = _Begun(tried)
        self._begun.append(begun)
        self._jobs.start(name, lambda _: withdraw(), over)
        if self._silent:
            self._jobs.post(self._tell)

    def again(self, silent: bool = False) -> None:
        """Try what is owed once more, in order, if that is not under way. ``silent``: the store has not answered for a while."""
        self._silent = silent
        if silent:
            self._tell()
        if self._job is not None or not self._owed:
            return
        withdrawn: list[_Owed] = []
        owed = list(self._owed)

        def work(_: object) -> None:
            for each in owed:
                each.withdraw()
                withdrawn.append(each)

        def over(job: Job[None]) -> None:
            self._job = None
            if job.error is not None and not isinstance(job.error, StoreError):
                failed = owed[len(withdrawn)]
                logger.error("%s failed", failed.name, exc_info=job.error)
                withdrawn.append(failed)
            for each in withdrawn:
                self._owed.remove(each)
                each.done()

        self._job = self._jobs.start("withdraw what is owed", work, over)

    def _tell(self) -> None:
        begun, self._begun = self._begun, []
        for each in begun:
            each.tell()
