"""By which way tensors come: the one that fits, or the one that was chosen."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

import pytest
import torch

from etha_ray.errors import ConfigError, MemoryHandleError, NoTransportError
from etha_ray.kvstore import MemoryStore
from etha_ray.memory import OpenedTensors
from etha_ray.tensor_bus import ways
from etha_ray.tensor_bus.agent import TensorBusAgent
from etha_ray.transport import Copy, MappedTransport
from etha_ray.transport.mapped import MappedProgram
from tests.tensor_bus.cluster import LONG, local_cluster
from tests.tensor_bus.far import Agents


class CountingTransport(MappedTransport):
    """Counts what it is asked to copy."""

    def __init__(self) -> None:
        super().__init__(threads=1)
        self.copies = 0

    def prepare(self, copies: Sequence[Copy]) -> MappedProgram:
        self.copies += len(copies)
        return super().prepare(copies)


@pytest.mark.parametrize(("choice", "mapped"), [("auto", 2), ("mapped", 2), ("tcp", 0)])
def test_way_that_was_chosen(choice: str, mapped: int) -> None:
    counting = CountingTransport()
    with contextlib.closing(Agents("auto", counting, choice)) as cluster:
        first, second, source, target = cluster.batch()
        assert counting.copies == mapped  # each can receive from the other
        for version in (1, 2):
            source.add_(1)
            sent = first.transfer("send")
            assert second.transfer("recv").result(LONG).version == version
            sent.result(LONG)
            assert torch.equal(source, target)


def test_what_cannot_be_mapped_comes_over_the_network(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def refused(*_: object, **__: object) -> OpenedTensors:
        raise MemoryHandleError("no way between these GPUs")

    monkeypatch.setattr(ways, "open_tensors", refused)
    with contextlib.closing(Agents("auto")) as cluster:
        first, second, source, target = cluster.batch()
        second.transfer("recv")
        first.transfer("send").result(LONG)
        assert torch.equal(source, target)
    assert "comes over the network: no way between these GPUs" in caplog.text
    with contextlib.closing(Agents("auto", transport="mapped")) as cluster, pytest.raises(MemoryHandleError, match="no way between"):
        cluster.batch()


def test_each_receiver_chooses_for_itself() -> None:
    with contextlib.closing(Agents("auto")) as cluster:
        cluster.agents[1].stop()
        cluster.transport = "tcp"
        cluster.agents[1] = cluster.start_agent(1)
        first, second, source, target = cluster.batch()
        second.transfer("recv")
        first.transfer("send").result(LONG)
        assert torch.equal(source, target)
        source.zero_()
        first.transfer("recv")  # this one maps
        second.transfer("send").result(LONG)
        assert torch.equal(source, target)


def test_mapping_alone_reaches_no_other_host(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ways, "shares_memory", lambda agent: False)
    with (
        contextlib.closing(Agents("auto", transport="mapped")) as cluster,
        pytest.raises(NoTransportError, match=r"transport='mapped', and agent \d .* shares no memory.*start it with 'auto'"),
    ):
        cluster.batch()


def test_network_alone_needs_addresses() -> None:
    with local_cluster([0]) as cluster:
        cluster.paths[1] = cluster.paths[0].__class__(cluster.paths[0].command_queue + "1", cluster.paths[0].state + "1")
        agent = TensorBusAgent(1, cluster.store, paths=cluster.paths[1], threads=1, transport="tcp")
        agent.start()
        cluster.agents[1] = agent
        with pytest.raises(NoTransportError, match=r"transport='tcp', and agent 1 .* listens on no address"):
            cluster.batch()


def test_nccl_moves_what_is_on_gpus() -> None:
    with (
        contextlib.closing(Agents("auto", transport="nccl")) as cluster,
        pytest.raises(NoTransportError, match=r"by NCCL .*use path 'auto'"),
    ):
        cluster.batch()


def test_choices() -> None:
    with pytest.raises(ConfigError, match="'auto', 'mapped', 'nccl', 'tcp'"):
        TensorBusAgent(0, MemoryStore("ways"), transport="rdma")
