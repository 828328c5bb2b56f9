"""Receivers that pass on to one another, with messages in every order; and a reading whose relay fails."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from etha_ray.errors import BatchTornError, PeerLostError, TransferCancelledError
from etha_ray.tensor_bus import feeding
from etha_ray.tensor_bus.executor import Inflow
from etha_ray.tensor_bus.feeding import Fed, Feed
from etha_ray.tensor_bus.messages import DataRead, DataRefused, DataTaken, Message, RegistrationClosed, RelayRead, RelayWanted
from etha_ray.tensor_bus.transfer_state import TransferState
from etha_ray.transport import CopyProgram
from etha_ray.transport.base import NoProgram
from etha_ray.transport.joint import Move
from tests.tensor_bus.ends import End, peer


def _inflow(place: int = 0) -> Inflow:
    one = torch.ones(1)
    return Inflow(place, one, (0,), (0,), Move((one,), one), place, 0, Move((one,), one))


def _feed(*relays: str | None) -> Feed:
    """Of a tensor each, each a stage."""
    fed = [Fed(_inflow(place), relay, "pair", place) for place, relay in enumerate(relays)]
    return Feed(fed, lambda inflow: inflow.tensor, lambda _: NoProgram(), divided=True)


@pytest.fixture(autouse=True)
def _small_stages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feeding, "STAGE_BYTES", 1)


class _Three:
    """A sender, a relay on another host and a reader on a third; all have registered."""

    def __init__(self) -> None:
        self.source = End("source", targets={"relay": True, "reader": True})
        self.relay, self.reader = End("relay", sources={"source": True}), End("reader", sources={"source": True})
        lends, reads = self.relay.registered, self.reader.registered
        lends.others["reader"], lends.takers = peer("reader", remote=True), {"reader"}
        reads.others["relay"] = reads.relays["relay"] = peer("relay", remote=True)
        reads.sources["source"] = peer("source", remote=True, size=0)
        reads.instead = {"relay": {"source": 8}}
        lends.feed, reads.feed = _feed(None, None, None), _feed(None, "relay", "relay")
        self.ends = {"source": self.source, "relay": self.relay, "reader": self.reader}
        for end in self.ends.values():
            end.register()

    def carry(self, *, hold: type[Message] | None = None) -> list[Message]:  # type: ignore[valid-type]
        """Let everything arrive that was said, but messages of one kind, which are returned."""
        held: list[Message] = []
        while said := [message for end in self.ends.values() for message in end.said()]:
            for message in said:
                if hold is not None and isinstance(message, hold):
                    held.append(message)
                    continue
                self.arrives(message)
        return held

    def arrives(self, message: Any) -> None:
        if isinstance(message, (RelayWanted, RelayRead)):
            own = message.relay
        else:
            own = message.source if isinstance(message, DataTaken | DataRefused | DataRead) else message.target
        self.ends[own].hears(message)

    def begin(self) -> None:
        """The reader waits for the relay, which moves."""
        self.reader.start("recv")
        self.relay.start("recv")
        self.source.start("send")
        self.carry()
        assert self.reader.state is TransferState.MOVING, "what it does not get from the relay"
        self.reader.bus.copied()
        assert not self.reader.bus.moves
        assert self.relay.state is TransferState.MOVING

    def lend(self) -> None:
        """The relay has all, and the reader reads the last of it from there."""
        self.begin()
        for _ in range(3):
            assert not self.reader.bus.moves
            self.relay.bus.copied()
            self.carry()
            if self.reader.bus.moves and self.relay.bus.moves:
                self.reader.bus.copied()
        assert self.relay.state is TransferState.LENDING
        assert self.reader.state is TransferState.MOVING

    def run(self) -> None:
        """All that moves moves, and everything arrives."""
        while any(end.bus.moves or end.bus.said for end in self.ends.values()):
            for end in self.ends.values():
                self.copied(end)
            self.carry()

    def copied(self, end: End) -> None:
        """All that moves there moves."""
        while end.bus.moves:
            end.bus.copied()


def test_a_reader_waits_for_its_relay_and_the_relay_for_its_reader() -> None:
    three = _Three()
    three.lend()
    assert three.relay.outcome() is None
    assert three.source.outcome() is None
    three.copied(three.reader)
    three.carry()
    assert three.reader.outcome().peers == {"relay[0]": 8}
    assert three.relay.outcome().peers == {"source[0]": 8}
    assert three.source.outcome() is not None


def test_a_relay_that_does_not_come_is_done_without() -> None:
    three = _Three()
    three.reader.start("recv")
    three.source.start("send")
    three.carry()
    assert three.reader.state is TransferState.WAITING
    deadline = three.reader.batch.deadline
    assert deadline is not None
    three.reader.batch.expire(deadline)
    assert three.reader.state is TransferState.MOVING
    three.copied(three.reader)
    three.carry()
    assert three.reader.outcome().peers == {"source[0]": 8}
    three.relay.start("recv")  # it comes later, and does not wait for the one that was there before
    three.copied(three.relay)
    three.carry()
    deadline = three.relay.batch.deadline
    assert deadline is not None
    three.relay.batch.expire(max(deadline, time.monotonic()))
    _eventually_over(three)
    assert three.source.outcome() is not None


def _eventually_over(three: _Three) -> None:
    while three.relay.batch.transfer is not None:
        three.relay.batch.expire(time.monotonic())
    assert three.relay.outcome().bytes == 8


def test_a_reader_that_comes_when_its_relay_is_done_reads_from_the_sender_at_once() -> None:
    three = _Three()
    three.relay.start("recv")
    three.source.start("send")
    three.carry()
    three.copied(three.relay)
    three.carry()
    _eventually_over(three)
    three.reader.start("recv")
    three.carry()
    assert three.reader.state is TransferState.MOVING
    three.copied(three.reader)
    three.carry()
    assert three.reader.outcome().peers == {"source[0]": 8}


@pytest.mark.parametrize("when", ["moving", "asking"])
def test_a_relay_that_does_not_keep_it_costs_the_reader_no_more_than_reading_again(when: str) -> None:
    three = _Three()
    three.lend()
    held: list[Message] = []
    if when == "asking":
        three.copied(three.reader)
        held = three.carry(hold=RelayRead)
        assert three.reader.state is TransferState.ASKING
    three.relay.batch.cancel(TransferCancelledError("its worker does not wait for others"))
    assert three.relay.outcome().bytes == 8, "it has all it wanted"
    three.carry()
    for message in held:
        three.arrives(message)
    if when == "moving":
        three.reader.bus.copied()
    assert three.reader.state is TransferState.MOVING, "again, from the sender"
    assert three.reader.batch.holding.torn
    three.copied(three.reader)
    three.carry()
    assert three.reader.outcome().peers == {"source[0]": 8}
    assert three.source.outcome() is not None


@pytest.mark.parametrize("when", ["waiting", "moving", "asking"])
def test_a_relay_that_dies_is_done_without(when: str) -> None:
    three = _Three()
    three.begin() if when == "waiting" else three.lend()
    if when == "asking":
        three.copied(three.reader)
        three.carry(hold=RelayRead)
    dead = RegistrationClosed(batch_id="batch", closed="relay", target="reader", reason="its worker died", lost=True)
    three.reader.hears(dead)
    if when == "moving":
        three.reader.bus.copied()
    assert three.reader.state is TransferState.MOVING
    three.copied(three.reader)
    del three.ends["relay"]
    while said := [message for end in three.ends.values() for message in end.said()]:
        for message in said:
            if not isinstance(message, (RelayRead, RelayWanted)):
                three.arrives(message)
    assert three.reader.outcome().peers == {"source[0]": 8}


@pytest.mark.parametrize("when", ["waiting", "moving", "asking"])
def test_what_the_sender_takes_back_is_no_success_through_a_relay_either(when: str) -> None:
    three = _Three()
    three.begin() if when == "waiting" else three.lend()
    if when == "asking":
        three.copied(three.reader)
        three.carry(hold=RelayRead)
    three.source.batch.cancel(TransferCancelledError("its worker gave up"))
    three.source.outcome()
    three.carry()
    if when == "waiting":
        three.copied(three.relay)
        assert isinstance(three.relay.outcome(), BatchTornError)
    if when == "moving":
        three.copied(three.reader)
    three.carry()
    error = three.reader.outcome()
    assert isinstance(error, BatchTornError)
    assert three.reader.batch.holding.torn == (0, 1, 2)
    if when != "waiting":
        assert three.relay.outcome().bytes == 8, "its own had been confirmed"


def test_a_relay_whose_receive_fails_says_so() -> None:
    three = _Three()
    three.begin()
    three.source.hears(DataRefused(batch_id="batch", source="source", target="relay", sequence=1, kind="PeerLostError", message="lost"))
    three.carry()
    assert isinstance(three.source.outcome(), PeerLostError)
    three.copied(three.relay)
    three.carry()
    assert isinstance(three.relay.outcome(), BatchTornError)
    assert isinstance(three.reader.outcome(), BatchTornError)
    three.reader.start("recv")
    three.relay.start("recv")
    three.source.start("send")
    three.run()
    assert three.reader.outcome().peers == {"relay[0]": 8}


def test_a_reader_follows_its_relay_stage_by_stage() -> None:
    three = _Three()
    three.begin()
    for stage in (1, 2):
        three.relay.bus.copied()
        three.carry()
        assert bool(three.reader.bus.moves) == (stage == 2), "what the relay has is read while it receives the next"
    three.reader.bus.copied()
    assert three.relay.state is TransferState.MOVING
    three.run()
    assert three.reader.outcome().peers == {"relay[0]": 8}
    assert three.relay.outcome().bytes == 8
    assert three.source.outcome() is not None


def test_a_reader_that_has_all_waits_until_that_is_certain() -> None:
    three = _Three()
    three.relay.registered.feed = _feed(None, None, None)
    three.begin()
    three.relay.bus.copied()
    three.relay.bus.copied()
    three.relay.bus.copied()
    held = three.carry(hold=DataRead)
    three.copied(three.reader)
    held += three.carry(hold=DataRead)
    assert three.reader.state is TransferState.ASKING
    assert three.relay.state is TransferState.ASKING
    for message in held:
        assert isinstance(message, DataRead)
        if message.target == "reader":
            three.arrives(message)
    three.carry()
    assert three.reader.state is TransferState.ASKING, "the relay is not certain yet"
    three.reader.batch.expire(time.monotonic() + 1000)
    assert three.reader.state is TransferState.ASKING, "it lives: it is waited for"
    for message in held:
        if isinstance(message, DataRead) and message.target == "relay":
            three.arrives(message)
    three.carry()
    assert three.reader.outcome().peers == {"relay[0]": 8}


def test_what_a_relay_reads_again_its_readers_do_too() -> None:
    """Relay's own relay stops lending once it has passed on what it got from there."""
    three = _Three()
    first = three.ends["first"] = End("first", sources={"source": True})
    first.register()
    lends = three.relay.registered
    lends.feed = _feed("first", "first", "first")
    lends.others["first"] = lends.relays["first"] = peer("first", remote=True)
    lends.instead = {"first": {"source": 8}}
    first.registered.feed, first.registered.takers = _feed(None, None, None), {"relay"}
    first.registered.others["relay"] = peer("relay", remote=True)
    three.source.registered.targets["first"] = three.source.registered.others["first"] = peer("first", remote=True)
    for end in (three.reader, three.relay, first):
        end.start("recv")
    three.source.start("send")
    three.carry()
    for end in (first, first, first):
        end.bus.copied()
        three.carry()
    while three.relay.bus.moves:
        three.relay.bus.copied()
    held = three.carry(hold=RelayRead)
    while three.reader.bus.moves:
        three.reader.bus.copied()
    held += three.carry(hold=RelayRead)
    assert (three.relay.state, three.reader.state) == (TransferState.ASKING, TransferState.ASKING)
    first.batch.cancel(TransferCancelledError("its worker does not wait"))
    three.carry()
    assert (three.relay.state, three.reader.state) == (TransferState.MOVING, TransferState.MOVING), "both again, from the sender"
    three.run()
    assert three.relay.outcome().peers.keys() == three.reader.outcome().peers.keys() == {"source[0]"}


