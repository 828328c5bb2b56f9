"""Agents' words summed up: syncs, rows, problems; in a terminal and as a page."""

from __future__ import annotations

import io
import json
from html.parser import HTMLParser

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from etha_ray.status import Overview, overview, page, shown
from etha_ray.status.syncs import syncs
from etha_ray.tensor_bus.inspection import SeenAgent
from etha_ray.tensor_bus.snapshot import TransferStatus
from tests.status.seen import BEGAN, agent, batch, failure, pair, pool, transfer


def look(agents: list[SeenAgent]) -> Overview:
    return overview("training", agents, BEGAN + 10)


class TestSyncs:
    def test_sends_and_receives_that_met_are_one_sync(self) -> None:
        first, second, alone = syncs(pool())
        assert [(part.agent, part.past.direction) for part in first.parts] == [(0, "send"), (1, "send"), (2, "recv"), (3, "recv")]
        assert (first.bytes, first.move_seconds, first.gb_per_s) == (4000, 0.5, pytest.approx(8e-6))
        assert (second.began, second.ended) == (BEGAN + 4.0, BEGAN + 4.85)
        assert alone.failed
        assert not first.failed

    def test_batches_that_are_synced_at_the_same_time_stay_apart(self) -> None:
        agents = [
            agent(0, transfer("send", "a", ["b"]), transfer("send", "c", ["d"], batch_id="other")),
            agent(1, transfer("recv", "b", ["a"]), transfer("recv", "d", ["c"], batch_id="other")),
        ]
        assert sorted((sync.batch_id, len(sync.parts)) for sync in syncs(agents)) == [("other", 2), ("policy", 2)]

    def test_where_only_senders_are_known_their_bytes_count(self) -> None:
        (sync,) = syncs([agent(0, transfer("send", "a", ["b", "c"]))])
        assert sync.bytes == 2000

    @given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5), st.integers(1, 3)), max_size=30))
    def test_each_transfer_is_in_exactly_one_sync(self, edges: list[tuple[int, int, int]]) -> None:
        agents = [
            agent(side, *(transfer(what, f"{what}{ends[side]}", [f"{other}{ends[1 - side]}"], sequence=step) for *ends, step in edges))
            for side, (what, other) in enumerate((("send", "recv"), ("recv", "send")))
        ]
        found = syncs(agents)
        assert sum(len(sync.parts) for sync in found) == 2 * len(edges)
        keys = [{flow.key for part in sync.parts for flow in part.past.flows} for sync in found]
        assert sum(map(len, keys)) == len(set().union(*keys)), "a flow joins all that have a part in it"


class TestRows:
    def test_a_pool_in_rows(self) -> None:
        found = look(pool())
        assert found.problems == []
        assert [(row.rank, row.sent, row.received, row.failed, row.bytes_received) for row in found.agents] == [
            (0, 2, 0, 0, 0),
            (1, 2, 0, 0, 0),
            (2, 0, 2, 0, 4000),
            (3, 0, 2, 1, 4000),
        ]
        (row,) = found.pairs
        assert [(side.name, side.workers, side.layout) for side in row.sides] == [("generator", 2, "2: S0"), ("trainer", 2, "2: S0")]
        (policy,) = found.batches
        assert (policy.workers, policy.state, policy.transfers, policy.version) == (4, "ready", 3, 2)
        assert (policy.bytes, policy.seconds) == (4000, pytest.approx(0.85))
        assert [(sync.batch_id, sync.version, sync.workers, sync.error) for sync in found.syncs] == [
            ("policy", 1, 4, ""),
            ("policy", 2, 4, ""),
            ("policy", 0, 1, "TransferTimeoutError: t0 did <not> send"),
        ]
        assert json.loads(json.dumps(found.as_dict()))["batches"][0]["gb_per_s"] == pytest.approx(8e-6)

    def test_what_waits_says_for_whom(self) -> None:
        waiting = TransferStatus("recv", "waiting", BEGAN, "trainer[1] did not send")
        found = look(
            [
                agent(
                    0, pairs=(pair("a", "b", "matching", "nobody of 'b' has come"),), batches=(batch("registering", "'b' lacks index [0]"),)
                ),
                agent(1, batches=(batch(transfer=waiting),)),
            ]
        )
        assert [(row.state, row.waits_for) for row in found.pairs] == [("matching", "nobody of 'b' has come")]
        assert found.batches[0].state == "registering"
        assert found.batches[0].waits == ["agent 0 registers: 'b' lacks index [0]", "agent 1 recv: trainer[1] did not send"]

    def test_a_torn_batch_says_why(self) -> None:
        found = look([agent(0, batches=(batch(version=0, torn="a[0] died"),)), agent(1, batches=(batch(),))])
        assert (found.batches[0].version, found.batches[0].waits) == (2, ["agent 0: torn, a[0] died"])

    def test_agents_that_are_not_well_are_problems_with_a_remedy(self) -> None:
        stuck = msgspec.structs.replace(agent(1, life="stuck"), beat_age=61.0)
        found = look([agent(0, life="dead"), stuck, agent(2, life="unreachable"), agent(3)])
        dead, old, away = found.problems
        assert "agent 0 was killed" in dead
        assert "etha-ray down" in dead
        assert "agent 1 runs, and its loop has not turned for 61 s" in old
        assert "agent 2 does not answer" in away


