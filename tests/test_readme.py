"""The README's code runs as written."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from etha_ray.config import agent_paths

README = Path(__file__).parent.parent / "README.md"
EXECUTED = "<!-- executed by tests/test_readme.py -->\n"


def blocks() -> list[tuple[str, str]]:
    """(language, code) of the blocks that README.md says are executed here."""
    return re.findall(re.escape(EXECUTED) + r"```(\w+)\n(.*?)```", README.read_text(), flags=re.DOTALL)


def environment() -> dict[str, str]:
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return {**os.environ, "PATH": path, "PYTHONPATH": str(README.parent)}


def default_pool_is_free() -> bool:
    return not any(Path(agent_paths(rank).state).exists() for rank in range(4))


def wait_for_default_pool() -> None:
    """The README uses the default namespace, which another run on this machine may have for a moment."""
    deadline = time.monotonic() + 60
    while not default_pool_is_free():
        if time.monotonic() > deadline:
            pytest.fail(f"{agent_paths(0).state} is there: another pool runs in the default namespace; shut it down")
        time.sleep(0.2)


def test_every_python_block_says_that_it_is_executed() -> None:
    assert len(blocks()) == README.read_text().count("```python") + 2
    assert [language for language, _ in blocks()] == ["python", "bash", "bash", "python"]


def test_quick_start_is_at_most_30_lines_and_moves_the_matrix(tmp_path: Path) -> None:
    code = blocks()[0][1]
    assert len([line for line in code.splitlines() if line.strip()]) <= 30
    wait_for_default_pool()
    script = tmp_path / "quick_start.py"
    script.write_text(code)
    ended = subprocess.run([sys.executable, script], env=environment(), capture_output=True, text=True, timeout=110, check=False)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.count("policy v1: 48 B in") == 4
    # Trainer 0 holds rows of zeros and trainer 1 rows of ones; each generator ends with its columns of both.
    rows = re.findall(r"\[(?:[01]\., *){5}[01]\.\]", ended.stdout)
    assert [set(re.findall(r"[01]", row)) for row in rows] == [{"0"}, {"0"}, {"1"}, {"1"}]
    assert default_pool_is_free()


def test_explain(tmp_path: Path) -> None:
    command = blocks()[1][1]
    ended = subprocess.run(
        ["bash", "-c", command], cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=110, check=False
    )
    assert ended.returncode == 0, ended.stderr
    assert "4x2: S0,S1" in ended.stdout
    assert (tmp_path / "crossing.svg").read_text().startswith("<svg")


def test_torchrun_without_ray(tmp_path: Path) -> None:
    _, _, (_, shell), (_, script) = blocks()
    wait_for_default_pool()
    (tmp_path / "reshard.py").write_text(script)
    (tmp_path / "run.sh").write_text(shell)
    ended = subprocess.run(["bash", "run.sh"], cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=110, check=False)
    assert ended.returncode == 0, ended.stderr
    whole = [[6 * row + column for column in range(6)] for row in range(4)]
    for rank in range(2):
        columns = sum(sum(row[3 * rank : 3 * rank + 3]) for row in whole)
        assert re.search(rf"generator {rank} on agent {2 + rank}: recv policy v1: 48 B .*; sum {columns}(?!\d)", ended.stdout), (
            ended.stdout + ended.stderr
        )
    deadline = time.monotonic() + 30
    while not default_pool_is_free() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert default_pool_is_free()
