from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest

from actors.report import ByteMap, RunSummary, VersionRow, format_bytes, format_number, format_seconds, write_report

from .page import Page


def _run(versions: int = 4) -> RunSummary:
    rows = tuple(
        VersionRow(
            version=index,
            step=20 * index,
            train_loss=5.5 - 0.5 * index,
            held_out_loss=5.6 - 0.5 * index,
            nbytes=7_800_000,
            seconds=0.004 + 0.001 * index,
            bit_exact=index != 2,
            sample="the </pre><script>alert(1)</script>\x07 & more" if index == 1 else "the statement",
        )
        for index in range(versions)
    )
    return RunSummary(
        title="Trainers & <generators>",
        subtitle='A "model" crosses',
        facts=(("Trainers", "2 <b>"), ("Steps", "60")),
        versions=rows,
        byte_map=ByteMap(("trainer 0", "trainer 1"), ("generator 0", "<g> 1"), ((2_000_000, 0), (1_000_000, 2_500_000))),
        machine="2 CPUs & 24 GB",
    )


def _write(tmp_path: Path, run: RunSummary) -> tuple[str, Page]:
    source = write_report(tmp_path / "new" / "report.html", run).read_text(encoding="utf-8")
    return source, Page(source)


def test_table_has_a_row_a_version(tmp_path: Path) -> None:
    _, page = _write(tmp_path, _run())
    head, *rows = page.rows
    assert head == ["Version", "Step", "Train loss", "Held-out loss", "Size (MB)", "Time (ms)", "GB/s", "Bit-exact"]
    assert rows[0] == ["0", "0", "5.500", "5.600", "7.80", "4.00", "1.95", "yes"]
    assert rows[2] == ["2", "40", "4.500", "4.600", "7.80", "6.00", "1.30", "no"]
    assert len(rows) == 4


def test_text_is_escaped(tmp_path: Path) -> None:
    source, page = _write(tmp_path, _run())
    assert page.texts["h1"] == ["Trainers & <generators>"]
    assert page.texts["pre"][1] == "the </pre><script>alert(1)</script>· & more"
    assert page.texts["footer"] == ["2 CPUs & 24 GB"]
    assert "<g> 1" in page.texts["text"]
    assert "script" not in page.texts
    assert "\x07" not in source


def test_page_needs_nothing_beside_it(tmp_path: Path) -> None:
    source, page = _write(tmp_path, _run())
    assert re.search(r"https?:|//[a-z]|@import|url\(", source) is None
    assert not {"src", "href", "srcset", "onload"} & {name for _, attrs in page.elements for name in attrs}
    assert {tag for tag, _ in page.elements}.isdisjoint({"script", "link", "img", "iframe", "object"})
    assert "prefers-color-scheme: dark" in source
    assert ("meta", {"charset": "utf-8"}) in page.elements


def test_charts_show_every_version_on_wide_and_narrow_screens(tmp_path: Path) -> None:
    source, page = _write(tmp_path, _run())
    assert page.count("svg", "wide") == page.count("svg", "narrow") == 2
    assert page.count("polyline", "line") == 2 * 2
    assert page.count("rect", "bar") == 2 * 4
    assert page.count("rect", "cell") == 4
    assert source.count("<title>version 3: 7.00 ms, 1.11 GB/s</title>") == 2
    assert "trainer 0 to generator 0: 2,000,000 bytes" in page.texts["title"]
    assert {"2.00 MB", "none", "1.00 MB", "2.50 MB"} <= set(page.texts["text"])


def test_bars_stand_on_zero(tmp_path: Path) -> None:
    _, page = _write(tmp_path, _run(2))
    bars = [attrs for tag, attrs in page.elements if tag == "rect" and attrs.get("class") == "bar"][:2]
    first, second = (float(bar["height"] or 0) for bar in bars)
    assert second / first == pytest.approx(5 / 4, rel=0.01)
    assert len({round(float(bar["y"] or 0) + float(bar["height"] or 0)) for bar in bars}) == 1


@pytest.mark.parametrize("versions", [1, 2, 60])
def test_any_number_of_versions_keeps_text_inside_the_chart(tmp_path: Path, versions: int) -> None:
    run = _run(versions)
    flat = tuple(dataclasses.replace(row, train_loss=2.5, held_out_loss=2.5) for row in run.versions)
    _, page = _write(tmp_path, dataclasses.replace(run, versions=flat))
    assert len(page.rows) == versions + 1
    numbers = [attrs for tag, attrs in page.elements if tag == "text" and attrs.get("class") in ("axis", "value")]
    assert all(0 <= float(attrs["x"] or 0) <= 540 and 0 <= float(attrs["y"] or 0) <= 280 for attrs in numbers)


def test_run_without_training_leaves_losses_and_samples_out(tmp_path: Path) -> None:
    run = _run()
    rows = tuple(dataclasses.replace(row, train_loss=None, held_out_loss=None, sample=None) for row in run.versions)
    source, page = _write(tmp_path, dataclasses.replace(run, versions=rows))
    assert page.rows[0] == ["Version", "Size (MB)", "Time (ms)", "GB/s", "Bit-exact"]
    assert page.texts["h2"] == ["Time per sync", "Who sends what to whom", "Versions"]
    assert "polyline" not in source


def test_headline_counts_the_bit_exact_versions(tmp_path: Path) -> None:
    _, page = _write(tmp_path, _run())
    assert "3 of 4" in page.texts["dd"]
    assert "5.60 → 4.10" in page.texts["dd"]


def test_report_without_versions_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at least one version"):
        write_report(tmp_path / "report.html", dataclasses.replace(_run(), versions=()))


def test_numbers_keep_three_digits() -> None:
    assert [format_number(value) for value in (0, 0.6149, 1.957, 12.71, 480.2)] == ["0", "0.615", "1.96", "12.7", "480"]
    assert [format_bytes(value) for value in (12, 5_687_808, 90_868_384)] == ["12.0 B", "5.69 MB", "90.9 MB"]
    assert [format_seconds(value) for value in (2.5e-5, 0.0039, 1.25)] == ["25.0 µs", "3.90 ms", "1.25 s"]
