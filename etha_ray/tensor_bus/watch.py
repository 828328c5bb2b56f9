"""Is the agent behind a state file alive? Asked by its clients, and by the agents it exchanges data with."""

from __future__ import annotations

import os
import time

from etha_ray.config import FAILURE_TIMEOUT
from etha_ray.errors import AgentDiedError, AgentNotFoundError
from etha_ray.processes import is_alive, pid_namespace
from etha_ray.tensor_bus.records import AgentRecord
from etha_ray.tensor_bus.state_file import StateFile

_PAUSE = 0.02


class AgentWatch:
    """Tells whether the agent behind a state file is alive: its process, and a heartbeat that moves. From any thread."""

    def __init__(self, state: StateFile, record: AgentRecord) -> None:
        self._state = state
        self.record = record
        self._same_processes = record.host.endswith(f":{pid_namespace():08x}")
        self._beat = state.heartbeat()
        self._beat_seen = self._looked = time.monotonic()

    @property
    def gone(self) -> bool:
        """Whether its process is known to have ended: another agent may take its place, which it cannot while this one is stopped."""
        return self.replaced or (self._same_processes and not is_alive(self.record.pid, self.record.start_time))

    @property
    def replaced(self) -> bool:
        """Whether another agent has claimed its place; it may not serve yet."""
        found = self._state.record()
        return found is not None and found.incarnation != self.record.incarnation

    @property
    def silence(self) -> float:
        """Seconds for which it is known not to have beaten. Cheap."""
        now = time.monotonic()
        if self._state.heartbeat() != self._beat or now - self._looked > FAILURE_TIMEOUT:
            return 0.0
        return now - self._beat_seen

    def heard(self) -> None:
        """It has answered: a sign of life too, which may come before the next beat of one that stood still."""
        self._beat_seen = self._looked = time.monotonic()

    def check(self) -> None:
        """Raise `AgentDiedError` if the agent's process is gone or it has not beaten for the failure timeout."""
        record = self.record
        # First: who was shut down is soon gone, and did not die.
        if self._state.stopped():
            raise AgentDiedError(f"agent {record.rank} (pid {record.pid}) was shut down: start it again, then make a new client")
        if self._same_processes and not is_alive(record.pid, record.start_time):
            raise AgentDiedError(f"agent {record.rank} (pid {record.pid}) died")
        found = self._state.record()
        if found is None or found.incarnation != record.incarnation:
            raise AgentDiedError(f"agent {record.rank} (pid {record.pid}) died, and another was started in its place")
        now, beat = time.monotonic(), self._state.heartbeat()
        # Where nobody has looked for long, this process may have been stopped together with the agent: both get their time.
        if beat != self._beat or now - self._looked > FAILURE_TIMEOUT:
            self._beat, self._beat_seen = beat, now
        elif now - self._beat_seen > FAILURE_TIMEOUT:
            raise AgentDiedError(
                f"agent {record.rank} (pid {record.pid}) has not answered for {now - self._beat_seen:.1f} s: it is stopped or stuck;"
                " continue its process, or kill it, so that another takes its place"
            )
        self._looked = now

    def successor(self) -> AgentWatch | None:
        """A watch on the agent that has taken this one's place, once it serves there."""
        found = self._state.record()
        if found is None or found.incarnation == self.record.incarnation or self._state.heartbeat() is None:
            return None
        watch = AgentWatch(self._state, found)
        try:
            watch.check()
        except AgentDiedError:
            return None
        return watch


def find_agent(agent_rank: int, state_path: str, queue_path: str, timeout: float | None) -> tuple[StateFile, AgentWatch]:
    """Wait until the live agent of this rank is found behind these paths.

    Raises `AgentNotFoundError`, which says what was found instead, after ``timeout`` seconds (None: never).
    """
    deadline = None if timeout is None else time.monotonic() + timeout
    while True:
        found = _live_agent(agent_rank, state_path, queue_path)
        if not isinstance(found, str):
            return found
        if deadline is not None and time.monotonic() >= deadline:
            raise AgentNotFoundError(
                f"no agent {agent_rank} answers at {state_path} (queue {queue_path}) after {timeout:g} s: {found}."
                " Start one with etha_ray.launch_agents(...) or `python -m etha_ray.tensor_bus.agent`, or check"
                " AGENT_RANK, ETHA_RAY_NAMESPACE and the paths"
            )
        time.sleep(_PAUSE)


def _same(path: str, other: str) -> bool:
    try:
        return os.path.realpath(path) == os.path.realpath(other)
    except ValueError:  # what the file says is no path
        return False


def _live_agent(agent_rank: int, state_path: str, queue_path: str) -> tuple[StateFile, AgentWatch] | str:
    """Open the state file of a live agent, or say why there is none."""
    try:
        state = StateFile(state_path)
    except FileNotFoundError:
        return "there is no state file"
    try:
        record, beat = state.record(), state.heartbeat()
        if record is None or beat is None:
            reason = "the agent has not said who it is"
        elif record.rank != agent_rank:
            reason = f"agent {record.rank} serves there"
        elif not _same(record.command_queue_path, queue_path):
            reason = f"that agent's queue is {record.command_queue_path}"
        elif abs(time.time() - beat) > FAILURE_TIMEOUT:
            reason = f"the last heartbeat of agent {record.rank} (pid {record.pid}) is {time.time() - beat:.1f} s old"
        elif not os.path.exists(queue_path):
            reason = "there is no command queue"
        else:
            watch = AgentWatch(state, record)
            watch.check()
            return state, watch
    except AgentDiedError as error:
        reason = str(error)
    except BaseException:
        state.close()
        raise
    state.close()
    return reason
