"""The command line: `explain`, and what all commands share. The benchmarks have tests of their own."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner, Result

from etha_ray.cli import app

EXAMPLE = ("--source", "4x2: S0,S1", "--target", "8: R", "--shape", "4096x1024")


def explain(*arguments: str, width: int = 80) -> Result:
    return CliRunner(env={"COLUMNS": str(width), "TERM": "xterm-256color", "NO_COLOR": "1"}).invoke(app, ["explain", *arguments])


def test_explain_is_readable_at_80_columns() -> None:
    result = explain(*EXAMPLE)
    assert result.exit_code == 0, result.output
    lines = [line.rstrip() for line in result.stdout.splitlines()]
    assert lines[0] == "4x2: S0,S1  →  8: R, 4096x1024 of 2 bytes an element"
    assert "path    2 hops at most; 1 target passes on 58.72 MB to 7 others: 0 → 1, 0 → 2, 0" in lines
    assert "time    168 µs, as host0 sends 8.39 MB" in lines
    assert "bytes by source rank (rows) and target rank (columns)" in lines
    assert lines[-1] == "7  1.05 MB  1.05 MB  1.05 MB  1.05 MB  1.05 MB  1.05 MB  1.05 MB  1.05 MB"
    assert max(map(len, lines)) <= 80


@pytest.mark.parametrize("width", [60, 80, 200])
def test_many_ranks_fit_any_terminal(width: int) -> None:
    result = explain("--source", "16x16: S0,S0", "--target", "16x8: R,S0", "--shape", "2048x64", width=width)
    assert result.exit_code == 0, result.output
    assert max(len(line.rstrip()) for line in result.stdout.splitlines()) <= width


def test_a_terminal_that_is_too_narrow_for_the_table_is_told_so() -> None:
    result = explain("--source", "2: S0", "--target", "2: S1", "--shape", "2000x2000", width=16)
    assert result.exit_code == 0, result.output
    assert "too narrow" in result.stdout


def test_options_change_the_numbers() -> None:
    result = explain(*EXAMPLE, "--dtype", "float32", "--gpus-per-host", "16", "--bandwidth", "25", "--json")
    data = json.loads(result.stdout)
    assert data["bytes"] == 2 * 67_108_864
    assert data["bytes_between_hosts"] == 0
    assert data["bandwidth"] == 25e9


def test_json_is_one_object_and_nothing_else() -> None:
    result = explain(*EXAMPLE, "--json")
    data = json.loads(result.stdout)
    assert data["source"]["layout"] == "4x2: S0,S1"
    assert len(data["pairs"]) == 64
    assert data["seconds"] == pytest.approx(8_388_608 / 50e9)


def test_a_scalar_has_an_empty_shape() -> None:
    result = explain("--source", "2: R", "--target", "1: R", "--shape", "", "--json")
    assert json.loads(result.stdout)["shape"] == []


def test_pictures_are_saved(tmp_path: Path) -> None:
    for name in ("made.svg", "made.html"):
        result = explain(*EXAMPLE, "--save", str(tmp_path / name))
        assert result.exit_code == 0, result.output
        assert "pictures are in" in result.stdout
        assert "<svg " in (tmp_path / name).read_text()


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"--source": "4x2 S0,S1"}, "--source: '4x2 S0,S1' is not a layout: write mesh sizes, a colon, and placements"),
        ({"--target": "8: X"}, "--target: 'X' is not a placement: supported are Shard(dim)"),
        ({"--target": "8: R,R"}, "2 placements [R, R] do not fit the mesh (8,) of 1 dimensions"),
        ({"--shape": "4096,1024"}, "--shape: '4096,1024' is not a shape"),
        ({"--source": "4x2: S0,S2"}, "shard dimension 2"),
        ({"--target": "8: P(sum)"}, "Partial is for sources"),
        ({"--dtype": "bfloat61"}, "--dtype: dtype 'bfloat61' is not known"),
        ({"--bandwidth": "0"}, "bandwidth is 0.0"),
        ({"--gpus-per-host": "0"}, "gpus_per_host is 0"),
        ({"--save": "made.pdf"}, "ends in .svg, .png or .html"),
    ],
)
def test_bad_input_ends_with_code_2_and_says_what_is_accepted(changed: dict[str, str], says: str) -> None:
    arguments = {EXAMPLE[0]: EXAMPLE[1], EXAMPLE[2]: EXAMPLE[3], EXAMPLE[4]: EXAMPLE[5], **changed}
    result = explain(*(part for pair in arguments.items() for part in pair), width=300)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert says in result.stderr


def test_a_file_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    result = explain(*EXAMPLE, "--save", str(tmp_path / "nowhere" / "made.svg"))
    assert result.exit_code == 1
    assert "error: " in result.stderr
    assert "nowhere" in result.stderr.replace("\n", "")


def test_a_missing_library_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "PIL", None)
    result = explain(*EXAMPLE, "--save", str(tmp_path / "made.png"), width=200)
    assert result.exit_code == 1
    assert "pip install 'etha-ray[plot]'" in result.stderr


def test_help_has_an_example() -> None:
    result = explain("--help", width=120)
    assert 'etha-ray explain --source "4x2: S0,S1" --target "8: R" --shape 4096x1024' in result.stdout


def commands(group: Any, words: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from commands(command, (*words, name))
        else:
            yield (*words, name)


@pytest.mark.parametrize("words", list(commands(typer.main.get_command(app))), ids=" ".join)
def test_the_help_of_each_command_has_an_example(words: tuple[str, ...]) -> None:
    result = CliRunner().invoke(app, [*words, "--help"], env={"COLUMNS": "120"})
    assert result.exit_code == 0
    assert f"Example: etha-ray {' '.join(words)}" in result.stdout or " ".join(words) in result.stdout.partition("Example: ")[2]


def test_the_installed_command_and_the_module_are_the_same() -> None:
    def run(*command: str) -> dict[str, Any]:
        done = subprocess.run([*command, "explain", *EXAMPLE, "--json"], capture_output=True, text=True, check=True)
        found: dict[str, Any] = json.loads(done.stdout)
        return found

    assert run(str(Path(sys.executable).with_name("etha-ray"))) == run(sys.executable, "-m", "etha_ray.cli")
