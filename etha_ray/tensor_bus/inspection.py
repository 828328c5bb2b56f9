"""Agents as their state files show them: read by `etha-ray status`, `trace` and `doctor` without asking the agents.

So one that is stuck can be looked at, too, and one that was killed, as long as its files are there.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Literal, TypeAlias, TypeVar

import msgspec

from etha_ray.config import DEFAULT_NAMESPACE, FAILURE_TIMEOUT, AgentPaths, agent_paths, namespace_folders
from etha_ray.decoding import Decoder
from etha_ray.tensor_bus.history import PastTransfer
from etha_ray.tensor_bus.leftovers import lives
from etha_ray.tensor_bus.records import AgentRecord
from etha_ray.tensor_bus.snapshot import AgentStatus
from etha_ray.tensor_bus.state_file import HISTORY, STATUS, StateFile

Life: TypeAlias = Literal["running", "starting", "stuck", "stopped", "dead", "unreachable"]
"""stuck: the process is there, and its loop has not turned for `FAILURE_TIMEOUT`. dead: it was killed, and left its files.
unreachable: on another host, and does not answer."""


class SeenAgent(msgspec.Struct, frozen=True, omit_defaults=True):
    """One agent as it was seen at ``time`` (seconds since the epoch, of its own host).

    ``beat_age`` is in seconds. ``status`` is None before an agent has said what it serves; ``past`` has its last transfers, the
    oldest first.
    """

    rank: int
    life: Life
    time: float
    paths: tuple[str, str]
    beat_age: float | None = None
    record: AgentRecord | None = None
    status: AgentStatus | None = None
    past: tuple[PastTransfer, ...] = ()


_T = TypeVar("_T")
_statuses = Decoder(AgentStatus)
_transfers = Decoder(PastTransfer)
_agents = Decoder(SeenAgent)


def inspect_agent(rank: int, paths: AgentPaths) -> SeenAgent | None:
    """The agent behind these paths; None where there is none.

    Raises:
        UnsafePathError: the file belongs to another user.
    """
    try:
        state = StateFile(paths.state)
    except FileNotFoundError:
        return None
    try:
        now, record, beat = time.time(), state.record(), state.heartbeat()
        status = state.get(STATUS)
        return SeenAgent(
            rank=rank,
            life=_life(state, record, beat, now),
            time=now,
            paths=(paths.command_queue, paths.state),
            beat_age=None if beat is None else now - beat,
            record=record,
            status=None if status is None else _decoded(status, _statuses),
            past=tuple(sorted(_each(state.values(HISTORY)), key=lambda past: past.began + past.seconds)),
        )
    finally:
        state.close()


def agents_here(namespace: str = DEFAULT_NAMESPACE) -> list[SeenAgent]:
    """This user's agents of one pool on this host, dead ones included, by rank."""
    found = (inspect_agent(rank, paths) for rank, paths in state_files(namespace))
    return [agent for agent in found if agent is not None]


def namespaces_here() -> list[str]:
    """The pools that this user's agents on this host belong to, or did before they were killed."""
    names = [DEFAULT_NAMESPACE, *(folder.name for folder in namespace_folders())]
    return [name for name in names if state_files(name)]


def state_files(namespace: str) -> list[tuple[int, AgentPaths]]:
    """Ranks and paths of the state files that this user has on this host for a pool."""
    found = []
    for path in Path(agent_paths(0, namespace).state).parent.glob("agent_rank*_state.lmdb"):
        number = path.name.removeprefix("agent_rank").removesuffix("_state.lmdb")
        if number.isdigit() and path.lstat().st_uid == os.geteuid():
            found.append((int(number), agent_paths(int(number), namespace)))
    return sorted(found, key=lambda each: each[0])


def encode_seen(agent: SeenAgent) -> bytes:
    """As it travels from another host."""
    return msgspec.msgpack.encode(agent)


def decode_seen(data: bytes) -> SeenAgent:
    """Back from `encode_seen`; raises `msgspec.DecodeError` for what another version of etha_ray wrote."""
    return _agents.decode(data)


def _life(state: StateFile, record: AgentRecord | None, beat: float | None, now: float) -> Life:
    if record is None:
        return "starting"
    if state.stopped():
        return "stopped"
    if not lives(state, record):
        return "dead"
    if beat is None:
        return "starting"
    return "stuck" if now - beat > FAILURE_TIMEOUT else "running"


def _each(values: list[bytes]) -> list[PastTransfer]:
    found = (_decoded(value, _transfers) for value in values)
    return [past for past in found if past is not None]


def _decoded(data: bytes, decoder: Decoder[_T]) -> _T | None:
    try:
        return decoder.decode(data)
    except msgspec.DecodeError:  # an agent of another version: what it has in common is shown
        return None
