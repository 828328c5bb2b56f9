"""Settings and paths. The only file that reads etha_ray's own settings from the environment."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from etha_ray.errors import ConfigError

HEARTBEAT_INTERVAL = 0.5
"""Seconds between two heartbeats of an agent."""

FAILURE_TIMEOUT = 5.0
"""Seconds without a heartbeat after which an agent counts as dead."""

SUCCESSION_TIMEOUT = 30.0
"""Seconds that clients and other agents wait for the next agent at the place of one that died."""

INTEGRITY = ("auto", "on", "off")
"""Which transports compare what arrived with what was sent: those between hosts, all, none."""

TRANSPORTS = ("auto", "mapped", "nccl", "tcp")
"""How an agent reads what others hold: as is best for each, or by this way alone."""

DEFAULT_NAMESPACE = "default"
MAX_TIMEOUT = 7 * 24 * 3600.0
"""Longest timeout accepted, in seconds: more is nearly always milliseconds given by mistake."""

_NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")


@dataclass(frozen=True)
class AgentPaths:
    """Where an agent's two LMDB files are."""

    command_queue: str
    state: str


def check_name(what: str, name: str) -> str:
    """Return ``name`` if it can be part of a path and of a store key; raise `ConfigError` otherwise."""
    if not isinstance(name, str) or not _NAME.fullmatch(name) or name in (".", ".."):
        raise ConfigError(f"{what} {name!r} cannot be used: give 1 to 64 letters, digits, '.', '_' or '-'")
    return name


def check_timeout(timeout: float | None) -> float | None:
    """Return ``timeout`` in seconds if it is None or within [0, 7 days]; raise `ConfigError` otherwise."""
    if timeout is None:
        return None
    if isinstance(timeout, bool) or not isinstance(timeout, (int, float)) or not 0 <= timeout <= MAX_TIMEOUT:
        raise ConfigError(f"timeout {timeout!r} is out of range: give seconds from 0 to {MAX_TIMEOUT:.0f} (7 days), or None for no limit")
    return float(timeout)


def check_integrity(setting: str) -> str:
    """Return ``setting`` if it is one of `INTEGRITY`; raise `ConfigError` otherwise."""
    if setting not in INTEGRITY:
        raise ConfigError(f"integrity {setting!r} is unknown: give one of {', '.join(map(repr, INTEGRITY))}")
    return setting


def check_transport(setting: str) -> str:
    """Return ``setting`` if it is one of `TRANSPORTS`; raise `ConfigError` otherwise."""
    if setting not in TRANSPORTS:
        raise ConfigError(f"transport {setting!r} is unknown: give one of {', '.join(map(repr, TRANSPORTS))}")
    return setting


def agent_paths(agent_rank: int, namespace: str = DEFAULT_NAMESPACE) -> AgentPaths:
    """The paths of an agent by convention.

    The default namespace uses ``/tmp/agent_rank{N}_command.lmdb`` and ``/tmp/agent_rank{N}_state.lmdb``; any other has a
    folder of its own, ``/tmp/etha_ray_{uid}/{namespace}/``.
    """
    if isinstance(agent_rank, bool) or not isinstance(agent_rank, int) or agent_rank < 0:
        raise ConfigError(f"agent rank {agent_rank!r} is out of range: give an integer from 0")
    folder = Path("/tmp")
    if namespace != DEFAULT_NAMESPACE:
        folder = namespaces_root() / check_name("namespace", namespace)
    stem = folder / f"agent_rank{agent_rank}"
    return AgentPaths(command_queue=f"{stem}_command.lmdb", state=f"{stem}_state.lmdb")


def namespaces_root() -> Path:
    """Where the folders of this user's namespaces are."""
    return Path("/tmp") / f"etha_ray_{os.getuid()}"


def namespace_folders() -> list[Path]:
    """The folders of this user's namespaces on this host, the default one's (/tmp) not among them."""
    root = namespaces_root()
    return sorted(path for path in root.iterdir() if path.is_dir()) if root.is_dir() and not root.is_symlink() else []


@dataclass(frozen=True)
class WorkerEnvironment:
    """What the environment says about this worker process.

    ``agent_rank`` (AGENT_RANK), ``agent_rank_offset`` (AGENT_RANK_OFFSET), ``local_rank`` (LOCAL_RANK), ``global_rank``
    (RANK), ``world_size`` (WORLD_SIZE), ``command_queue_path`` (TENSOR_BUS_COMMAND_QUEUE_PATH), ``state_path``
    (TENSOR_BUS_STATE_PATH) and ``namespace`` (ETHA_RAY_NAMESPACE, "default" when unset).
    """

    agent_rank: int | None
    agent_rank_offset: int | None
    local_rank: int | None
    global_rank: int | None
    world_size: int | None
    command_queue_path: str | None
    state_path: str | None
    namespace: str


def worker_environment() -> WorkerEnvironment:
    """Read the environment of this worker. Raises `ConfigError` when a rank is not an integer."""
    return WorkerEnvironment(
        agent_rank=_integer("AGENT_RANK"),
        agent_rank_offset=_integer("AGENT_RANK_OFFSET"),
        local_rank=_integer("LOCAL_RANK"),
        global_rank=_integer("RANK"),
        world_size=_integer("WORLD_SIZE"),
        command_queue_path=os.environ.get("TENSOR_BUS_COMMAND_QUEUE_PATH"),
        state_path=os.environ.get("TENSOR_BUS_STATE_PATH"),
        namespace=check_name("ETHA_RAY_NAMESPACE", os.environ.get("ETHA_RAY_NAMESPACE", DEFAULT_NAMESPACE)),
    )


def worker_variables(namespace: str, agent_rank: int | None) -> dict[str, str | None]:
    """What a worker's environment says if its agent is ``agent_rank`` of ``namespace``; None for what is not to be set.

    Without a rank, what a launcher says of ranks (LOCAL_RANK, AGENT_RANK_OFFSET) is left as it is.
    """
    variables: dict[str, str | None] = dict.fromkeys(("AGENT_RANK", "TENSOR_BUS_COMMAND_QUEUE_PATH", "TENSOR_BUS_STATE_PATH"))
    variables["ETHA_RAY_NAMESPACE"] = check_name("namespace", namespace)
    if agent_rank is not None:
        variables["AGENT_RANK"] = str(agent_rank)
    return variables


def store_url() -> str | None:
    """The URL of the store where agents meet (ETHA_RAY_STORE). Other users of the host see a command line, but not the environment."""
    return os.environ.get("ETHA_RAY_STORE") or None


def nccl_interface() -> str:
    """The network interfaces that NCCL is told to use (NCCL_SOCKET_IFNAME); nothing where it chooses."""
    return os.environ.get("NCCL_SOCKET_IFNAME", "")


def etcd_for_tests() -> tuple[str, int] | None:
    """Host and port of an etcd that tests may use (ETHA_RAY_TEST_ETCD, HOST:PORT), or None. Raises `ConfigError` if it is neither."""
    text = os.environ.get("ETHA_RAY_TEST_ETCD")
    if not text:
        return None
    host, _, port = text.rpartition(":")
    if not host or not port.isdigit():
        raise ConfigError(f"environment variable ETHA_RAY_TEST_ETCD={text!r} is not understood: give HOST:PORT")
    return host, int(port)


def _integer(name: str) -> int | None:
    text = os.environ.get(name)
    if text is None or text == "":
        return None
    try:
        return int(text)
    except ValueError:
        raise ConfigError(f"environment variable {name}={text!r} is not an integer") from None
