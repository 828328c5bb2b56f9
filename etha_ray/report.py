"""What a transfer did: bytes, seconds, and where the time went. In a line of text, in a terminal, and in a notebook."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING, Literal

import msgspec

if TYPE_CHECKING:
    from rich.console import Group

_SHOWN = 8
"""Peers that are shown, those with the most bytes first."""

_BAR = 48
"""Columns of the terminal's bar of spans."""

# Of the spans in turn, on a light and on a dark ground.
_HUES = (("#98a1ac", "#6c7681"), ("#0072b2", "#56b4e9"), ("#b34700", "#e69f00"), ("#00694c", "#4fd1a5"))

_STYLE = (
    ".etha-ray-report{font:14px/1.45 system-ui,sans-serif;color:#1a1d21;background:#fff;padding:12px 16px;max-width:640px;"
    "font-variant-numeric:tabular-nums}"
    ".etha-ray-report p{margin:0 0 8px}.etha-ray-report .bar{display:flex;height:14px;border-radius:4px;overflow:hidden;margin:0 0 6px}"
    ".etha-ray-report .bar i{display:block;min-width:1px}"
    ".etha-ray-report ul{display:flex;flex-wrap:wrap;gap:2px 18px;list-style:none;margin:0 0 8px;padding:0;font-size:13px}"
    ".etha-ray-report li i{display:inline-block;width:10px;height:10px;border-radius:2px;margin-right:6px}"
    ".etha-ray-report table{border-collapse:collapse;font-size:13px;margin:0}"
    ".etha-ray-report td{padding:1px 16px 1px 0;text-align:right;color:inherit;background:none}"
    ".etha-ray-report td:first-child{text-align:left}"
    + "".join(f".etha-ray-report .s{number}{{background:{light}}}" for number, (light, _) in enumerate(_HUES))
    + "@media(prefers-color-scheme:dark){.etha-ray-report{color:#e8eaed;background:#14171a}"
    + "".join(f".etha-ray-report .s{number}{{background:{dark}}}" for number, (_, dark) in enumerate(_HUES))
    + "}"
)


class Span(msgspec.Struct, frozen=True):
    """One stretch of a transfer's time, in seconds from its start."""

    name: str
    start: float
    seconds: float


class TransferReport(msgspec.Struct, frozen=True):
    """The outcome of one completed transfer of one batch, as one worker's agent saw it.

    Attributes:
        batch_id: the batch that was transferred.
        direction: "send" or "recv".
        bytes: bytes that this rank gave ("send") or got ("recv").
        seconds: from the agent taking the command to its completion, waiting for the other side included.
        move_seconds: of these, the seconds in which bytes moved; of a send, as its slowest receiver says.
        spans: where the time went, in order. Of a recv: "wait for senders", "move", and "ask senders" where bytes came from
            another host, and "swap in" if it was atomic. Of a send: "wait for receivers", "read by receivers".
        peers: bytes per member of the other side, by "name[index]".
        version: which version of the batch was sent or received; see `BatchHandler.version`.
    """

    batch_id: str
    direction: Literal["send", "recv"]
    bytes: int
    seconds: float
    move_seconds: float
    spans: tuple[Span, ...] = ()
    peers: dict[str, int] = {}
    version: int = 0

    @property
    def gb_per_s(self) -> float:
        """Bytes over the seconds in which they moved, in 1e9 bytes a second; 0 when nothing moved."""
        return self.bytes / self.move_seconds / 1e9 if self.move_seconds > 0 else 0.0

    def __str__(self) -> str:
        where = ", ".join(f"{span.name} {format_seconds(span.seconds)}" for span in self.spans)
        return f"{self._heading()} ({self.gb_per_s:.2f} GB/s while moving; {where or 'no spans'})"

    def __rich__(self) -> Group:
        """For rich's ``print``: a bar of where the time went, and the peers."""
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        bar, names = Text(), Text()
        for number, (span, columns) in enumerate(zip(self.spans, _columns(self.spans), strict=True)):
            style = ("bright_black", "blue", "yellow", "green")[number % len(_HUES)]
            bar.append("█" * columns, style)
            names.append("■ ", style).append(f"{span.name} {format_seconds(span.seconds)}   ")
        peers = Table.grid(padding=(0, 2))
        peers.add_column()
        peers.add_column(justify="right")
        for name, count in self._most():
            peers.add_row(Text(name, "dim"), count)
        heading = Text(self._heading(), "bold").append(f"  {self.gb_per_s:.2f} GB/s while moving", "default not bold")
        return Group(heading, *([bar, names] if self.spans else []), peers)

    def _repr_html_(self) -> str:
        """For notebooks: the same as `__rich__` shows."""
        hues = [f"s{number % len(_HUES)}" for number in range(len(self.spans))]
        shares = [span.seconds / self.seconds * 100 if self.seconds > 0 else 0.0 for span in self.spans]
        bar = "".join(f'<i class="{hue}" style="width:{share:.2f}%"></i>' for hue, share in zip(hues, shares, strict=True))
        names = "".join(
            f'<li><i class="{hue}"></i>{escape(span.name)} {format_seconds(span.seconds)}</li>'
            for hue, span in zip(hues, self.spans, strict=True)
        )
        peers = "".join(f"<tr><td>{escape(name)}</td><td>{escape(count)}</td></tr>" for name, count in self._most())
        return (
            f'<section class="etha-ray-report"><style>{_STYLE}</style>'
            f"<p><strong>{escape(self._heading())}</strong>, {self.gb_per_s:.2f} GB/s while moving</p>"
            f'<div class="bar">{bar}</div><ul>{names}</ul><table>{peers}</table></section>'
        )

    def _heading(self) -> str:
        return f"{self.direction} {self.batch_id} v{self.version}: {format_bytes(self.bytes)} in {format_seconds(self.seconds)}"

    def _most(self) -> list[tuple[str, str]]:
        """The peers with the most bytes, and how many are left out."""
        most = sorted(self.peers.items(), key=lambda peer: (-peer[1], peer[0]))
        shown = [(name, format_bytes(count)) for name, count in most[:_SHOWN]]
        rest = most[_SHOWN:]
        return [*shown, (f"{len(rest)} more", format_bytes(sum(count for _, count in rest)))] if rest else shown


def _columns(spans: tuple[Span, ...]) -> list[int]:
    """How many of the bar's columns each span gets: together all of them, and at least one where it took any time."""
    total = sum(span.seconds for span in spans)
    if total <= 0:
        return [0] * len(spans)
    columns = [max(1, round(span.seconds / total * _BAR)) if span.seconds > 0 else 0 for span in spans]
    columns[columns.index(max(columns))] += _BAR - sum(columns)
    return columns


def format_seconds(seconds: float) -> str:
    """Seconds as milliseconds below one, with two decimals."""
    if seconds == 0:
        return "0 s"
    return f"{seconds * 1e3:.2f} ms" if seconds < 1 else f"{seconds:.2f} s"


def format_bytes(count: int) -> str:
    """``count`` bytes in the largest decimal unit that keeps the number at or above 1."""
    value = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.2f} {unit}"
        value /= 1000
    return f"{value:.2f} TB"
