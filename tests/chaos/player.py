"""A worker that sends or receives for as long as it lives, registers anew now and then, and goes on after every error as a user would."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.distributed.tensor import Replicate, Shard

from etha_ray.config import AgentPaths
from etha_ray.errors import EthaRayError
from etha_ray.layout import MeshSpec
from etha_ray.tensor_bus.client import BatchHandler, TensorBusClient
from tests.chaos.journal import Entry, Journal

TIMEOUT = 8.0
"""Seconds that every call is given."""

SHAPES = {"columns": (96, 61), "whole": (2048, 64)}
"""Of the int64 tensors, by pair. Senders hold rows; receivers hold columns of one, and the whole of the other."""

TRANSFERS = 25
"""Good ones of a registration, after which a player closes its batch and registers again."""

PATIENCE = 4
"""Failed transfers in a row after which a player makes a new client."""


@dataclass(frozen=True)
class Seat:
    """Which player this is: rank ``index`` of ``size`` of its side, "a" sends to "b", beside the agent at ``paths``. In their processes "p"
    publishes what "q" pulls (`weights`)."""

    side: str
    index: int
    size: int
    senders: int
    agent: int
    paths: AgentPaths
    host: int | None
    folder: Path

    @property
    def who(self) -> str:
        """Its name."""
        return f"{self.side}{self.index}"

    @property
    def sends(self) -> bool:
        """Whether its side is the one that sends."""
        return self.side in "ap"


class Player:
    """One life of a player."""

    def __init__(self, seat: Seat, life: int) -> None:
        self.seat, self.life = seat, life
        self.journal = Journal(seat.folder, seat.who, life)
        self.random = random.Random(f"{seat.who} {life}")
        self.leaving = threading.Event()
        self.tensors: dict[str, torch.Tensor] = {}
        self.count = 0
        self.client: TensorBusClient | None = None

    def play(self) -> None:
        """Until it is told to leave, with SIGTERM."""
        while not self.leaving.is_set():
            self.connect()
            while self.client is not None and not self.leaving.is_set():
                self.one_registration()
        if self.client is not None:
            self.client.close()

    def connect(self) -> None:
        """A client, once the agent is there."""
        seat = self.seat

        def connect() -> None:
            self.client = TensorBusClient(seat.agent, seat.paths.command_queue, seat.paths.state, TIMEOUT)

        self.call("connect", connect)

    def give_up(self) -> None:
        """The client; another one is made."""
        client, self.client = self.client, None
        if client is not None:
            self.call("close", client.close)

    def one_registration(self) -> None:
        """Pairs, a batch, its transfers, and its end."""
        mesh = MeshSpec((self.seat.size,), (self.seat.index,))
        handler = self.register(mesh)
        if handler is None:
            self.give_up()
            return
        good = failed = 0
        while good < TRANSFERS and failed < PATIENCE and not self.leaving.is_set():
            ended = self.send(handler) if self.seat.sends else self.receive(handler)
            good, failed = (good + 1, 0) if ended.outcome == "ok" else (good, failed + 1)
        closed = self.call("close", lambda: handler.close(timeout=TIMEOUT))
        if failed == PATIENCE or closed.outcome != "ok":
            self.give_up()

    def register(self, mesh: MeshSpec) -> BatchHandler | None:
        """A batch of fresh tensors, or None if that failed several times."""
        assert self.client is not None
        client, seat = self.client, self.seat
        other = "b" if seat.side == "a" else "a"
        for pair in SHAPES:
            placements = [Shard(0)] if seat.side == "a" else [Shard(1) if pair == "columns" else Replicate()]

            def init(pair: str = pair, placements: list[Any] = placements) -> None:
                client.init_pair(pair, seat.side, other, seat.size, mesh, placements, timeout=TIMEOUT)

            if not self.several("init_pair", init):
                return None
        self.tensors = {pair: torch.zeros(self.local_shape(pair), dtype=torch.int64) for pair in SHAPES}
        made: list[BatchHandler] = []

        def register() -> None:
            made.append(client.register_tensors("batch", [(tensor, pair) for pair, tensor in self.tensors.items()], timeout=TIMEOUT))

        return made[0] if self.several("register", register) else None

    def send(self, handler: BatchHandler) -> Entry:
        """Fresh numbers."""
        nonce = self.refill()
        return self.call("send", lambda: handler.transfer("send", blocking=True, timeout=TIMEOUT).result(0), nonce)

    def refill(self) -> int:
        """Write fresh numbers into all tensors; what tells them from those before."""
        self.count += 1
        nonce = self.life * 65536 + self.count
        for pair, tensor in self.tensors.items():
            torch.add(self.expected(pair), nonce << 32, out=tensor)
        return nonce

    def receive(self, handler: BatchHandler) -> Entry:
        """Whatever comes; if that succeeds, it must be whole."""
        atomic = self.random.random() < 0.5
        return self.call("recv", lambda: handler.transfer("recv", blocking=True, timeout=TIMEOUT, atomic=atomic).result(0))

    def several(self, name: str, call: Callable[[], Any]) -> bool:
        """Whether one of `PATIENCE` tries succeeded."""
        return any(self.call(name, call).outcome == "ok" for _ in range(PATIENCE) if not self.leaving.is_set())

    def call(self, name: str, call: Callable[[], Any], nonce: int = 0) -> Entry:
        """Make it, and write down how it ended. Errors that are not etha_ray's end the player: they are never right."""
        entry = self.journal.begin(name, nonce)
        try:
            result = call()
        except EthaRayError as error:
            return self.journal.end(entry, outcome=type(error).__name__, detail=str(error))
        except BaseException as error:
            self.journal.end(entry, outcome=type(error).__name__, detail=str(error), wrong="not an error of etha_ray")
            raise
        return self.journal.end(entry, outcome="ok", **self.found(name, result))

    def found(self, name: str, result: Any) -> dict[str, Any]:
        """What is to be written down of a call that went well."""
        found: dict[str, Any] = {"version": result.version} if name in ("send", "recv") else {}
        if name == "recv":
            found["taken"], found["wrong"] = self.look()
            found["through"] = [f"{self.seat.side}{index}" for name, index in map(_member, result.peers) if name == self.seat.side]
        return found

    def look(self) -> tuple[list[int], str]:
        """What each sender gave, and what is wrong with it."""
        taken: list[int] = []
        for sender in range(self.seat.senders):
            nonces: set[int] = set()
            for pair, tensor in self.tensors.items():
                rows = _rows(pair, sender, self.seat.senders)
                if not torch.equal(tensor[rows] & 0xFFFFFFFF, self.expected(pair)[rows]):
                    return taken, f"{pair}: numbers of another place"
                nonces |= set(torch.unique(tensor[rows] >> 32).tolist())
            if len(nonces) != 1:
                return taken, f"sender {sender} sent one version, and {len(nonces)} are here: {sorted(nonces)}"
            taken += nonces
        return taken, ""

    def expected(self, pair: str) -> torch.Tensor:
        """This player's part of the numbers 0, 1, 2... in the pair's shape."""
        rows, columns = SHAPES[pair]
        whole = torch.arange(rows * columns).reshape(rows, columns)
        if self.seat.sends:
            return whole[_rows(pair, self.seat.index, self.seat.size)]
        return whole.chunk(self.seat.size, 1)[self.seat.index] if pair == "columns" else whole

    def local_shape(self, pair: str) -> torch.Size:
        """Of this player's tensor."""
        return self.expected(pair).shape


def _member(shown: str) -> tuple[str, int]:
    """Side and index of what reports call a[0]."""
    name, _, index = shown.rstrip("]").partition("[")
    return name, int(index)


def _rows(pair: str, sender: int, senders: int) -> slice:
    each = -(-SHAPES[pair][0] // senders)
    return slice(sender * each, (sender + 1) * each)
