"""Versions of a batch, over agents in this process: counted, said, waited for, and refused where senders differ."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.distributed.tensor import Shard

from etha_ray.errors import ConfigError, UnknownBatchError, VersionMismatchError, VersionTimeoutError
from etha_ray.testing import succeed
from tests.tensor_bus.cluster import LONG, LocalCluster, local_cluster


@pytest.fixture(scope="module")
def cluster() -> Iterator[LocalCluster]:
    with local_cluster() as made:
        yield made


def test_counted_or_said_and_there_on_both_sides(cluster: LocalCluster) -> None:
    first, second, _, _ = cluster.batch(batch_id="counted")
    assert first.version == second.version == 0
    assert "version 0: nothing sent or received yet" in repr(second)
    for said, expected in ((None, 1), (41, 41), (None, 42)):
        sent, got = first.transfer("send", version=said), second.transfer("recv")
        assert sent.result(LONG).version == got.result(LONG).version == expected
        assert first.version == second.version == expected
        assert "v42" in str(got.result()) or expected != 42
    assert "version 42" in repr(second)
    with pytest.raises(ConfigError, match="version 42 is not above 42"):
        first.transfer("send", version=42).result(LONG)
    for wrong in (0, -1, True, 1.5, 1 << 63):
        with pytest.raises(ConfigError, match="is not an integer from 1"):
            first.transfer("send", version=wrong)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match='version goes with "send"'):
        second.transfer("recv", version=50)
    back, taken = second.transfer("send"), first.transfer("recv")
    assert back.result(LONG).version == taken.result(LONG).version == 43
    second.close()
    with pytest.raises(UnknownBatchError):
        _ = second.version
    assert "closed" in repr(second)
    assert first.version == 43  # it still holds what it got
    first.close()


def test_one_that_came_back_is_at_zero_until_it_has_received(cluster: LocalCluster) -> None:
    first, second, source, target = cluster.batch(batch_id="back")
    first.transfer("send", version=7)
    second.transfer("recv").result(LONG)
    first.close()
    second.close()
    pair = [("pair of back")]
    one, two = succeed(
        *[
            lambda handler=handler, tensor=tensor: handler.client.register_tensors("back", [(tensor, pair[0])], timeout=LONG)
            for handler, tensor in ((first, source), (second, target))
        ]
    )
    assert two.version == 0
    assert "nothing sent or received yet" in repr(two)
    one.transfer("send", version=7)
    assert two.transfer("recv").result(LONG).version == 7


def test_waited_for_on_another_thread(cluster: LocalCluster) -> None:
    first, second, _, _ = cluster.batch(batch_id="waited")
    got: list[Any] = []
    waiter = threading.Thread(target=lambda: got.extend((second.wait_version(3, LONG), first.wait_version(3, LONG))))
    waiter.start()
    with pytest.raises(VersionTimeoutError, match=r"holds version 0: a\[0\] did not send a newer one; version 1 did not come within 0"):
        second.wait_version(1, 0.01)
    for version in (1, 5):
        assert not got
        sent = first.transfer("send", version=version)
        if version == 1:
            assert first.query_transfer_signal()
            with pytest.raises(VersionTimeoutError, match=r"was sent, call transfer\('recv'\)"):
                second.wait_version(1, 0.01)
        second.transfer("recv").result(LONG)
        sent.result(LONG)
    waiter.join(LONG)
    assert got == [5, 5]
    assert second.wait_version(5, 0.0) == 5
    results: list[BaseException] = []

    def wait() -> None:
        try:
            second.wait_version(6, None)
        except Exception as error:
            results.append(error)

    waiter = threading.Thread(target=wait)
    waiter.start()
    first.close()
    waiter.join(LONG)
    assert "is gone" in str(results[0])


def test_ranks_that_say_different_versions_are_all_told(cluster: LocalCluster) -> None:
    sources, targets = cluster.side("a", "b", [0, 1], (2,), [Shard(0)]), cluster.side("b", "a", [1], None, None)
    sides = [*sources, *targets]
    succeed(*[side.join for side in sides])
    whole = torch.arange(8.0)
    held = [sources[0].cut(whole), sources[1].cut(whole), torch.zeros(8)]
    one, two, target = succeed(
        *[lambda s=s, t=t: s.client.register_tensors("x", [(t, "pair")], timeout=LONG) for s, t in zip(sides, held, strict=True)]
    )
    for handles in ((one.transfer("send", version=5), two.transfer("send", version=6), target.transfer("recv")),):
        for handle in handles:
            with pytest.raises(VersionMismatchError, match=r"a\[0\] says 5, a\[1\] says 6"):
                handle.result(LONG)
    assert target.version == one.version == two.version == 0
    assert not held[2].any()
    sent = [one.transfer("send", version=6), two.transfer("send", version=6)]
    assert target.transfer("recv").result(LONG).version == 6
    assert [semaphore.result(LONG).version for semaphore in sent] == [6, 6]
    assert torch.equal(held[2], whole)
