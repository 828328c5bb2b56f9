"""Which agents share this host's memory: a fact that is checked, not guessed.

Containers and network namespaces may share a kernel and not its memory, and two virtual machines cloned from one image
share even their boot id. So an agent leaves a nonce in /dev/shm, and another agent counts as on the same host only after
reading that nonce there.
"""

from __future__ import annotations

import os
import secrets
from pathlib import Path

from etha_ray.processes import pid_namespace
from etha_ray.tensor_bus.records import AgentRecord

SHARED_MEMORY = Path("/dev/shm")


class HostNonce:
    """A nonce in /dev/shm, there as long as its agent lives; a later agent sweeps those of dead ones."""

    def __init__(self) -> None:
        self.value = secrets.token_hex(16)
        self.path = str(SHARED_MEMORY / f"etha_ray.{pid_namespace():08x}.{os.getpid()}.{secrets.token_hex(8)}")
        descriptor = os.open(self.path, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_NOFOLLOW, 0o600)
        with os.fdopen(descriptor, "w") as file:
            file.write(self.value)

    def close(self) -> None:
        """Remove the nonce. May be called more than once."""
        Path(self.path).unlink(missing_ok=True)


def host_identity() -> str:
    """What agents that may share memory have in common: kernel boot, shared memory mount and process namespace."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot}:{SHARED_MEMORY.stat().st_dev}:{pid_namespace():08x}"


def shares_memory(agent: AgentRecord) -> bool:
    """Whether ``agent`` runs on this host, by reading its nonce where it says it left it."""
    path = Path(agent.nonce_path)
    if path.parent != SHARED_MEMORY or agent.host != host_identity():
        return False
    try:
        return path.read_text() == agent.nonce
    except (OSError, ValueError):  # nobody left it there, or what its record says is no path
        return False


def no_address(own: AgentRecord, other: AgentRecord) -> str:
    """Why two agents that share no memory cannot reach one another, and what to do."""
    silent = " and ".join(f"agent {agent.rank} ({agent.hostname})" for agent in (own, other) if not agent.address)
    return (
        f"agent {own.rank} ({own.hostname}) and agent {other.rank} ({other.hostname}) share no memory (different hosts, or containers"
        f" with a /dev/shm of their own), and {silent} listens on no address: give every agent that of its host"
        " (--host, or TensorBusAgent(..., host=...)), or run both on one host with one /dev/shm (for containers: --ipc=host --pid=host)"
    )
