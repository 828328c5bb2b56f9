"""How a transfer's report prints: as a line, in a terminal, in a notebook."""

from __future__ import annotations

import io
from html.parser import HTMLParser

import msgspec
from rich.console import Console

from etha_ray.report import Span, TransferReport, format_bytes, format_seconds

REPORT = TransferReport(
    "policy",
    "recv",
    3_000_000_000,
    2.0,
    0.5,
    (Span("wait for senders", 0.0, 1.5), Span("move", 1.5, 0.5)),
    {"trainer[0]": 1_000_000_000, "trainer[1]": 2_000_000_000},
    7,
)


def shown(report: TransferReport, width: int = 80) -> list[str]:
    console = Console(file=io.StringIO(), width=width, color_system=None)
    console.print(report)
    assert isinstance(console.file, io.StringIO)
    return [line.rstrip() for line in console.file.getvalue().splitlines()]


class Page(HTMLParser):
    """What tags are open, and the text outside of styles."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text = ""
        self.widths: list[float] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.open.append(tag)
        style = dict(attributes).get("style")
        if style:
            self.widths.append(float(style.removeprefix("width:").removesuffix("%")))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.text += data + " "


def test_a_line_says_how_much_how_fast_and_where_the_time_went() -> None:
    assert str(REPORT) == "recv policy v7: 3.00 GB in 2.00 s (6.00 GB/s while moving; wait for senders 1.50 s, move 500.00 ms)"
    assert str(TransferReport("x", "send", 0, 0.0, 0.0)) == "send x v0: 0 B in 0 s (0.00 GB/s while moving; no spans)"


def test_in_a_terminal_there_is_a_bar_of_the_spans_and_the_peers() -> None:
    heading, bar, names, *peers = shown(REPORT)
    assert heading == "recv policy v7: 3.00 GB in 2.00 s  6.00 GB/s while moving"
    assert bar == "█" * 48
    assert names == "■ wait for senders 1.50 s   ■ move 500.00 ms"
    assert [peer.split() for peer in peers] == [["trainer[1]", "2.00", "GB"], ["trainer[0]", "1.00", "GB"]]


def test_a_span_that_took_little_is_still_seen() -> None:
    report = msgspec.structs.replace(
        REPORT, spans=(Span("wait for senders", 0.0, 1e-6), Span("move", 0.0, 1.0), Span("ask senders", 1.0, 0.0))
    )
    assert shown(report)[1] == "█" * 48
    assert report.__rich__().renderables[1].spans[0].end == 1  # type: ignore[union-attr]


def test_of_many_peers_the_largest_are_shown_and_the_rest_summed() -> None:
    report = msgspec.structs.replace(REPORT, peers={f"t[{number}]": 1000 * (number + 1) for number in range(20)})
    lines = [line.split() for line in shown(report)[3:]]
    assert [line[0] for line in lines[:8]] == [f"t[{number}]" for number in range(19, 11, -1)]
    assert lines[8] == ["12", "more", "78.00", "kB"]


def test_in_a_notebook_it_is_well_formed_and_escaped() -> None:
    report = msgspec.structs.replace(REPORT, batch_id="<b>&policy", peers={"a<i>[0]": 5})
    page = Page(report._repr_html_())
    assert page.open == []
    assert "recv <b>&policy v7: 3.00 GB in 2.00 s" in page.text
    assert "a<i>[0] 5 B" in page.text
    assert page.widths == [75.0, 25.0]


def test_without_any_time_there_is_no_bar() -> None:
    nothing = TransferReport("x", "send", 0, 0.0, 0.0, (Span("wait for receivers", 0.0, 0.0),))
    assert shown(nothing)[1] == ""
    assert Page(nothing._repr_html_()).widths == [0.0]


def test_units() -> None:
    assert [format_bytes(count) for count in (0, 999, 1000, 10**6, 10**9, 10**13)] == [
        "0 B",
        "999 B",
        "1.00 kB",
        "1.00 MB",
        "1.00 GB",
        "10.00 TB",
    ]
    assert [format_seconds(seconds) for seconds in (0.0, 0.0015, 1.0, 75.5)] == ["0 s", "1.50 ms", "1.00 s", "75.50 s"]