def printed(found: Overview, width: int = 120) -> str:
    console = Console(file=io.StringIO(), width=width, color_system=None)
    console.print(shown(found))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


class TestText:
    def test_everything_has_its_line(self) -> None:
        said = printed(look(pool()))
        for words in (
            "pool 'training': 4 of 4 agents running",
            "generator 2: S0 ↔ trainer 2: S0",
            "4.00 kB in 850.00 ms",
            "TransferTimeoutError: t0 did <not> send",
        ):
            assert words in said

    @pytest.mark.parametrize("width", [60, 80, 200])
    def test_it_fits_the_terminal(self, width: int) -> None:
        assert max(map(len, printed(look(pool()), width).splitlines())) <= width

    def test_an_empty_pool(self) -> None:
        assert printed(look([])).strip() == "pool 'training': 0 of 0 agents running"


class _Page(HTMLParser):
    """Checks that tags close in order, and keeps what a reader sees."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.words: list[str] = []
        self.bars: list[tuple[str, float, float]] = []
        self.loaded: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        given = dict(attributes)
        self.loaded += [value or "" for name, value in attributes if name in ("src", "href")]
        style = given.get("style")
        if tag == "i" and style:
            left, width = (float(part.split(":")[1].removesuffix("%")) for part in style.split(";"))
            self.bars.append((given.get("class") or "", left, width))
        if tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open and data.strip():
            self.words.append(data.strip())


class TestPage:
    def test_it_is_well_formed_needs_nothing_and_says_it_all(self) -> None:
        agents = pool()
        seen = _Page(page(look(agents), agents))
        assert seen.loaded == []
        for words in ("etha_ray pool training", "4 of 4", "Last sync of policy", "host<1>", "2: S0 ↔ 2: S0", "agent 3 recv"):
            assert any(words in each for each in seen.words), words
        assert "Errors" not in seen.words, "there are none: the column is left out"

    def test_the_last_sync_is_drawn_to_scale(self) -> None:
        agents = [*pool()[:2], agent(2, transfer("recv", "g0", ["t0", "t1"], sequence=2, began=4.1, waited=0.05, moved=0.7))]
        drawn = _Page(page(look(agents), agents)).bars
        # From 4.0 to 4.85: the first sender waits 0.25 s and is read for 0.5, the second is a tenth later.
        assert [(kind, round(left), round(width)) for kind, left, width in drawn] == [
            ("wait", 0, 29),
            ("read", 29, 59),
            ("wait", 12, 29),
            ("read", 41, 59),
            ("wait", 12, 6),
            ("move", 18, 82),
        ]

    def test_failures_and_problems_are_said(self) -> None:
        agents = [agent(0, failure("g"), life="dead")]
        seen = _Page(page(look(agents), agents))
        assert [kind for kind, *_ in seen.bars] == ["failed"]
        assert any("was killed" in each for each in seen.words)
        assert "TransferTimeoutError: t0 did <not> send" in seen.words

    def test_an_empty_pool_says_how_to_start_one(self) -> None:
        assert any("etha-ray up" in each for each in _Page(page(look([]), [])).words)