def test_a_reader_that_is_lost_keeps_no_relay_waiting() -> None:
    three = _Three()
    three.lend()
    three.relay.hears(RegistrationClosed(batch_id="batch", closed="reader", target="relay", reason="killed", lost=True))
    assert three.relay.outcome().bytes == 8


class _Failing(CopyProgram):
    """Fails with a lost peer where it is told to."""

    def __init__(self, fails: bool, ran: list[int], count: int) -> None:
        self.fails, self.ran, self.count = fails, ran, count

    @property
    def nbytes(self) -> int:
        return self.count

    def run(self) -> int:
        if self.fails:
            raise PeerLostError("cut off")
        self.ran.append(self.count)
        return self.count


@pytest.mark.parametrize(("fails", "lost", "unfinished"), [({1}, {"relay"}, set()), ({1, 2}, {"relay"}, {1}), ({0}, set(), {0})])
def test_a_relay_that_fails_midway_is_done_without_in_the_same_run(fails: set[int], lost: set[str], unfinished: set[int]) -> None:
    """Programs: 0 is what is always read from the sender, 1 is read from the relay, 2 the same from the sender."""
    sender, relay = torch.zeros(1), torch.zeros(1)
    direct = Inflow(0, torch.ones(1), (0,), (0,), Move((sender,), torch.ones(1)))
    through = Inflow(1, torch.ones(1), (0,), (0,), Move((sender,), torch.ones(1)), 1, 0, Move((relay,), torch.ones(1)))
    ran: list[int] = []

    def prepare(moves: Sequence[Move]) -> CopyProgram:
        number = 1 if moves[0].sources[0] is relay else 0 if moves[0].target is direct.tensor else 2
        return _Failing(number in fails, ran, number)

    feed = Feed([Fed(direct), Fed(through, "relay")], lambda inflow: inflow.tensor, prepare)
    reading = feed.reading(0, {"relay"})
    if unfinished:
        with pytest.raises(PeerLostError):
            reading.run()
    else:
        reading.run()
        assert sorted(ran) == [0, 2]
    assert reading.lost == lost
    assert reading.unfinished() == unfinished


