"""publish and pull through real agents, all ranks in one process."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.tensor import Shard

import etha_ray
from actors.checkpoint import load_shards, read_checkpoint
from etha_ray.errors import (
    BatchClosedError,
    BatchUnmatchedError,
    ConfigError,
    CoordinateTakenError,
    IntegrityError,
    NamesMismatchError,
    NotShareableError,
    TransferInProgressError,
    TransferTimeoutError,
)
from etha_ray.testing import eventually, succeed, together
from etha_ray.weights import Publisher, PushReport, Receiver
from tests.actors.minilm import SENTENCES, MiniLM, model_directory
from tests.tensor_bus.cluster import LONG, LocalCluster, local_cluster
from tests.tensor_bus.far import Agents
from tests.transport.test_integrity import Flipping
from tests.weights.test_fused import QKV, parts, tensor_parallel


class Sides:
    """Publishers and receivers on the agents of a cluster, closed at its end."""

    def __init__(self, cluster: LocalCluster, stack: ExitStack) -> None:
        self._cluster = cluster
        self._stack = stack

    def publish(self, source: Any, agent: int = 0, **more: Any) -> Publisher:
        return self._stack.enter_context(etha_ray.publish(source, "policy", client=self._cluster.client(agent), **more))

    def time_is_up_for_those_who_do_not_take(self) -> None:
        """The sender is on the first agent, which then knows of all that was taken by now."""
        self._cluster.client(0).ping(LONG)
        self._cluster.time_is_up(0)

    def pull(self, source: Any, agent: int = 1, **more: Any) -> Receiver:
        more = {"timeout": LONG, "client": self._cluster.client(agent), **more}
        return self._stack.enter_context(etha_ray.pull(source, "policy", **more))


@contextmanager
def sides(agents: int = 2) -> Iterator[Sides]:
    with local_cluster(agents) as cluster, ExitStack() as stack:
        yield Sides(cluster, stack)


def sync(sender: Publisher, *receivers: Receiver, version: int | None = None) -> PushReport:
    """One push to all receivers."""
    report, *versions = succeed(lambda: sender.push(version, LONG), *[lambda r=r: r.update(LONG) for r in receivers])
    assert set(versions) == {report.version}
    return report


def fill(*models: nn.Module, value: float) -> None:
    with torch.no_grad():
        for model in models:
            for number, tensor in enumerate(model.state_dict().values()):
                tensor.copy_(torch.full_like(tensor, value + number))


def equal(one: nn.Module, other: nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True))


def model() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))


def test_one_after_the_other_in_one_thread() -> None:
    with sides() as at:
        source, target = model(), model()
        sender, receiver = at.publish(source, buffers=True), at.pull(target, buffers=True)
        assert (sender.version, receiver.version, receiver.report) == (0, 0, None)
        for number, version in ((1, None), (2, 7), (3, None)):
            fill(source, value=10 * number)
            push = sender.start_push(version)
            expected = {1: 1, 2: 7, 3: 8}[number]
            assert receiver.update(LONG) == receiver.version == expected
            report = push.result(LONG)
            assert equal(source, target)
            assert (report.version, sender.version, report.failed) == (expected, expected, {})
            size = 1 + sum(t.numel() * t.element_size() for t in source.state_dict().values())  # and the seal
            assert report.bytes == size
            assert receiver.report is not None
            assert receiver.report.bytes == size
            assert "version" in str(report)
        assert sender.replicas == ["0"]
        assert "version=8" in repr(sender)
        assert "replica='0'" in repr(receiver)


def test_on_one_agent() -> None:
    with sides(1) as at:
        source, target = model(), model()
        sync(at.publish(source), at.pull(target, agent=0))
        assert all(torch.equal(a, b) for a, b in zip(source.parameters(), target.parameters(), strict=True))


def test_buffers_stay_where_they_are_unless_asked_for() -> None:
    with sides() as at:
        source, target = model(), model()
        fill(source, value=5)
        sync(at.publish(source), at.pull(target))
        assert torch.equal(source[0].weight, target[0].weight)  # type: ignore[index]
        assert not torch.equal(source[1].running_mean, target[1].running_mean)  # type: ignore[index]


def test_ranks_of_both_sides_hold_shards_and_another_dtype() -> None:
    whole = {"up": torch.randn(6, 4), "down": torch.randn(4, 6), "norm": torch.randn(4)}
    source = [{name: tensor.chunk(2)[rank].clone() for name, tensor in whole.items()} for rank in range(2)]
    target = [
        {"up": torch.zeros(2, 4).bfloat16(), "down": torch.zeros(4, 2).bfloat16(), "norm": torch.zeros(4).bfloat16()} for _ in range(3)
    ]
    with sides() as at:
        senders = [at.publish(source[rank], agent=rank, placements=Shard(0), world_size=2, rank=rank) for rank in range(2)]
        into: dict[str, Any] = {"placements": {"up": Shard(0), "down": Shard(1)}, "world_size": 3}
        receivers = succeed(*[lambda r=r: at.pull(target[r], agent=r % 2, rank=r, **into) for r in range(3)])
        for version in (1, 2):
            for tensors in (whole, *source):
                for tensor in tensors.values():
                    tensor.add_(version)
            pushes = [lambda s=s, v=version: s.push(v, LONG) for s in senders]
            reports = succeed(*pushes, *[lambda r=r: r.update(LONG) for r in receivers])
            assert reports[2:] == [version] * 3
            for rank in range(3):
                assert torch.equal(target[rank]["up"], whole["up"].chunk(3)[rank].bfloat16())
                assert torch.equal(target[rank]["down"], whole["down"].chunk(3, 1)[rank].bfloat16())
                assert torch.equal(target[rank]["norm"], whole["norm"].bfloat16())


def test_tied_weights_and_heads_fused_as_vllm_does() -> None:
    whole = parts(4, 1)
    embed = torch.arange(10.0).reshape(5, 2)
    wanted = [tensor_parallel(whole, 4, rank) for rank in range(4)]
    targets = [{"qkv.weight": torch.zeros_like(wanted[rank]), "embed": torch.zeros(5, 2), "head": torch.zeros(5, 2)} for rank in range(4)]
    with sides() as at:
        sender = at.publish({**whole, "embed": embed, "head": embed})
        into: dict[str, Any] = {"placements": {"qkv.*": Shard(0)}, "rename": QKV, "world_size": 4}
        receivers = succeed(*[lambda r=r: at.pull(targets[r], rank=r, **into) for r in range(4)])
        sync(sender, *receivers)
    for rank in range(4):
        assert torch.equal(targets[rank]["qkv.weight"], wanted[rank])
        assert torch.equal(targets[rank]["embed"], embed)
        assert torch.equal(targets[rank]["head"], embed)


def test_a_real_checkpoint_fills_fused_weights() -> None:
    folder = model_directory()
    entries = read_checkpoint(folder)
    right = load_shards(entries, "target", 0, 1)
    fused = {f"qkv.{kind}": [f"{part}.{kind}" for part in ("query", "key", "value")] for kind in ("weight", "bias")}
    halves: list[dict[str, torch.Tensor]] = [{}, {}]
    for half in halves:
        for name, tensor in right.items():
            if ".query." in name:
                half[name.replace("query", "qkv")] = torch.full((3 * tensor.shape[0] // 2, *tensor.shape[1:]), torch.nan)
            elif ".key." not in name and ".value." not in name:
                half[name] = torch.zeros_like(tensor)
    into: dict[str, Any] = {"rename": fused, "placements": {"*.qkv.*": Shard(0)}, "world_size": 2}
    with sides() as at:
        senders = []
        for rank in range(2):
            shards = load_shards(entries, "source", rank, 2)
            senders.append(at.publish(shards, agent=rank, placements=lambda _, t: Shard(0) if t.ndim else None, world_size=2, rank=rank))
        engines = succeed(*[lambda r=r: at.pull(halves[r], agent=r, rank=r, **into) for r in range(2)])
        succeed(*[lambda s=s: s.push(timeout=LONG) for s in senders], *[lambda e=e: e.update(LONG) for e in engines])
    received = {name: tensor for name, tensor in halves[0].items() if "qkv" not in name}
    for name in [name for name in halves[0] if "qkv" in name]:
        # Each rank holds its half of the heads of query, of key and of value.
        parts = zip(*(half[name].chunk(3) for half in halves), strict=True)
        received.update({name.replace("qkv", part): torch.cat(both) for part, both in zip(("query", "key", "value"), parts, strict=True)})
    assert torch.equal(MiniLM(folder, received).embed(SENTENCES), MiniLM(folder, right).embed(SENTENCES))


def test_names_that_differ_are_an_error_on_both_sides() -> None:
    says = r"has 1 that the receiver lacks: b; the receiver has 1 that the sender lacks: c"
    with sides() as at:
        sender = at.publish({"a": torch.zeros(1), "b": torch.zeros(1)})
        errors = together(
            lambda: sender.push(timeout=LONG),
            lambda: at.pull({"a": torch.zeros(1), "c": torch.zeros(1)}),
        )
        for error in errors:
            assert isinstance(error, NamesMismatchError)
            with pytest.raises(NamesMismatchError, match=says):
                raise error
        target = torch.zeros(1)
        sync(sender, at.pull({"a": target, "c": torch.zeros(1)}, strict=False))


def test_subsets() -> None:
    source = {"l.lora_a": torch.ones(2), "l.w": torch.ones(3)}
    target = {"l.lora_a": torch.zeros(2), "l.w": torch.zeros(3)}
    with sides() as at:
        report = sync(at.publish(source), at.pull(target, only="*.lora_*"))
        assert report.bytes == 1 + 8
    assert torch.equal(target["l.lora_a"], torch.ones(2))
    assert torch.equal(target["l.w"], torch.zeros(3))


def test_a_receiver_outlives_its_sender() -> None:
    with sides() as at:
        target = torch.zeros(2)
        sender = at.publish({"w": torch.ones(2)})
        receiver = at.pull({"w": target})
        sync(sender, receiver)
        sender.close()
        sender.close()
        with pytest.raises(BatchClosedError, match="gone"):
            receiver.update(LONG)
        assert receiver.version == 1
        eventually(lambda: "nobody is there" in receiver._state())
        with pytest.raises(BatchUnmatchedError, match=r"replica '0' was not connected within 0\.1 s; .*the sender: nobody is there"):
            receiver.update(0.1)
        again = at.publish({"w": torch.full((2,), 5.0)})
        sync(again, receiver, version=9)
        assert torch.equal(target, torch.full((2,), 5.0))
        assert receiver.version == 9


def test_what_arrived_torn_is_no_version() -> None:
    transport = Flipping(1)
    transport.on = False
    with closing(Agents("on", transport)) as cluster, ExitStack() as stack:
        at = Sides(cluster, stack)
        source, target = torch.randn(40_000), torch.zeros(40_000)
        sender, receiver = at.publish({"w": source}), at.pull({"w": target})
        sync(sender, receiver, version=3)
        assert (receiver.version, receiver.torn) == (3, False)
        transport.on = True
        sent, told = together(lambda: sender.push(4, 1.0), lambda: receiver.update(LONG))
        assert isinstance(told, IntegrityError), told
        assert isinstance(sent, TransferTimeoutError), sent
        assert (receiver.version, receiver.torn) == (0, True)
        with pytest.raises(TimeoutError):
            receiver.update(0.1)
        assert (receiver.version, receiver.torn) == (0, True)
        transport.on = False
        sync(sender, receiver, version=5)
        assert (receiver.version, receiver.torn) == (5, False)
        assert torch.equal(source, target)


class TestErrors:
    def test_nobody_comes(self) -> None:
        with sides() as at:
            with pytest.raises(BatchUnmatchedError, match="the sender: nobody is there"):
                at.pull({"w": torch.zeros(1)}, timeout=0.2)
            sender = at.publish({"w": torch.zeros(1)}, world_size=2, rank=0)
            receiver = at.pull({"w": torch.zeros(1)}, blocking=False)
            eventually(lambda: "nobody is there" not in receiver._state())
            with pytest.raises(BatchUnmatchedError, match=r"the sender: ranks \[1\] of 2 are not there"):
                receiver.wait_ready(0.1)
            why = r"waited 200\.00 ms for a replica to join \(publish\(min_replicas=0\).*\); the sender: ranks \[1\] of 2 are not there"
            with pytest.raises(TransferTimeoutError, match=why):
                sender.push(timeout=0.2)

    def test_a_rank_is_taken(self) -> None:
        with sides() as at:
            at.publish({"w": torch.zeros(1)})
            with pytest.raises(CoordinateTakenError, match=r"'sender/00000000' of 'weights/policy' is taken by pid"):
                at.publish({"w": torch.zeros(1)}, agent=1)

    def test_memory_that_has_moved(self) -> None:
        with sides() as at:
            source, target = nn.Linear(2, 2), nn.Linear(2, 2)
            sender, receiver = at.publish(source), at.pull(target)
            source.weight.data = torch.ones(2, 2)
            with pytest.raises(NotShareableError, match=r"\['weight'\] \(1 in all\) have other memory"):
                sender.push()
            target.bias.data = torch.ones(2)
            with pytest.raises(NotShareableError, match="'bias'"):
                receiver.update()

    def test_versions_and_pushes(self) -> None:
        with sides() as at:
            sender, target = at.publish({"w": torch.zeros(1)}), torch.zeros(1)
            receiver = at.pull({"w": target})
            sync(sender, receiver, version=3)
            for version in (3, 0, True, 2.5):
                with pytest.raises(ConfigError, match="not an integer above 3"):
                    sender.push(version)  # type: ignore[arg-type]
            push = sender.start_push(timeout=LONG)
            eventually(lambda: sender._pushing.locked())
            with pytest.raises(TransferInProgressError, match="a push is under way"):
                sender.push()
            assert receiver.update(LONG) == 4
            push.result(LONG)

    @pytest.mark.parametrize(
        ("call", "says"),
        [
            (lambda at: at.publish({}), "there are no tensors"),
            (lambda at: at.publish({"w": torch.zeros(1)}, only="v"), r"none of 1 tensors fits only=\['v'\]"),
            (lambda at: at.publish({"w": torch.zeros(1)}, min_replicas=-1), "min_replicas -1 is negative"),
            (lambda at: at.pull({"w": torch.zeros(1)}, agent=0, replica="a/b"), "replica 'a/b' cannot be used"),
        ],
    )
    def test_bad_input(self, call: Callable[[Sides], Any], says: str) -> None:
        with sides(1) as at, pytest.raises(ConfigError, match=says):
            call(at)

    def test_closing_ends_what_waits(self) -> None:
        with sides() as at:
            sender = at.publish({"w": torch.zeros(1)})
            push = sender.start_push(timeout=LONG)
            eventually(lambda: sender._pushing.locked())
            sender.close()
            with pytest.raises(BatchClosedError, match="the publisher was closed"):
                push.result(LONG)
