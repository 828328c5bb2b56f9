"""What is said of members that are gone, one and several."""

from __future__ import annotations

import pytest
import torch
from torch.distributed.tensor import Replicate

from etha_ray.errors import BatchClosedError, PeerLostError
from etha_ray.tensor_bus.losses import Loss, Losses, Returns
from etha_ray.testing import eventually, succeed
from tests.tensor_bus.cluster import LONG, local_cluster


def lost(name: str, completed: int = 0, returns: Returns = "perhaps") -> Loss:
    return Loss(PeerLostError(f"{name} is gone"), completed, returns, name)


def test_the_first_is_told_and_the_others_are_named() -> None:
    losses = Losses()
    assert (bool(losses), losses.first, losses.final) == (False, None, None)
    first = lost("b[0]")
    losses.add("0", first, 5.0)
    assert losses.first is losses.final is losses.blamed(0) is first.error
    losses.add("0", lost("b[9]"), 6.0)  # what is known of one stays
    losses.add("1", lost("b[1]"), 7.0)
    losses.add("", Loss(PeerLostError("its agent died"), 0, "soon"), 8.0)
    for error in (losses.first, losses.final, losses.blamed(0)):
        assert isinstance(error, PeerLostError)
        assert str(error) == "b[0] is gone; also gone: b[1]"
    assert losses.since == 5.0


def test_those_who_come_back_soon_or_had_what_they_wanted_are_not_blamed() -> None:
    losses = Losses()
    losses.add("0", lost("b[0]", returns="soon"), 0.0)
    assert losses.final is losses.blamed(0) is None
    losses.add("1", lost("b[1]", completed=3), 0.0)
    losses.add("2", lost("b[2]", completed=2), 0.0)
    assert str(losses.final) == "b[1] is gone; also gone: b[0], b[2]"
    assert str(losses.blamed(2)) == "b[2] is gone; also gone: b[0], b[1]"
    assert str(losses.blamed(1)) == str(losses.final)


def test_of_many_some_are_named_and_the_rest_counted() -> None:
    losses = Losses()
    for index in range(100):
        losses.add(str(index), lost(f"b[{index}]"), 0.0)
    assert str(losses.first).endswith("b[15], b[16], 83 more")


def test_all_who_left_are_named() -> None:
    with local_cluster(3) as cluster:
        [one] = cluster.side("a", "b", [0], (1,), [Replicate()])
        others = cluster.side("b", "a", [1, 2], (2,), [Replicate()])
        succeed(*[side.join for side in (one, *others)])
        clients = [side.client for side in (one, *others)]
        sending, *_ = succeed(*[lambda c=c: c.register_tensors("batch", [(torch.zeros(3), "pair")], timeout=LONG) for c in clients])
        for side in others:
            side.client.close()
            cluster.clients.remove(side.client)
        eventually(lambda: len(cluster.agents[0]._service._workers.all()[0].batches["batch"].losing.losses.members) == 2)
        with pytest.raises(BatchClosedError, match=r"b\[[01]\] is gone .*; also gone: b\[[01]\]"):
            sending.transfer("send", blocking=True, timeout=LONG)
