"""Several replicas of one publisher: they join and leave, fail and are late, and keep nothing from one another."""

from __future__ import annotations

import threading

import pytest
import torch
from torch.distributed.tensor import Shard

from etha_ray.errors import (
    BatchClosedError,
    BatchTornError,
    ConfigError,
    NamesMismatchError,
    PeerLostError,
    TransferTimeoutError,
)
from etha_ray.testing import eventually, succeed
from etha_ray.weights import PushReport
from tests.tensor_bus.cluster import LONG
from tests.weights.test_publish import sides, sync


def test_join_and_leave_while_others_go_on() -> None:
    with sides() as at:
        source = torch.zeros(3)
        sender = at.publish({"w": source})
        tensors = {name: torch.zeros(3) for name in ("gen-0", "gen-1", "gen-2")}
        held = {name: at.pull({"w": tensors[name]}, replica=name) for name in ("gen-0", "gen-1")}
        eventually(lambda: sender.replicas == ["gen-0", "gen-1"])
        for version, there in ((1, ["gen-0", "gen-1"]), (2, ["gen-1"]), (3, ["gen-1", "gen-2"])):
            if version == 2:
                held.pop("gen-0").close()
            if version == 3:
                held["gen-2"] = at.pull({"w": tensors["gen-2"]}, replica="gen-2")
                assert held["gen-2"].version == 0
            eventually(lambda there=there: sender.replicas == there)
            source.fill_(version)
            report = sync(sender, *held.values())
            assert sorted(report.replicas) == there
            assert report.failed == {}
            assert [int(tensors[name][0]) for name in there] == [version] * len(there)


def test_one_that_does_not_fit_or_is_late_does_not_keep_the_others() -> None:
    with sides() as at:
        source, target, late = torch.ones(2), torch.zeros(2), torch.zeros(2)
        sender = at.publish({"w": source})
        receiver = at.pull({"w": target}, replica="good")
        unfit = at.pull({"v": torch.zeros(2)}, replica="unfit", blocking=False)
        with pytest.raises(NamesMismatchError):
            unfit.wait_ready(LONG)
        slow = at.pull({"w": late}, replica="slow")
        eventually(lambda: sender.replicas == ["good", "slow"] and "'unfit' is failed" in sender._state())
        report, (version, _) = succeed(
            lambda: sender.push(timeout=LONG), lambda: (receiver.update(LONG), at.time_is_up_for_those_who_do_not_take())
        )
        assert version == 1
        assert list(report.replicas) == ["good"]
        assert isinstance(report.failed["slow"], TransferTimeoutError)
        assert isinstance(report.failed["unfit"], NamesMismatchError)
        assert "slow" in str(report)
        assert torch.equal(target, source)
        assert torch.equal(late, torch.zeros(2))
        assert slow.version == 0
        # It is tried again, and gets the version of then.
        assert sorted(sync(sender, receiver, slow).replicas) == ["good", "slow"]
        assert slow.version == 2


def test_one_that_does_not_call_update_holds_up_a_push_for_so_long_only() -> None:
    with sides() as at:
        source = torch.ones(4)
        sources = [source[:2].clone(), source[2:].clone()]
        ranks = [at.publish({"w": w}, agent=r, placements=Shard(0), world_size=2, rank=r) for r, w in enumerate(sources)]
        good, slow = torch.zeros(4), torch.zeros(4)
        receiver, straggler = at.pull({"w": good}, replica="good"), at.pull({"w": slow}, replica="slow")
        eventually(lambda: all(rank.replicas == ["good", "slow"] for rank in ranks))
        for version in (1, 2):
            reports = succeed(
                *[lambda rank=rank, version=version: rank.push(version, LONG, straggler_timeout=0.1) for rank in ranks],
                lambda: receiver.update(LONG),
            )[:2]
            for report in reports:
                assert list(report.replicas) == ["good"]
                assert isinstance(report.failed["slow"], TransferTimeoutError)
                assert "'slow': not all ranks have called update in time" in str(report.failed["slow"])
            assert torch.equal(good, source)
            assert (straggler.version, straggler.torn, slow.tolist()) == (0, False, [0.0] * 4)
        for rank in ranks:
            assert rank.replicas == ["good", "slow"]  # it is still connected, and gets the version of then
        reports = succeed(
            *[lambda rank=rank: rank.push(3, LONG, straggler_timeout=LONG) for rank in ranks],
            lambda: (receiver.update(LONG), eventually(lambda: receiver.version == 3), straggler.update(LONG)),
        )
        assert reports[2][::2] == (3, 3)
        assert all(sorted(report.replicas) == ["good", "slow"] for report in reports[:2])
        assert torch.equal(slow, source)


def test_nobody_is_a_straggler_before_one_has_taken_the_weights() -> None:
    with sides() as at:
        sender = at.publish({"w": torch.ones(2)})
        for replica in ("a", "b"):
            at.pull({"w": torch.zeros(2)}, replica=replica)
        eventually(lambda: sender.replicas == ["a", "b"])
        with pytest.raises(TransferTimeoutError, match="called update in time"):
            sender.push(timeout=0.5, straggler_timeout=0.0)
        with pytest.raises(ConfigError, match="-1"):
            sender.push(straggler_timeout=-1.0)


def test_all_ranks_of_a_sender_push_to_the_same_replicas() -> None:
    """Replicas join and leave while two ranks push, each at its own pace."""
    with sides() as at:
        source = [torch.zeros(2), torch.zeros(2)]
        senders = [at.publish({"w": source[r]}, agent=r, placements=Shard(0), world_size=2, rank=r, min_replicas=0) for r in range(2)]
        done = threading.Event()
        reports: list[list[PushReport]] = [[], []]

        def pushing(rank: int) -> None:
            try:
                while True:
                    source[rank].fill_(len(reports[rank]) + 1)
                    reports[rank].append(senders[rank].push(timeout=LONG))
            except (BatchClosedError, BatchTornError, PeerLostError):  # rank 0 may close while rank 1 hears what it says
                if not done.is_set():
                    raise

        def coming_and_going(replica: str) -> list[int]:
            versions = []
            for _ in range(3):
                target = torch.zeros(4)
                with at.pull({"w": target}, replica=replica) as receiver:
                    for _ in range(2):
                        versions.append(receiver.update(LONG))
                        assert torch.equal(target, torch.full((4,), float(versions[-1])))
            return versions

        def all_come_and_go() -> None:
            try:
                for versions in succeed(lambda: coming_and_going("a"), lambda: coming_and_going("b")):
                    assert versions == sorted(set(versions))
            finally:
                done.set()
                for sender in senders:
                    sender.close()

        succeed(lambda: pushing(0), lambda: pushing(1), all_come_and_go)
        for mine, other in zip(*reports, strict=False):
            assert mine.version == other.version
            assert {*mine.replicas, *mine.failed} == {*other.replicas, *other.failed}
        assert sum(len(report.replicas) for report in reports[0]) >= 12
