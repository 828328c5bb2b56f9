"""Who makes digests together uses what was added up for calls of the same time, in whatever order messages and timeouts come."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

from hypothesis import example, given
from hypothesis import strategies as st

from etha_ray.tensor_bus.commands import MakeDigest
from etha_ray.tensor_bus.digesting import Digesting

RANKS = 3


@dataclass
class Try:
    """One call at a rank: when it was under way, and whose tries its digest is of."""

    rank: int
    began: int
    ended: int | None = None
    made_of: dict[int, int] | None = None


@dataclass
class Ranks:
    """The ranks of a side, whose messages arrive when they are told to, in the order of their link."""

    tries: list[Try] = field(default_factory=list)
    links: dict[tuple[int, int], deque[Any]] = field(default_factory=lambda: defaultdict(deque))
    now: int = 0

    def __post_init__(self) -> None:
        self.open: list[int | None] = [None] * RANKS  # the number of each rank's call under way
        self.digesting = [Digesting(self._member(rank)) for rank in range(RANKS)]

    def _member(self, rank: int) -> Any:
        bus = SimpleNamespace(
            answer=lambda _, value: self._end(rank, value),
            refuse=lambda *_: self._end(rank, None),
            move=lambda program, done: (program.run(), done(SimpleNamespace(error=None))),
            tell=lambda agent, message: self.links[rank, agent].append(message),
        )
        others = {str(each): SimpleNamespace(member=SimpleNamespace(agent=each)) for each in range(RANKS) if each != rank}
        held = SimpleNamespace(
            pair_name="pair",
            members=[str(each) for each in range(RANKS)],
            partial=lambda: None,
            added_up=lambda: str(self.open[rank]).encode(),
            digests=lambda parts, own: {0: {int(member): int(parts[member]) for member in parts}},
        )
        registered = SimpleNamespace(side=list(others), others=others, digested=[held])
        return SimpleNamespace(bus=bus, registered=registered, registration=str(rank), batch_id="b", transfer=None, name=str)

    def _end(self, rank: int, value: list[dict[int, int]] | None) -> None:
        number = self.open[rank]
        assert number is not None
        self.open[rank] = None
        self.tries[number].ended = self.now
        self.tries[number].made_of = value and value[0]

    def ask(self, rank: int) -> None:
        """The rank's worker asks, if it does not wait already."""
        if self.open[rank] is None:
            self.open[rank] = len(self.tries)
            self.tries.append(Try(rank, self.now))
            self.digesting[rank].ask(MakeDigest("b", timeout=1e9, command_id=len(self.tries)))

    def expire(self, rank: int) -> None:
        """Its time is up."""
        self.digesting[rank].expire(float("inf"))

    def give_up(self, rank: int) -> None:
        """Its worker does not wait any more."""
        if (number := self.open[rank]) is not None:
            self.digesting[rank].give_up(number + 1)
            self._end(rank, None)

    def deliver(self, source: int, target: int) -> None:
        """The oldest message of a link arrives, if there is one."""
        if self.links[source, target]:
            self.digesting[target].on_part(self.links[source, target].popleft())

    def deliver_all(self) -> None:
        while links := [link for link, messages in self.links.items() if messages]:
            for link in links:
                self.deliver(*link)


RANK = st.integers(0, RANKS - 1)
STEPS = st.lists(
    st.one_of(
        st.tuples(st.sampled_from([Ranks.ask, Ranks.ask, Ranks.expire, Ranks.give_up]), st.tuples(RANK)),
        *[st.tuples(st.just(Ranks.deliver), st.tuples(RANK, RANK))] * 2,
    ),
    max_size=120,
)
Steps = Sequence[tuple[Callable[..., None], tuple[int, ...]]]


def play(steps: Steps) -> Ranks:
    ranks = Ranks()
    for call, arguments in steps:
        ranks.now += 1
        call(ranks, *arguments)
    return ranks


CROSSING: Steps = [
    *[(Ranks.ask, (rank,)) for rank in range(RANKS)],
    *[(Ranks.deliver, (source, target)) for source, target in ((0, 1), (0, 2), (1, 2), (2, 1))],
    (Ranks.expire, (0,)),  # what it said is heard, what it should hear is not yet
    *[(Ranks.deliver, (source, 0)) for source in (1, 2)],
    (Ranks.ask, (0,)),
]


@given(STEPS)
@example(CROSSING)
def test_a_digest_is_made_of_calls_that_were_under_way_together(steps: Steps) -> None:
    ranks = play(steps)
    for each in ranks.tries:
        for rank, number in (each.made_of or {}).items():
            part = ranks.tries[number]
            assert part.rank == rank
            assert part.ended is None or part.ended >= each.began, (part, each)


@given(STEPS)
def test_after_whatever_came_before_all_that_ask_have_the_same(steps: Steps) -> None:
    ranks = play(steps)
    for rank in range(RANKS):
        ranks.give_up(rank)
    ranks.deliver_all()
    for _ in range(2):
        ranks.now += 1
        numbers = {}
        for rank in range(RANKS):
            numbers[rank] = len(ranks.tries)
            ranks.ask(rank)
        ranks.deliver_all()
        assert [each.made_of for each in ranks.tries[-RANKS:]] == [numbers] * RANKS


@given(STEPS)
def test_without_a_timeout_the_same_calls_belong_together(steps: Steps) -> None:
    """However far one rank is ahead of another: all of the first calls, all of the second, and so on."""
    ranks = play([step for step in steps if step[0] not in (Ranks.expire, Ranks.give_up)])
    ranks.deliver_all()
    counted: list[list[int]] = [[number for number, each in enumerate(ranks.tries) if each.rank == rank] for rank in range(RANKS)]
    for calls in zip(*counted, strict=False):
        for number in calls:
            assert ranks.tries[number].made_of == dict(enumerate(calls))
