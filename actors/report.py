"""The main job's report: one HTML file that needs nothing beside it, in the reader's light or dark colour scheme."""

from __future__ import annotations

import math
from dataclasses import dataclass
from html import escape
from pathlib import Path
from statistics import median

from actors.charts import Bar, Series, bar_chart, heat_map, line_chart

_STYLE = Path(__file__).with_name("report.css")


@dataclass(frozen=True)
class VersionRow:
    """One version of the weights that crossed the bus.

    Losses are in nats per byte; None where the job trains nothing. `sample` is text that a generator wrote with this
    version.
    """

    version: int
    step: int
    train_loss: float | None
    held_out_loss: float | None
    nbytes: int
    seconds: float
    bit_exact: bool
    sample: str | None = None

    @property
    def gb_per_s(self) -> float:
        """1e9 bytes a second; 0 when no time was taken."""
        return self.nbytes / self.seconds / 1e9 if self.seconds > 0 else 0.0


@dataclass(frozen=True)
class ByteMap:
    """What one sync moves: `nbytes[i][j]` bytes go from `sources[i]` to `targets[j]`."""

    sources: tuple[str, ...]
    targets: tuple[str, ...]
    nbytes: tuple[tuple[int, ...], ...]

    @property
    def total(self) -> int:
        """Bytes of one sync."""
        return sum(sum(row) for row in self.nbytes)


@dataclass(frozen=True)
class RunSummary:
    """All that the report shows.

    `facts` are (label, value) pairs about what ran; `machine` is one line about where.
    """

    title: str
    subtitle: str
    facts: tuple[tuple[str, str], ...]
    versions: tuple[VersionRow, ...]
    byte_map: ByteMap
    machine: str


def write_report(path: str | Path, run: RunSummary) -> Path:
    """Write `run` as one self-contained UTF-8 HTML file and return its path; folders that are missing are made.

    Raises OSError when the file cannot be written, ValueError when `run` has no versions.
    """
    if not run.versions:
        raise ValueError("A report needs at least one version, and this run synced none.")
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(_page(run), encoding="utf-8")
    return target


def format_bytes(count: float) -> str:
    """Bytes with three significant digits in a decimal unit, such as `5.69 MB`."""
    unit, size = _byte_unit(count)
    return f"{format_number(count / size)} {unit}"


def format_seconds(seconds: float) -> str:
    """Seconds with three significant digits as µs, ms or s."""
    unit, size = _time_unit(seconds)
    return f"{format_number(seconds / size)} {unit}"


def format_number(value: float) -> str:
    """Three significant digits, at most three decimals: `0.615`, `1.96`, `12.7`, `480`."""
    if value == 0:
        return "0"
    decimals = 2 - math.floor(math.log10(abs(value)))
    return f"{value:.{min(max(decimals, 0), 3)}f}"


def _byte_unit(count: float) -> tuple[str, float]:
    return next(((unit, size) for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)) if count >= size), ("B", 1.0))


def _time_unit(seconds: float) -> tuple[str, float]:
    return next(((unit, size) for unit, size in (("s", 1.0), ("ms", 1e-3)) if seconds >= size), ("µs", 1e-6))


