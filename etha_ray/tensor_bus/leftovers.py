"""What killed agents and workers left on this host: whose it was, taking its place, and removing it.

An agent that ends by itself removes its files. One that was killed cannot: the agent in its place goes on with them, or the next pool
removes them, or its own pool's end. What a killed worker left in /dev/shm its agent removes.
"""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import time
from pathlib import Path

import msgspec

from etha_ray.config import FAILURE_TIMEOUT, AgentPaths, agent_paths, namespace_folders, namespaces_root
from etha_ray.errors import AgentBusyError
from etha_ray.processes import is_alive, process_start_time
from etha_ray.shared_files import sweep_unfinished
from etha_ray.tensor_bus.command_queue import CommandQueue
from etha_ray.tensor_bus.host import host_identity
from etha_ray.tensor_bus.lmdb_file import check_folder
from etha_ray.tensor_bus.records import AgentRecord
from etha_ray.tensor_bus.semaphores import sweep_dead
from etha_ray.tensor_bus.state_file import StateFile

logger = logging.getLogger(__name__)

_HANDOVER = 5.0
"""Seconds that a new agent waits for one that is shutting down at the same paths."""


def lives(state: StateFile, record: AgentRecord) -> bool:
    """Whether the agent that wrote this state file still runs: by its process where that can be looked up, else by its beat."""
    if record.host == host_identity() and record.pid != os.getpid():
        return is_alive(record.pid, record.start_time)
    beat = state.heartbeat() or state.claimed()
    same_process = record.host == host_identity() and record.start_time == process_start_time(os.getpid())
    return (same_process or record.host != host_identity()) and beat is not None and abs(time.time() - beat) < FAILURE_TIMEOUT


def _make_folder(folder: Path) -> None:
    if folder.parent != namespaces_root():
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        return
    for each in (folder.parent, folder):
        with contextlib.suppress(FileExistsError):
            each.mkdir(mode=0o700)
        check_folder(each)


def claim(record: AgentRecord) -> StateFile:
    """Open the state file for a new agent.

    Raises:
        AgentBusyError: another agent lives there.
        UnsafePathError: a namespace's folder is not this user's alone: in /tmp others may have made it first.
    """
    _make_folder(Path(record.state_path).parent)
    deadline = time.monotonic() + _HANDOVER
    while True:
        state = StateFile(record.state_path, create=True)
        found = state.record()
        if found is not None and lives(state, found):
            leaving = state.stopped()
            state.close()
            if not leaving or time.monotonic() >= deadline:
                raise AgentBusyError(
                    f"agent {found.rank} (pid {found.pid}) already serves {record.state_path}: shut it down (kill it, if it is"
                    f" stuck), or give the pool of agent {record.rank} a namespace of its own"
                )
            time.sleep(0.01)
            continue
        if state.take_over(found, record) and state.owns_path():
            if found is not None:
                logger.info("agent %d (pid %d) died at %s; taking its place", found.rank, found.pid, record.state_path)
            return state
        state.close()


def sweep() -> None:
    """Remove what dead processes left in /dev/shm: semaphores, files of ours, and shared memory that torch was making."""
    sweep_dead()
    sweep_unfinished()


def remove_files(paths: AgentPaths) -> bool:
    """Remove the files and semaphores of an agent that was killed. False, and nothing is touched, while an agent lives there."""
    if Path(paths.state).exists():
        with contextlib.suppress(FileNotFoundError):  # somebody else removed it at the same moment
            state = StateFile(paths.state, create=True)
            found = state.record()
            # Without a record an agent is just moving in. Who removes takes the dead one's place first, so that none can.
            if found is None or lives(state, found) or not state.take_over(found, _caretaker(found)):
                state.close()
                return False
            state.put_stopped()
            _remove_queue(paths)
            state.close(destroy=True)
    else:
        _remove_queue(paths)
    sweep()
    leave_folder(paths)
    return True


def remove_dead_agents(namespace: str, first_rank: int) -> None:
    """Remove what the agents of killed pools left: in ``namespace`` from ``first_rank`` on, where a smaller pool takes nobody's
    place, and in this user's other namespaces. Live agents are left alone."""
    own = Path(agent_paths(0, namespace).state).parent
    for folder in dict.fromkeys([own, *namespace_folders()]):
        for path in folder.glob("agent_rank*_state.lmdb"):
            number = path.name.removeprefix("agent_rank").removesuffix("_state.lmdb")
            if number.isdigit() and path.lstat().st_uid == os.geteuid() and not (folder == own and int(number) < first_rank):
                queue = path.with_name(f"agent_rank{number}_command.lmdb")
                remove_files(AgentPaths(command_queue=str(queue), state=str(path)))


def leave_folder(paths: AgentPaths) -> None:
    """Remove the folder of a namespace after its last agent's files."""
    folder = Path(paths.state).parent
    if folder in namespace_folders():
        with contextlib.suppress(OSError):  # there are others' files in it
            folder.rmdir()


def _caretaker(dead: AgentRecord) -> AgentRecord:
    return msgspec.structs.replace(
        dead,
        incarnation=secrets.token_hex(16),
        pid=os.getpid(),
        start_time=process_start_time(os.getpid()) or 0.0,
        host=host_identity(),
    )


def _remove_queue(paths: AgentPaths) -> None:
    if Path(paths.command_queue).exists():
        CommandQueue(paths.command_queue).close(destroy=True)
