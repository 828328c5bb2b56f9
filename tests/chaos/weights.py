"""Players that publish and pull for as long as they live, on threads of the processes that send and receive."""

from __future__ import annotations

import dataclasses
import threading
from typing import Any

import torch
from torch.distributed.tensor import Shard

import etha_ray
from etha_ray.weights import Publisher, PushReport, Receiver
from tests.chaos.journal import Entry
from tests.chaos.player import PATIENCE, SHAPES, TIMEOUT, TRANSFERS, Player, Seat

_RANKS = 2
"""Of the first replica; each other one has one."""


class WeightsPlayer(Player):
    """A rank of the publisher ("p"), or of a replica ("q")."""

    end: Publisher | Receiver

    def one_registration(self) -> None:
        """A publisher or receiver, what it does, and its end."""
        if not self.several("publish" if self.seat.sends else "pull", self.begin):
            self.give_up()
            return
        good = failed = 0
        while good < TRANSFERS and failed < PATIENCE and not self.leaving.is_set():
            ended = self.push(self.end) if isinstance(self.end, Publisher) else self.update(self.end)
            good, failed = (good + 1, 0) if ended.outcome == "ok" else (good, failed + 1)
        self.call("leave", self.end.close)
        if failed == PATIENCE:
            self.give_up()

    def begin(self) -> None:
        """Publish fresh tensors, or pull into them."""
        client, seat = self.client, self.seat
        assert client is not None
        self.tensors = {name: torch.zeros(self.local_shape(name), dtype=torch.int64) for name in SHAPES}
        if seat.sends:
            self.end = etha_ray.publish(self.tensors, "weights", placements=Shard(0), world_size=seat.size, rank=seat.index, client=client)
            return
        replica, rank, size = _place(seat.index)
        placements = {"columns": Shard(1)}
        self.end = etha_ray.pull(
            self.tensors, "weights", replica=replica, placements=placements, world_size=size, rank=rank, client=client, timeout=TIMEOUT
        )

    def push(self, publisher: Publisher) -> Entry:
        """Fresh numbers, to whoever is there."""
        nonce = self.refill()
        return self.call("push", lambda: publisher.push(timeout=TIMEOUT), nonce)

    def update(self, receiver: Receiver) -> Entry:
        """Whatever comes; if that succeeds, it must be whole, and if not, what is there must be what the receiver says."""
        ended = self.call("update", lambda: receiver.update(TIMEOUT))
        if ended.outcome != "ok":
            wrong = self.contradiction(receiver)
            if wrong:
                return self.journal.end(ended, wrong=wrong)
        return ended

    def contradiction(self, receiver: Receiver) -> str:
        """What is wrong with the tensors of a receiver that says that they hold a version; its agent may write them meanwhile."""
        while True:
            said = receiver.version, receiver.torn
            wrong = self.look()[1] if said[0] else ""
            if said == (receiver.version, receiver.torn):
                return wrong and f"it says that it holds version {said[0]}: {wrong}"

    def found(self, name: str, result: Any) -> dict[str, Any]:
        """See `Player.found`."""
        if isinstance(result, PushReport):
            reached = [who for replica in result.replicas for who in _members(replica)]
            failed = [type(error).__name__ for error in result.failed.values()]
            return {"version": result.version, "reached": reached, "failed": failed, "detail": str(result)}
        if name != "update":
            return {}
        taken, wrong = self.look()
        return {"version": result, "taken": taken, "wrong": wrong}

    def expected(self, pair: str) -> torch.Tensor:
        """See `Player.expected`: here the first replica's ranks share columns, and each other one has all."""
        if self.seat.sends:
            return super().expected(pair)
        rows, columns = SHAPES[pair]
        whole = torch.arange(rows * columns).reshape(rows, columns)
        _, rank, size = _place(self.seat.index)
        return whole.chunk(size, 1)[rank] if pair == "columns" else whole


def _place(index: int) -> tuple[str, int, int]:
    """The replica of a player of side "q", its rank there, and how many there are."""
    return ("0", index, _RANKS) if index < _RANKS else (str(index), 0, 1)


def _members(replica: str) -> list[str]:
    return [f"q{index}" for index in range(_RANKS)] if replica == "0" else [f"q{replica}"]


class Life:
    """One life of a process: its player, and beside it the one that publishes or pulls."""

    def __init__(self, seat: Seat, life: int) -> None:
        self._player = Player(seat, life)
        self._beside = WeightsPlayer(dataclasses.replace(seat, side={"a": "p", "b": "q"}[seat.side]), life)

    def play(self) -> None:
        """Until both are told to leave."""
        beside = threading.Thread(target=self._beside.play, name="publishes or pulls", daemon=True)
        beside.start()
        self._player.play()
        beside.join()

    def leave(self) -> None:
        """Tell both to leave."""
        self._player.leaving.set()
        self._beside.leaving.set()