@pytest.mark.parametrize("shape", [(), (1,), (7,), (5, 3), (1, 4, 3), (3, 0)])
@pytest.mark.parametrize("nbytes", [4, 20, 1000])
def test_a_box_is_cut_into_ascending_parts(shape: tuple[int, ...], nbytes: int) -> None:
    source, lent = torch.arange(float(math.prod(shape))).reshape(shape), 1 + torch.arange(float(math.prod(shape))).flip(0).reshape(shape)
    whole = torch.zeros(tuple(size + 2 for size in shape))
    into = whole[tuple(slice(1, 1 + size) for size in shape)]
    inflow = Inflow(0, whole, (1,) * len(shape), (0,), Move((source,), into), 3, 0, Move((lent,), into))
    pieces = list(inflow.cut(nbytes))
    keys = [piece.key for piece in pieces]
    assert keys == sorted(set(keys))
    assert all(3 << 40 <= key < 4 << 40 for key in keys)
    for piece in pieces:
        assert piece.relayed is not None
        assert piece.within(whole).data_ptr() == piece.move.target.data_ptr()
        assert piece.within(whole).shape == piece.move.target.shape == piece.relayed.target.shape
        for move in (piece.move, piece.relayed):
            assert isinstance(move.sources[0], torch.Tensor)
            move.target.copy_(move.sources[0])
            assert torch.equal(move.target, move.sources[0])
    assert torch.equal(into, lent)
    assert whole.sum() == lent.sum()
