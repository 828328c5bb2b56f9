"""Two agents whose store does not answer for a while: the same story for every store."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass

import pytest
import torch

from etha_ray.config import AgentPaths, agent_paths
from etha_ray.errors import StoreUnavailableError
from etha_ray.kvstore import create_store
from etha_ray.status.overview import overview
from etha_ray.tensor_bus import connection
from etha_ray.tensor_bus.agent import TensorBusAgent
from etha_ray.tensor_bus.board import Board
from etha_ray.tensor_bus.client import BatchHandler, TensorBusClient
from etha_ray.tensor_bus.inspection import inspect_agent
from etha_ray.testing import eventually, succeed
from etha_ray.testing.bus import fresh_namespace
from tests.tensor_bus.cluster import LONG, registered

TIME = 6.0
"""Seconds that calls are given: more than a silence takes to be noticed, and less than a store tries for."""


@dataclass(frozen=True)
class Meeting:
    """A client of each of two agents that meet in one store."""

    one: TensorBusClient
    two: TensorBusClient
    paths: list[AgentPaths]


@contextmanager
def meeting(url: str) -> Iterator[Meeting]:
    """In the store that ``url`` names."""
    namespace = fresh_namespace()
    paths = [agent_paths(rank, namespace) for rank in range(2)]
    stores = [create_store(url, namespace=namespace) for _ in range(2)]
    agents = [TensorBusAgent(rank, stores[rank], paths=paths[rank], threads=1) for rank in range(2)]
    for agent in agents:
        agent.start()
    one, two = (TensorBusClient(rank, paths[rank].command_queue, paths[rank].state, LONG) for rank in range(2))
    yield Meeting(one, two, paths)
    succeed(one.close, two.close)
    succeed(*[agent.stop for agent in agents])
    for store in stores:
        store.close()


def crosses(first: BatchHandler, second: BatchHandler) -> None:
    succeed(*[lambda way=way, end=end: end.transfer(way, blocking=True, timeout=LONG) for way, end in (("send", first), ("recv", second))])


def what_needs_it_says_so_and_transfers_go_on(
    at: Meeting, away: AbstractContextManager[object], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Within ``away`` the store does not answer."""
    monkeypatch.setattr(connection, "_GRACE", 0.5)  # clients give up here, while their agent waits
    one, two = at.one, at.two
    succeed(lambda: one.init_pair("p", "a", "b", 1, timeout=LONG), lambda: two.init_pair("p", "b", "a", 1, timeout=LONG))
    source, target = torch.arange(5.0), torch.zeros(5)
    first, second = registered(one, two, "p", source, target)
    with away:
        calls: dict[str, Callable[[], object]] = {
            "init_pair for 'q'": lambda: one.init_pair("q", "a", "b", 1, timeout=TIME),
            "register_tensors for 'y'": lambda: one.register_tensors("y", [(torch.ones(1), "p")], timeout=TIME),
            "ready_replicas for 'p'": lambda: one.ready_replicas("p", 1, timeout=TIME),
            "announce for 'topic'": lambda: Board(one, "topic").announce("slot", b"data", timeout=TIME),
            "read_notices for 'topic'": lambda: Board(one, "topic").read(timeout=TIME),
        }
        with ThreadPoolExecutor(len(calls)) as pool:
            ends = {what: pool.submit(call) for what, call in calls.items()}
            crosses(first, second)
            assert torch.equal(source, target)
            for what, end in ends.items():
                silent = rf"^{re.escape(what)}: .* of its agent has not answered for \d+\.\d s: see that it runs"
                with pytest.raises(StoreUnavailableError, match=silent):
                    end.result(LONG)
        monkeypatch.setattr(connection, "_GRACE", LONG)  # the agent says so, too, to one that joins the init_pair which it still tries
        late = r"^init_pair for 'q': no answer within 0\.1 s: the store of its agent has not answered"
        with pytest.raises(StoreUnavailableError, match=late):
            one.init_pair("q", "a", "b", 1, timeout=0.1)
        assert "agent 0: the store has not answered for" in caplog.text
        seen = inspect_agent(0, at.paths[0])
        assert seen is not None
        assert seen.status is not None
        problems = overview("test", [seen], seen.status.store_silent_since + 7).problems
        assert problems[0].startswith("agent 0 has had no answer of its store for 7 s: transfers go on")
    eventually(lambda: "agent 0: the store answers again" in caplog.text)
    succeed(lambda: one.init_pair("r", "a", "b", 1, timeout=LONG), lambda: two.init_pair("r", "b", "a", 1, timeout=LONG))
    crosses(first, second)
