"""A Ray of the tests' own: local_mode where the installed Ray has it, a small cluster, and the start of both."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from etha_ray.config import worker_variables
from etha_ray.testing.bus import environment, fresh_namespace

if TYPE_CHECKING:
    from etha_ray.runtime import AgentPool

OPTIONS: Mapping[str, Any] = {"num_cpus": 8, "log_to_driver": False, "logging_level": "error"}
"""What `ray.init` is given by default. CPUs are logical, so that actors have room on any machine."""


@dataclass(frozen=True)
class RayUnderTest:
    """The Ray that a test runs on.

    Attributes:
        local_mode: everything runs in the test's process, one call after the other.
        namespace: an etha_ray namespace that nobody else uses. ETHA_RAY_NAMESPACE has it, in this process and in Ray's workers.
    """

    local_mode: bool
    namespace: str

    def launch_agents(self, agents: int | Sequence[str] = 2, **options: Any) -> AgentPool:
        """`etha_ray.launch_agents` in this namespace: so many CPU agents, or these devices. Use it in a ``with``, or shut it down."""
        from etha_ray.runtime import launch_agents

        return launch_agents(["cpu"] * agents if isinstance(agents, int) else agents, namespace=self.namespace, **options)


@contextmanager
def running_ray(local_mode: bool, options: Mapping[str, Any]) -> Iterator[RayUnderTest]:
    """Start a Ray for the block: in this process if ``local_mode`` and the installed Ray can, else a cluster of this machine.

    Raises RuntimeError if one runs in this process already.
    """
    import ray

    if ray.is_initialized():
        raise RuntimeError(
            "Ray runs in this process already: a test module has either ray_local or ray_cluster, and no Ray of its own beside it"
            " (ray.shutdown() ends one)"
        )
    namespace = fresh_namespace()
    with environment(worker_variables(namespace, None)):  # before Ray starts: its workers inherit it
        try:
            yield RayUnderTest(start_ray(local_mode, **options), namespace)
        finally:
            ray.shutdown()


def start_ray(local_mode: bool = False, **options: Any) -> bool:
    """Start a Ray of this process's own; whether it is in local_mode, which Rays after 2.52 refuse.

    Ray forks its daemons and runs Python in the fork. Where other threads of the test process hold a lock just then, the daemon
    never comes up, and Ray gives up after 30 s: that is tried again.
    """
    import ray

    if local_mode:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)  # that it will be gone, which is known
                ray.init(local_mode=True, include_dashboard=False, **options)
            return True
        except RuntimeError as error:
            if "local_mode" not in str(error):
                raise
    for last in (False, True):
        try:
            ray.init(address="local", include_dashboard=False, **options)
            break
        except Exception as error:
            if last or "timed out" not in str(error).lower():  # during startup, or waiting for a file of a daemon's
                raise
            ray.shutdown()
    return False
