"""`status` and `trace` of real agents, in processes of their own."""

from __future__ import annotations

import json
import os
import pty
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner, Result

from etha_ray.cli import app
from etha_ray.errors import TransferTimeoutError
from etha_ray.tensor_bus import connection
from etha_ray.tensor_bus.inspection import agents_here
from etha_ray.testing import eventually, succeed
from tests.status import trace_format
from tests.tensor_bus.cluster import LONG, ProcessCluster, process_cluster


def run(*arguments: str, width: int = 140) -> Result:
    return CliRunner(env={"COLUMNS": str(width), "TERM": "xterm-256color", "NO_COLOR": "1"}).invoke(app, list(arguments))


@pytest.fixture(scope="module")
def cluster() -> Iterator[ProcessCluster]:
    """Two agents after a sync of 4000 bytes, and a send that nobody received."""
    with process_cluster(2) as cluster:
        one, two = (cluster.client(rank) for rank in (0, 1))
        succeed(lambda: one.init_pair("weights", "trainer", "generator", 1), lambda: two.init_pair("weights", "generator", "trainer", 1))
        tensors = torch.ones(1000), torch.zeros(1000)
        sender, receiver = succeed(
            lambda: one.register_tensors("policy", [(tensors[0], "weights")]),
            lambda: two.register_tensors("policy", [(tensors[1], "weights")]),
        )
        sent = sender.transfer("send")
        receiver.transfer("recv").result(LONG)
        sent.result(LONG)
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(connection, "_GRACE", LONG)  # the agent says it, however busy it is: a client that gives up first cancels
            with pytest.raises(TransferTimeoutError):
                sender.transfer("send", blocking=True, timeout=0.05)
        eventually(lambda: sum(len(agent.past) for agent in agents_here(cluster.namespace)) == 3)
        eventually(lambda: all(agent.status is not None and agent.status.batches for agent in agents_here(cluster.namespace)))
        yield cluster
        one.close()
        two.close()


def test_status_of_a_pool_that_is_well(cluster: ProcessCluster) -> None:
    result = run("status", "--namespace", cluster.namespace)
    assert result.exit_code == 0, result.output
    assert f"pool '{cluster.namespace}': 2 of 2 agents running" in result.stdout
    for words in ("generator x1 ↔ trainer x1", "policy", "4.00 kB", "TransferTimeoutError", "generator[0] did not receive"):
        assert words in result.stdout


def test_json_is_one_object(cluster: ProcessCluster) -> None:
    result = run("status", "--namespace", cluster.namespace, "--json")
    found = json.loads(result.stdout)
    assert [(agent["rank"], agent["life"], agent["pid"]) for agent in found["agents"]] == [
        (rank, "running", cluster.pids[rank]) for rank in (0, 1)
    ]
    assert [(batch["batch_id"], batch["workers"], batch["transfers"], batch["bytes"]) for batch in found["batches"]] == [
        ("policy", 2, 1, 4000)
    ]
    assert found["batches"][0]["gb_per_s"] > 0
    assert [pair["state"] for pair in found["pairs"]] == ["matched"]
    assert found["agents"][0]["errors"] == {"TransferTimeoutError": 1}


def test_html_is_a_page(cluster: ProcessCluster, tmp_path: Path) -> None:
    path = tmp_path / "status.html"
    result = run("status", "--namespace", cluster.namespace, "--html", str(path))
    assert result.exit_code == 0, result.output
    assert "the page is in" in result.stdout
    assert "Last sync of policy" in path.read_text()


def test_trace_is_valid_and_joins_both_agents(cluster: ProcessCluster, tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    result = run("trace", "--namespace", cluster.namespace, "--out", str(path), "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout) == {"out": str(path), "agents": 2, "transfers": 3}
    events = trace_format.check(path.read_text())
    arrows = [(event["ph"], event["pid"]) for event in events if event["ph"] in "sf"]
    assert arrows == [("s", 0), ("f", 1)]
    assert {event["name"] for event in events if event["ph"] == "X"} >= {"send policy", "recv policy", "move", "send policy failed"}


def test_watch_draws_until_it_is_interrupted(cluster: ProcessCluster) -> None:
    screen, terminal = pty.openpty()
    command = [sys.executable, "-m", "etha_ray.cli", "status", "--watch", "--namespace", cluster.namespace]
    watching = subprocess.Popen(
        command, stdin=terminal, stdout=terminal, stderr=terminal, env={**os.environ, "TERM": "xterm", "COLUMNS": "140"}
    )
    os.close(terminal)
    drawn, deadline = b"", time.monotonic() + LONG
    try:
        while drawn.count(b"agents running") < 3:  # each look draws it
            assert time.monotonic() < deadline, drawn
            if select.select([screen], [], [], 1.0)[0]:
                drawn += os.read(screen, 65536)
        watching.send_signal(signal.SIGINT)
        while watching.poll() is None:
            assert time.monotonic() < deadline, "it does not end"
            if select.select([screen], [], [], 0.1)[0]:
                try:
                    os.read(screen, 65536)
                except OSError:  # the other end is closed
                    break
        assert watching.wait(LONG) == 0
    finally:
        watching.kill()
        watching.wait()
        os.close(screen)


def test_an_empty_pool_is_said_and_others_are_named(cluster: ProcessCluster, tmp_path: Path) -> None:
    result = run("status", "--namespace", "nobody", width=300)
    assert result.exit_code == 1
    assert "there are pools" in result.stdout
    assert cluster.namespace in result.stdout
    traced = run("trace", "--namespace", "nobody", "--out", str(tmp_path / "trace.json"))
    assert traced.exit_code == 1
    assert "nothing to trace" in traced.stderr
    assert not (tmp_path / "trace.json").exists()


@pytest.mark.parametrize(
    "arguments",
    [("--namespace", "../up"), ("--watch", "--json"), ("--watch", "--html", "x.html"), ("--nonsense",)],
)
def test_wrong_use_ends_with_2(arguments: tuple[str, ...]) -> None:
    assert run("status", *arguments).exit_code == 2


def test_a_page_that_cannot_be_written_is_an_error(cluster: ProcessCluster, tmp_path: Path) -> None:
    result = run("status", "--namespace", cluster.namespace, "--html", str(tmp_path / "nowhere" / "x.html"))
    assert result.exit_code == 1
    assert "nowhere" in result.stderr.replace("\n", "")


@pytest.mark.parametrize("command", ["status", "trace", "up", "down", "demo"])
def test_help_has_an_example(command: str) -> None:
    said = run(command, "--help").stdout
    assert f"etha-ray {command}" in said.split("Example:")[1]
    assert "Exits with 0" in said


def test_a_killed_agent_makes_it_end_with_1_and_says_what_to_do(cluster: ProcessCluster) -> None:
    cluster.kill(cluster.pids[1])  # the last test of this module: its agents are not needed any more
    result = run("status", "--namespace", cluster.namespace, width=300)
    assert result.exit_code == 1
    assert "✗ agent 1 was killed and left its files" in result.stdout
    assert "1 of 2 agents running" in result.stdout
