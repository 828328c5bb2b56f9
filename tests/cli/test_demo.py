"""`demo`: real processes, every byte checked."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from etha_ray.cli import app
from etha_ray.config import namespace_folders
from etha_ray.demo.roles import part


def test_the_demo_moves_the_model_and_leaves_nothing(tmp_path: Path) -> None:
    page = tmp_path / "demo.html"
    result = CliRunner().invoke(app, ["demo", "--steps", "2", "--width", "64", "--json", "--html", str(page)])
    assert result.exit_code == 0, result.output
    made = json.loads(result.stdout)
    assert made["exact"] is True
    assert [(sync["step"], sync["bytes"]) for sync in made["syncs"]] == [(1, 16 * 64 * 64 * 4), (2, 16 * 64 * 64 * 4)]
    # Half of the weights stay where they are; the others cross.
    assert made["syncs"][0]["receives"][0]["peers"] == {"trainer[0]": 8 * (64 * 64 * 4 // 2 + 32 * 32 * 4), "trainer[1]": 8 * 32 * 32 * 4}
    assert "agent 3 recv" in page.read_text()
    assert not [folder for folder in namespace_folders() if folder.name.startswith("demo-")]


def test_in_a_terminal_it_shows_report_and_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    result = CliRunner(env={"COLUMNS": "100"}).invoke(app, ["demo", "--steps", "1", "--width", "16"])
    assert result.exit_code == 0, result.output
    for words in ("sync 1: 16.38 kB", "every byte is right", "wait for senders", "2: S0  →  2: S1", "bytes by source"):
        assert words in result.stdout


def test_a_step_changes_every_number_of_every_weight() -> None:
    for layer in range(16):
        for side in ("trainer", "generator"):
            before, after = (part(side, layer, 1, 8, step) for step in (1, 2))  # type: ignore[arg-type]
            assert (before != after).all()
