"""What agents leave that were killed, and what removes it."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from etha_ray.config import agent_paths
from etha_ray.errors import UnsafePathError
from etha_ray.tensor_bus import leftovers
from etha_ray.tensor_bus.client import TensorBusClient
from etha_ray.tensor_bus.leftovers import remove_dead_agents, remove_files
from etha_ray.tensor_bus.records import AgentRecord
from tests.conftest import left_behind
from tests.tensor_bus.cluster import LONG, fresh, run_agent


class Agent:
    """An agent in a process of its own."""

    def __init__(self, namespace: str, rank: int) -> None:
        self.paths = agent_paths(rank, namespace)
        arguments = ["--store", "memory://", "--rank", str(rank), "--namespace", namespace]
        self.process = fresh.Process(target=run_agent, args=(arguments,), daemon=True)
        self.process.start()
        assert self.process.pid is not None
        self.pid: int = self.process.pid
        TensorBusClient(rank, self.paths.command_queue, self.paths.state, LONG).close()

    def kill(self) -> int:
        self.process.kill()
        self.process.join()
        return self.pid


@pytest.fixture
def namespaces() -> Iterator[tuple[str, str]]:
    names = f"left-{uuid.uuid4().hex[:8]}", f"left-{uuid.uuid4().hex[:8]}"
    yield names
    for name in names:
        for rank in range(2):
            remove_files(agent_paths(rank, name))


def test_an_agent_that_is_told_to_end_leaves_nothing(namespaces: tuple[str, str]) -> None:
    agent = Agent(namespaces[0], 0)
    assert len(left_behind(namespaces[0], [agent.pid])) >= 5
    agent.process.terminate()
    agent.process.join(LONG)
    assert agent.process.exitcode == 0
    assert left_behind(namespaces[0], [agent.pid]) == []
    assert not Path(agent.paths.state).parent.exists()


def test_files_of_a_killed_agent_are_removed(namespaces: tuple[str, str]) -> None:
    agent = Agent(namespaces[0], 0)
    pid = agent.kill()
    assert left_behind(namespaces[0], [pid])
    assert remove_files(agent.paths)
    assert left_behind(namespaces[0], [pid]) == []
    assert remove_files(agent.paths)


def test_a_live_agent_keeps_its_files(namespaces: tuple[str, str]) -> None:
    agent = Agent(namespaces[0], 1)
    assert not remove_files(agent.paths)
    remove_dead_agents(namespaces[0], first_rank=0)
    remove_dead_agents(namespaces[1], first_rank=0)
    client = TensorBusClient(1, agent.paths.command_queue, agent.paths.state)
    client.ping()
    client.close()
    agent.kill()


def test_a_new_pool_removes_those_whose_place_nobody_takes(namespaces: tuple[str, str]) -> None:
    own, other = namespaces
    agents = [Agent(own, 0), Agent(own, 1), Agent(other, 0)]
    pids = [agent.kill() for agent in agents]
    remove_dead_agents(own, first_rank=1)
    assert left_behind(other, pids[2:]) == []
    assert Path(agents[0].paths.state).exists()  # the new pool's agent 0 takes this one over
    assert not Path(agents[1].paths.state).exists()


def test_other_users_files_are_left_alone(namespaces: tuple[str, str]) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can make a file of another user")
    agent = Agent(namespaces[0], 0)
    agent.kill()
    os.chown(agent.paths.state, 12345, -1)
    remove_dead_agents(namespaces[1], first_rank=0)
    assert Path(agent.paths.state).exists()
    os.chown(agent.paths.state, 0, -1)


@pytest.mark.parametrize("kind", ["symlink", "file", "writable", "foreign"])
@pytest.mark.parametrize("above", [True, False], ids=["the folder of all namespaces", "the namespace's own"])
def test_a_folder_that_another_made_first_is_refused(kind: str, above: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """/tmp is everybody's: what an agent reads and writes there must be out of reach of other users."""
    root = tmp_path / "etha_ray_0"
    monkeypatch.setattr(leftovers, "namespaces_root", lambda: root)
    folder = root if above else root / "mine"
    folder.parent.mkdir(exist_ok=True, mode=0o700)
    if kind == "symlink":
        (tmp_path / "elsewhere").mkdir()
        folder.symlink_to(tmp_path / "elsewhere")
    elif kind == "file":
        folder.touch()
    else:
        folder.mkdir()
        folder.chmod(0o777 if kind == "writable" else 0o755)
    if kind == "foreign":
        monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    record = AgentRecord(0, "one", 1, 0.0, "here", "here", "", "", "", str(root / "mine" / "state.lmdb"), "cpu")
    with pytest.raises(UnsafePathError, match=str(root if kind == "foreign" else folder) + " (is|does not|may be)"):
        leftovers.claim(record)
    assert not list(tmp_path.rglob("*.lmdb*"))
