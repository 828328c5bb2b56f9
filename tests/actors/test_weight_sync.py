"""The main job as a user starts it."""

from __future__ import annotations

import re
import signal
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from actors import job, weight_sync
from actors.generator import CheckpointGenerator
from actors.model import ModelConfig, crossings
from actors.worker import Moved

from .application import Traces, read_until
from .conftest import Start
from .page import Page

VERSION = re.compile(r"^ +(\d+) +(\d+) +(\d\.\d{3}) +(\d\.\d{3}) +([\d,]+) +(\d+\.\d{4}) +([\d.]+) +(yes|no) *$", re.MULTILINE)


def test_the_main_job_trains_moves_uses_compares_and_reports(start: Start, tmp_path: Path) -> None:
    path = tmp_path / "new" / "report.html"
    process = start("actors.weight_sync", "--steps", "15", "--sync-every", "6", "--report", str(path))
    traces = Traces(process)
    output, _ = process.communicate(timeout=250)
    assert process.returncode == 0, output
    traces.assert_gone()

    rows = VERSION.findall(output)
    assert [(row[0], row[1], row[7]) for row in rows] == [("1", "6", "yes"), ("2", "12", "yes"), ("3", "15", "yes")]
    train, held_out = ([float(row[column]) for row in rows] for column in (2, 3))
    assert train[0] > train[1] > train[2] - 0.3
    assert train[0] > train[2]
    assert 5.0 > held_out[0] > held_out[2]
    size = sum(4 * torch.Size(each.shape).numel() for each in crossings(ModelConfig()))
    moved = [int(row[4].replace(",", "")) for row in rows]
    assert moved[0] == moved[1] == moved[2] >= size
    assert all(float(row[5]) > 0 and float(row[6]) > 0 for row in rows)

    page = Page(path.read_text(encoding="utf-8"))
    assert [row[1:4] for row in page.rows[1:]] == [list(row[1:4]) for row in rows]
    cells = [int(text.split(": ")[1].split()[0].replace(",", "")) for text in page.texts["title"] if " to generator" in text]
    assert len(cells) == 4
    assert sum(cells) == moved[0]
    assert len(page.texts["pre"]) == 3


def test_an_interrupt_ends_everything(start: Start) -> None:
    process = start("actors.weight_sync", "--steps", "1000", "--sync-every", "1", "--trainers", "1", "--generators", "1")
    traces = Traces(process)
    read_until(process, "Version 2:")
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Interrupted." in output
    assert "Traceback" not in output
    traces.assert_gone()


class FlippingGenerator(CheckpointGenerator):
    """The last generator flips one bit of what it received."""

    def sync(self) -> Moved:
        moved = super().sync()
        if self.seat.rank == self.seat.ranks - 1:
            self.weights["norm.weight"].view(torch.int32)[3] ^= 1
        return moved


@pytest.mark.slow
def test_a_flipped_bit_is_reported_and_fails_the_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    tensors = {"norm.weight": torch.rand(7), "fc1.weight": torch.rand(5, 7), "scale": torch.tensor(2.0)}
    safetensors.save_file(tensors, tmp_path / "model.safetensors")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(job, "CheckpointGenerator", FlippingGenerator)
    arguments = ["--model", str(tmp_path), "--steps", "2", "--sync-every", "1", "--report", str(tmp_path / "report.html")]
    ended = CliRunner().invoke(weight_sync.app, arguments)
    assert ended.exit_code == 1, ended.output
    assert ended.output.count("NOT bit-exact") == 2
    assert len(re.findall(r"norm\.weight: generator 1 has \w{32}, trainer 0 has \w{32}", ended.output)) == 2
    assert "other bits" in ended.output
    assert "fc1.weight" not in ended.output
    page = Page((tmp_path / "report.html").read_text(encoding="utf-8"))
    assert [row[-1] for row in page.rows[1:]] == ["no", "no"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "/nowhere/at/all"], "There is no checkpoint directory /nowhere/at/all."),
        (["--generators", "5"], "5 generators cannot share 12 attention heads evenly"),
        (["--report", "/tmp"], "The report cannot be written to /tmp"),
    ],
)
def test_what_cannot_be_done_is_told_in_one_line(arguments: list[str], message: str) -> None:
    ended = CliRunner().invoke(weight_sync.app, arguments)
    assert ended.exit_code == 2
    assert message in ended.output
    assert len(ended.output.strip().splitlines()) == 1


@pytest.mark.parametrize("arguments", [["--trainers", "0"], ["--generators", "0"], ["--steps", "0"], ["--sync-every", "0"]])
def test_numbers_out_of_range_are_refused(arguments: list[str]) -> None:
    assert CliRunner().invoke(weight_sync.app, arguments).exit_code == 2
