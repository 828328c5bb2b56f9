"""How an agent answers: the outcome into its state file first, then the semaphore of whoever waits."""

from __future__ import annotations

import logging
import time
import traceback
from collections import deque
from typing import Any

import posix_ipc

from etha_ray.errors import EthaRayError, UnsafePathError
from etha_ray.tensor_bus.commands import BaseCommand, Failed, Ok, Outcome, encode_outcome
from etha_ray.tensor_bus.history import History
from etha_ray.tensor_bus.semaphores import is_semaphore_name, open_semaphore, waited_for
from etha_ray.tensor_bus.state_file import OUTCOME, StateFile, outcome_key

logger = logging.getLogger(__name__)


_STRANGERS = None
"""In place of a client's id: of those that are not known, or not any more."""

_KEPT = 64
"""Semaphores of a client from which on it is looked which of them it has removed."""

_LINGER = 10.0
"""Seconds for which the outcomes of a client that left can still be read by those of its threads that waited."""


class Outcomes:
    """Answers commands. On the loop only. Semaphores stay open between commands, as clients use them again."""

    def __init__(self, state: StateFile, history: History) -> None:
        self._state = state
        self._history = history
        self._semaphores: dict[str | None, dict[str, posix_ipc.Semaphore]] = {}
        self._look_at: dict[str | None, int] = {}
        self._leftovers: deque[tuple[float, list[bytes]]] = deque()

    def meet(self, client_id: str) -> None:
        """Keep the semaphores of a client until it is forgotten. Those of others are kept together, and go once they are many."""
        self._semaphores.setdefault(client_id, {})

    def ok(self, command: BaseCommand, value: Any = None) -> None:
        """The command succeeded."""
        self._answer(command, Ok(value=value, command_id=command.command_id))

    def failed(self, command: BaseCommand, error: BaseException) -> None:
        """The command failed: the client raises an error of the same class and message."""
        known = isinstance(error, EthaRayError)
        if not known:
            logger.error("agent failed on %s", type(command).__name__, exc_info=error)
        kind = type(error).__name__ if known else "AgentFailedError"
        self._history.failed(kind)
        if command.semaphore_name is None:
            logger.debug("nobody waits for a %s that failed: %s", type(command).__name__, error)
        outcome = Failed(
            kind=kind,
            message=str(error) if known else f"{type(error).__name__}: {error}",
            traceback="" if known else "".join(traceback.format_exception(error)),
            command_id=command.command_id,
        )
        self._answer(command, outcome)

    def answer_unread(self, semaphore_name: str, outcome: Outcome) -> None:
        """Answer a command of which only the semaphore's name could be read."""
        self._tell(_STRANGERS, semaphore_name, outcome)

    def forget(self, client_id: str | None) -> list[str]:
        """Close the semaphores of a client that left, and return their names."""
        kept = self._semaphores.pop(client_id, {})
        self._look_at.pop(client_id, None)
        for semaphore in kept.values():
            semaphore.close()
        self._leftovers.append((time.monotonic() + _LINGER, [outcome_key(name) for name in kept]))
        return list(kept)

    def drop_unread(self) -> None:
        """Drop what the agent before this one answered, and nobody reads any more."""
        names = {key: key.removeprefix(OUTCOME).decode(errors="replace") for key in self._state.under(OUTCOME)}
        self._state.delete([key for key, name in names.items() if not waited_for(name)])

    def clean(self, now: float) -> None:
        """Drop the outcomes of clients that left a while ago, by the monotonic clock."""
        while self._leftovers and self._leftovers[0][0] <= now:
            self._state.delete(self._leftovers.popleft()[1])

    def close(self) -> None:
        """Close all semaphores."""
        for client_id in list(self._semaphores):
            self.forget(client_id)

    def _answer(self, command: BaseCommand, outcome: Outcome) -> None:
        if command.semaphore_name is not None:
            self._tell(command.client_id, command.semaphore_name, outcome)

    def _tell(self, client_id: str | None, name: str, outcome: Outcome) -> None:
        client_id = client_id if client_id in self._semaphores else _STRANGERS
        kept = self._semaphores.setdefault(client_id, {})
        semaphore = kept.get(name)
        if semaphore is None and not is_semaphore_name(name):
            logger.error("a command cannot be answered: %r is no name of a semaphore", name[:80])
            return
        self._state.put(outcome_key(name), encode_outcome(outcome))
        if semaphore is None:
            try:
                semaphore = open_semaphore(name, create=False)
            except (posix_ipc.Error, UnsafePathError, OSError) as error:
                logger.debug("nobody waits for %s any more: %s", name, error)
                self._state.delete([outcome_key(name)])
                return
            kept[name] = semaphore
            if len(kept) >= self._look_at.get(client_id, _KEPT):
                self._drop_removed(client_id, kept)
        semaphore.release()

    def _drop_removed(self, client_id: str | None, kept: dict[str, posix_ipc.Semaphore]) -> None:
        """Let go of semaphores whose client stopped waiting: it has removed their names."""
        removed = [name for name in kept if not waited_for(name)]
        for name in removed:
            kept.pop(name).close()
        self._state.delete([outcome_key(name) for name in removed])
        self._look_at[client_id] = max(_KEPT, 2 * len(kept))
