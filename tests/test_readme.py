"""The README's code runs as written."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from etha_ray.config import agent_paths
from etha_ray.testing import eventually, succeed
from tests.tensor_bus.cluster import local_cluster

README = Path(__file__).parent.parent / "README.md"
ALONE = "<!-- executed by tests/test_readme.py -->\n"
EACH_SIDE = "<!-- executed by tests/test_readme.py, as each side -->\n"


def blocks(mark: str = ALONE) -> list[tuple[str, str]]:
    """(language, code) of the blocks that README.md says are executed here."""
    return re.findall(re.escape(mark) + r"```(\w+)\n(.*?)```", README.read_text(), flags=re.DOTALL)


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


def test_every_block_is_executed_or_says_why_not() -> None:
    before = re.findall(r"(.*)\n```\w+\n", README.read_text())
    assert len(before) == README.read_text().count("```") / 2
    marks = [line for line in before if line.startswith(("<!-- executed by tests/", "<!-- not executed here: "))]
    assert marks == before
    assert [language for language, _ in blocks()] == ["python", "python", "bash", "bash", "python"]


def run(code: str, folder: Path) -> str:
    """What a Python script of the README prints."""
    assert len([line for line in code.splitlines() if line.strip()]) <= 34
    wait_for_default_pool()
    script = folder / "script.py"
    script.write_text(code)
    ended = subprocess.run([sys.executable, script], env=environment(), capture_output=True, text=True, timeout=250, check=False)
    assert ended.returncode == 0, ended.stderr
    assert default_pool_is_free()
    return ended.stdout


def test_quick_start_moves_each_version(tmp_path: Path) -> None:
    lines = run(blocks()[0][1], tmp_path).splitlines()
    for step, line in enumerate(lines[-3:], start=1):
        assert line.startswith(f"[({step}, {step}.0), ({step}, {step}.0)] version {step} to 0: "), lines


def test_tensor_by_tensor_moves_the_matrix(tmp_path: Path) -> None:
    printed = run(blocks()[1][1], tmp_path)
    assert printed.count("policy v1: 48 B in") == 4
    # Trainer 0 holds rows of zeros and trainer 1 rows of ones; each generator ends with its columns of both.
    rows = re.findall(r"\[(?:[01]\., *){5}[01]\.\]", printed)
    assert [set(re.findall(r"[01]", row)) for row in rows] == [{"0"}, {"0"}, {"1"}, {"1"}]


def test_versions(capsys: pytest.CaptureFixture[str]) -> None:
    trainer, generator, router = (code for _, code in blocks(EACH_SIDE))
    with local_cluster(2) as cluster:
        sender, receiver, _, target = cluster.batch(target=torch.zeros(3, 4))
        succeed(
            lambda: exec(trainer, {"batch": sender, "step": 41}),
            lambda: exec(generator, {"batch": receiver, "step": 41}),
        )
        assert capsys.readouterr().out == "41 41\n"
        assert target.sum() == sum(range(12))
        names: dict[str, Any] = {"client": sender.client, "step": 41}
        router = router.replace('"weights"', repr("pair of batch"))
        eventually(lambda: (exec(router, names), names["ready"] == ["b"])[1])


def test_explain(tmp_path: Path) -> None:
    command = blocks()[2][1]
    ended = subprocess.run(
        ["bash", "-c", command], cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=250, check=False
    )
    assert ended.returncode == 0, ended.stderr
    assert "4x2: S0,S1" in ended.stdout
    assert (tmp_path / "crossing.svg").read_text().startswith("<svg")


def test_torchrun_without_ray(tmp_path: Path) -> None:
    (_, shell), (_, script) = blocks()[3:]
    wait_for_default_pool()
    (tmp_path / "reshard.py").write_text(script)
    (tmp_path / "run.sh").write_text(shell)
    ended = subprocess.run(["bash", "run.sh"], cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=250, check=False)
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