def _page(run: RunSummary) -> str:
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{escape(run.title)}</title>
<style>
{_STYLE.read_text(encoding="utf-8")}</style>
</head>
<body>
<main>
{_header(run)}
<div class="charts">{_loss_section(run)}{_seconds_section(run)}</div>
{_byte_map_section(run.byte_map)}
{_table_section(run)}
{_samples_section(run)}
<footer>{escape(run.machine)}</footer>
</main>
</body>
</html>
"""


def _header(run: RunSummary) -> str:
    exact, total = sum(row.bit_exact for row in run.versions), len(run.versions)
    figures = [
        ("Bit-exact versions", f"{exact} of {total}", "good" if exact == total else "bad"),
        ("Moved per version", format_bytes(run.versions[-1].nbytes), ""),
        ("Median sync", format_seconds(median(row.seconds for row in run.versions)), ""),
        ("Median speed", f"{format_number(median(row.gb_per_s for row in run.versions))} GB/s", ""),
    ]
    held_out = [row.held_out_loss for row in run.versions if row.held_out_loss is not None]
    if held_out:
        figures.append(("Held-out loss", f"{held_out[0]:.2f} → {held_out[-1]:.2f}", ""))
    tiles = "".join(
        f'<div class="tile"><dt>{escape(label)}</dt><dd class="{style}">{escape(value)}</dd></div>' for label, value, style in figures
    )
    facts = "".join(f"<div><dt>{escape(label)}</dt><dd>{escape(value)}</dd></div>" for label, value in run.facts)
    return (
        f'<header><h1>{escape(run.title)}</h1><p class="lead">{escape(run.subtitle)}</p>'
        f'<dl class="tiles">{tiles}</dl><dl class="facts">{facts}</dl></header>'
    )


def _section(title: str, note: str, body: str) -> str:
    return f'<section><h2>{escape(title)}</h2><p class="note">{escape(note)}</p>{body}</section>'


def _loss_section(run: RunSummary) -> str:
    trained = tuple((row.version, row.train_loss) for row in run.versions if row.train_loss is not None)
    held_out = tuple((row.version, row.held_out_loss) for row in run.versions if row.held_out_loss is not None)
    if not trained and not held_out:
        return ""
    chart = line_chart(
        "Loss of trainers and generators by version",
        "loss (nats per byte)",
        [Series("train", "trainers, training text", trained), Series("held", "generators, held-out text", held_out)],
    )
    return _section("Loss", "Both sides at each version; the generators use the weights that arrived.", chart)


def _seconds_section(run: RunSummary) -> str:
    unit, size = _time_unit(max(row.seconds for row in run.versions))
    bars = [
        Bar(
            version=row.version,
            value=row.seconds / size,
            above=f"{row.gb_per_s:.{1 if row.gb_per_s >= 1 else 2}f}",
            detail=f"version {row.version}: {format_seconds(row.seconds)}, {format_number(row.gb_per_s)} GB/s",
        )
        for row in run.versions
    ]
    chart = bar_chart("Duration of each sync by version", f"time ({unit})", "GB/s", bars)
    return _section("Time per sync", "Until every generator holds the whole version.", chart)


def _byte_map_section(byte_map: ByteMap) -> str:
    cells = [[(count, format_bytes(count) if count else "none") for count in row] for row in byte_map.nbytes]
    chart = heat_map("Bytes from each source to each target", byte_map.sources, byte_map.targets, cells)
    note = f"Rows send, columns receive: {format_bytes(byte_map.total)} in one version."
    return _section("Who sends what to whom", note, f'<div class="scroll">{chart}</div>')


def _table_section(run: RunSummary) -> str:
    byte_unit, byte_size = _byte_unit(max(row.nbytes for row in run.versions))
    time_unit, time_size = _time_unit(max(row.seconds for row in run.versions))
    with_loss = any(row.train_loss is not None or row.held_out_loss is not None for row in run.versions)
    loss_heads = ["Step", "Train loss", "Held-out loss"] if with_loss else []
    heads = ["Version", *loss_heads, f"Size ({byte_unit})", f"Time ({time_unit})", "GB/s", "Bit-exact"]
    lines = []
    for row in run.versions:
        losses = [str(row.step), _loss(row.train_loss), _loss(row.held_out_loss)] if with_loss else []
        size, time = format_number(row.nbytes / byte_size), format_number(row.seconds / time_size)
        cells = [str(row.version), *losses, size, time, format_number(row.gb_per_s)]
        exact = '<td class="good">yes</td>' if row.bit_exact else '<td class="bad">no</td>'
        lines.append("<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + exact + "</tr>\n")
    head = "".join(f'<th scope="col">{escape(title)}</th>' for title in heads)
    table = f"<table><thead><tr>{head}</tr></thead>\n<tbody>\n{''.join(lines)}</tbody></table>"
    note = "Bit-exact: the hash of every tensor is the same on both sides."
    return _section("Versions", f"Losses in nats per byte. {note}" if with_loss else note, f'<div class="scroll">{table}</div>')


def _loss(loss: float | None) -> str:
    return "" if loss is None else f"{loss:.3f}"


def _samples_section(run: RunSummary) -> str:
    samples = "".join(
        f'<li><span class="tag">version {row.version}</span><pre>{escape(_printable(row.sample))}</pre></li>\n'
        for row in run.versions
        if row.sample is not None
    )
    if not samples:
        return ""
    note = "Written by the generators from nothing, byte by byte, with the weights of each version."
    return _section("Samples", note, f'<ol class="samples">\n{samples}</ol>')


def _printable(text: str) -> str:
    """Control characters as middle dots, which every font has; line feeds stay."""
    return "".join(char if char == "\n" or char.isprintable() else "·" for char in text)
