"""Registering again and again: races of members that do not wait for one another."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Sequence
from typing import Any

import msgspec
import pytest
import torch
from torch.distributed.tensor import Shard

from etha_ray.errors import BatchClosedError, BatchUnmatchedError, HandleExpiredError, MemoryHandleError, PeerLostError
from etha_ray.memory import encode_handle, export_tensors
from etha_ray.tensor_bus.client import BatchHandler, TensorBusClient
from etha_ray.tensor_bus.commands import RegisteredTensor
from etha_ray.tensor_bus.jobs import Backoff
from etha_ray.tensor_bus.registered import Registered
from etha_ray.tensor_bus.registration import Registration, Request
from etha_ray.tensor_bus.ways import Ways
from etha_ray.testing import succeed, together
from tests.tensor_bus.cluster import LONG, local_cluster


def cycles(client: TensorBusClient, tensor: torch.Tensor, count: int, seed: int, *, blocking: bool = True) -> None:
    rng = random.Random(seed)
    for _ in range(count):
        handler = client.register_tensors("x", [(tensor, "pair")], timeout=LONG)
        if rng.random() < 0.2:
            time.sleep(rng.random() * 0.004)
        handler.close(blocking=blocking)


@pytest.mark.parametrize(
    ("ranks", "blocking"), [((0, 1), False), *[pytest.param(ranks, True, marks=pytest.mark.slow) for ranks in ((0, 1), (0, 0))]]
)
def test_rapid_cycles_of_one_batch_id(ranks: tuple[int, int], blocking: bool) -> None:
    """Nobody waits for the other side but in register_tensors, and each call there has its partner."""
    with local_cluster() as cluster:
        one, two = cluster.pair(ranks=ranks)
        succeed(
            lambda: cycles(one, torch.ones(3), 200, 1, blocking=blocking), lambda: cycles(two, torch.zeros(3), 200, 2, blocking=blocking)
        )


def test_cycles_of_three_members_with_transfers() -> None:
    with local_cluster() as cluster:
        sides = [*cluster.side("a", "b", [0, 1], (2,), [Shard(0)]), *cluster.side("b", "a", [0], None, None)]
        succeed(*[side.join for side in sides])
        whole = torch.arange(10.0)

        def run(index: int) -> None:
            for step in range(40):
                tensor = sides[index].cut(whole + step) if index < 2 else torch.zeros(10)
                handler = sides[index].client.register_tensors("x", [(tensor, "pair")], timeout=LONG)
                handler.transfer("send" if index < 2 else "recv", blocking=True, timeout=LONG)
                if index == 2:
                    assert torch.equal(tensor, whole + step)
                handler.close()

        succeed(*[lambda index=index: run(index) for index in range(3)])


def test_shapes_that_change_with_the_id_kept() -> None:
    """What is left of the last registration is no mismatch."""
    with local_cluster() as cluster:
        one, two = cluster.pair()

        def run(client: TensorBusClient, value: float) -> None:
            for size in range(1, 60):
                client.register_tensors("x", [(torch.full((size,), value), "pair")], timeout=LONG).close()

        succeed(lambda: run(one, 1.0), lambda: run(two, 0.0))


def test_uneven_shards_whose_shapes_change_with_the_id_kept() -> None:
    """Members say where they differ from the first one, which may be one of another round."""
    with local_cluster() as cluster:
        sides = [*cluster.side("a", "b", [0, 1, 0], (3,), [Shard(0)]), *cluster.side("b", "a", [1, 0], (2,), [Shard(0)])]
        succeed(*[side.join for side in sides])

        def run(index: int) -> None:
            side, rng = sides[index], random.Random(index)
            for size in range(1, 30):
                wholes = [torch.arange(float(size)), torch.arange(2.0 * size)]
                tensors = [side.cut(whole if index < 3 else whole * 0) for whole in wholes]
                handler = side.client.register_tensors("x", [(tensor, "pair") for tensor in tensors], timeout=LONG)
                if size % 7 == 0:
                    handler.transfer("send" if index < 3 else "recv", blocking=True, timeout=LONG)
                    assert all(torch.equal(tensor, side.cut(whole)) for tensor, whole in zip(tensors, wholes, strict=True))
                if rng.random() < 0.2:
                    time.sleep(rng.random() * 0.004)
                handler.close()

        succeed(*[lambda index=index: run(index) for index in range(len(sides))])


def test_who_is_done_may_close_before_others_begin() -> None:
    """A transfer needs only those that bytes come from or go to; the next one is refused at once, as nobody would take part."""
    with local_cluster() as cluster:
        sides = [*cluster.side("a", "b", [0, 1], (2,), [Shard(0)]), *cluster.side("b", "a", [0, 1], (2,), [Shard(0)])]
        succeed(*[side.join for side in sides])
        tensors = [side.cut(torch.arange(4.0) if index < 2 else torch.zeros(4)) for index, side in enumerate(sides)]

        def register(index: int) -> BatchHandler:
            return sides[index].client.register_tensors("x", [(tensors[index], "pair")], timeout=LONG)

        handlers = succeed(*[lambda index=index: register(index) for index in range(4)])
        for _ in range(2):
            sent = handlers[0].transfer("send")
            handlers[2].transfer("recv", blocking=True, timeout=LONG)
            sent.result(LONG)
        handlers[0].close()
        handlers[2].close()
        for value in (5.0, 6.0):
            tensors[1].fill_(value)
            sent = handlers[1].transfer("send")
            handlers[3].transfer("recv", blocking=True, timeout=LONG)
            sent.result(LONG)
            assert torch.equal(tensors[3], torch.full((2,), value))
        for handler, direction in ((handlers[1], "send"), (handlers[3], "recv")):
            with pytest.raises(BatchClosedError, match="is gone"):
                handler.transfer(direction, blocking=True, timeout=LONG)


def test_mismatch_then_match_many_times() -> None:
    with local_cluster() as cluster:
        one, two = cluster.pair()

        def run(client: TensorBusClient, wrong: int) -> list[str]:
            raised = []
            for _ in range(20):
                try:
                    client.register_tensors("x", [(torch.zeros(wrong), "pair")], timeout=LONG).close()
                except ValueError as error:
                    raised.append(type(error).__name__)
                client.register_tensors("x", [(torch.zeros(9), "pair")], timeout=LONG).close()
            return raised

        assert succeed(lambda: run(one, 2), lambda: run(two, 3)) == [["TensorMismatchError"] * 20] * 2


def test_pair_mismatch_then_match_many_times() -> None:
    both_told = threading.Barrier(2)

    def run(client: TensorBusClient, name: str, other: str, wrong: int) -> None:
        for number in range(10):
            with pytest.raises(ValueError, match="paired in order"):
                client.init_pair(f"p{number}", name, other, wrong, timeout=LONG)
            both_told.wait(LONG)
            client.init_pair(f"p{number}", name, other, 1, timeout=LONG)

    with local_cluster() as cluster:
        one, two = cluster.client(0), cluster.client(1)
        succeed(lambda: run(one, "a", "b", 2), lambda: run(two, "b", "a", 3))


def test_both_sides_close_at_once() -> None:
    with local_cluster() as cluster:
        one, two = cluster.pair()
        for number in range(30):
            handlers: list[BatchHandler] = succeed(
                lambda: one.register_tensors("x", [(torch.ones(3), "pair")], timeout=LONG),
                lambda: two.register_tensors("x", [(torch.zeros(3), "pair")], timeout=LONG),
            )
            sent = handlers[0].transfer("send") if number % 2 else None
            succeed(*[handler.close for handler in handlers])
            if sent is not None:
                with pytest.raises(BatchClosedError):
                    sent.result(LONG)


def test_clients_come_and_go() -> None:
    """A place that was given back is free at once."""
    with local_cluster() as cluster:

        def run(rank: int, name: str, other: str) -> None:
            for number in range(25):
                client = cluster.client(rank)
                client.init_pair("pair", name, other, 1, timeout=LONG)
                tensor = torch.full((4,), float(number)) if name == "a" else torch.zeros(4)
                handler = client.register_tensors("x", [(tensor, "pair")], timeout=LONG)
                handler.transfer("send" if name == "a" else "recv", blocking=True, timeout=LONG)
                assert torch.equal(tensor, torch.full((4,), float(number)))
                barrier.wait(LONG)
                client.close()

        barrier = threading.Barrier(2)
        succeed(lambda: run(0, "a", "b"), lambda: run(1, "b", "a"))


class Blinded:
    """An agent that agrees with all others and then sees nobody any more, so that they are ready and it is not.

    Its time is up once ``over`` is set; it sees again once ``sees`` is.
    """

    def __init__(self, agent_state: str, monkeypatch: pytest.MonkeyPatch) -> None:
        self.agreed, self.over = threading.Event(), threading.Event()
        self.sees = False
        look = Registration._records

        def records(registration: Registration, pair_name: str, matches: dict[str, Any]) -> Any:
            local, remote = look(registration, pair_name, matches)
            if self.sees or registration._published.state.path != agent_state or not registration.has_agreed:
                return local, remote
            self.agreed.set()
            return [None] * len(local), [None] * len(remote)

        class Hurried(Backoff):
            def wait(backoff) -> bool:
                return not self.over.is_set() and super().wait()

        monkeypatch.setattr(Registration, "_records", records)
        monkeypatch.setattr("etha_ray.tensor_bus.registration.Backoff", Hurried)


@pytest.mark.parametrize("how", ["its time is up", "its client is closed"])
def test_one_that_goes_away_when_others_may_be_ready_tells_them(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with local_cluster() as cluster:
        one, two = cluster.pair()
        blinded = Blinded(cluster.paths[1].state, monkeypatch)
        room = torch.zeros(4)

        def give_up() -> None:
            if how == "its time is up":
                with pytest.raises(BatchUnmatchedError):
                    two.register_tensors("x", [(room, "pair")], timeout=LONG)
            else:
                two.register_tensors("x", [(room, "pair")], blocking=False)
                assert blinded.agreed.wait(LONG)
                assert first_ready.wait(LONG)
                two.close()

        first_ready = threading.Event()

        def stay() -> BatchHandler:
            handler = one.register_tensors("x", [(torch.ones(4), "pair")], timeout=LONG)
            first_ready.set()
            if how == "its time is up":
                blinded.over.set()
            return handler

        first, _ = succeed(stay, give_up)
        with pytest.raises(PeerLostError if how == "its time is up" else BatchClosedError, match=r"b\[0\] is gone"):
            first.transfer("send", blocking=True, timeout=LONG)
        blinded.over.clear()
        blinded.sees = True
        if how == "its client is closed":
            two = cluster.client(1)
            two.init_pair("pair", "b", "a", 1, timeout=LONG)
        second = two.register_tensors("x", [(room, "pair")], timeout=LONG)
        first.wait_ready(LONG)
        succeed(
            lambda: first.transfer("send", blocking=True, timeout=LONG),
            lambda: second.transfer("recv", blocking=True, timeout=LONG),
        )
        assert torch.equal(room, torch.ones(4))


def test_many_tensors_and_batches() -> None:
    with local_cluster() as cluster:
        one, two = cluster.pair()
        base, room = torch.arange(3000.0), torch.zeros(3000)
        mine: list[Any] = [(part, "pair") for part in base.split(1)]
        theirs: list[Any] = [(part, "pair") for part in room.split(1)]
        first, second = succeed(
            lambda: one.register_tensors("many", mine, timeout=LONG), lambda: two.register_tensors("many", theirs, timeout=LONG)
        )
        first.transfer("send")
        assert second.transfer("recv").result(LONG).bytes == base.nbytes
        assert torch.equal(base, room)
        more = succeed(
            *[lambda n=n: one.register_tensors(f"b{n}", mine[n : n + 1], timeout=LONG) for n in range(20)],
            *[lambda n=n: two.register_tensors(f"b{n}", theirs[n : n + 1], timeout=LONG) for n in range(20)],
        )
        base.mul_(2)
        sent = [handler.transfer("send") for handler in more[:20]]
        for handler in reversed(more[20:]):
            handler.transfer("recv").result(LONG)
        for semaphore in sent:
            semaphore.result(LONG)  # type: ignore[attr-defined]
        assert torch.equal(base[:20], room[:20])
        assert not torch.equal(base[20:], room[20:])


def unbegun(tensors: Sequence[tuple[str, RegisteredTensor]] = ()) -> Registration:
    nothing: Any = None
    return Registration(nothing, nothing, Ways("agent", nothing, None), Request("x", "mine", {}, tensors, 1, None, None), nothing)


def test_what_others_agreed_to_counts_for_that_set_only() -> None:
    registration = unbegun()
    assert not registration._is_agreed("pair", "this set", {}, {})
    registration.confirm(["an earlier set"])
    assert not registration._is_agreed("pair", "this set", {}, {})
    registration.confirm(["this set"])
    assert registration._is_agreed("pair", "this set", {}, {})


def test_a_tensor_is_named_by_its_place_among_those_of_all_pairs() -> None:
    exported = export_tensors([torch.zeros(3)])
    handle = exported.handles[0]
    good = RegisteredTensor(encode_handle(handle))
    bad = RegisteredTensor(encode_handle(msgspec.structs.replace(handle, dtype="float31")))
    grouped = {"one": [good, bad], "two": [good, good]}
    registration = unbegun([("one", good), ("two", good), ("two", good), ("one", bad)])
    with pytest.raises(MemoryHandleError, match="tensor 3 of batch 'x'"):
        registration._open_own(grouped, Registered())
    exported.close()


def test_memory_that_is_gone_until_the_time_is_up_is_somebody_who_did_not_come(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whose successor may still come: the caller waits for it as for one that was never there."""

    def gone(*_: Any) -> None:
        raise HandleExpiredError("agent 1 has no handles of 'b' any more")

    monkeypatch.setattr(Registration, "_prepare", gone)
    with local_cluster() as cluster:
        one, two = cluster.pair("pair")
        tensor = torch.zeros(2)
        calls = [lambda each=each: each.register_tensors("x", [(tensor, "pair")], timeout=0.5) for each in (one, two)]
        for error in together(*calls):
            assert isinstance(error, BatchUnmatchedError), error
            assert "'x' was not registered by everyone within 0.5 s" in str(error)
            assert "(the last try: agent 1 has no handles of 'b' any more)" in str(error)
