"""``python -m etha_ray.tensor_bus.agent``: what it takes from the environment, and what it says of wrong use."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from etha_ray.config import agent_paths
from etha_ray.tensor_bus.watch import find_agent
from tests.tensor_bus.cluster import LONG


def program(*arguments: str, **environment: str) -> subprocess.Popen[str]:
    inherited = {name: value for name, value in os.environ.items() if name not in ("RANK", "ETHA_RAY_STORE", "ETHA_RAY_NAMESPACE")}
    return subprocess.Popen(
        [sys.executable, "-m", "etha_ray.tensor_bus.agent", *arguments],
        env=inherited | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["--store", "tcp://127.0.0.1:1"], "which agent is this? give --rank"),
        (["--rank", "0"], "where do the agents meet? give --store"),
        (["--rank", "0", "--store", "bogus://x"], "bogus"),
        (["--rank", "0", "--store", "tcp://127.0.0.1:0", "--device", "tpu"], "device 'tpu' is not understood"),
        (["--rank", "0", "--store", "tcp://127.0.0.1:0", "--namespace", "../up"], "namespace"),
    ],
)
def test_wrong_use_is_said_without_a_traceback(arguments: list[str], why: str) -> None:
    process = program(*arguments)
    output, _ = process.communicate(timeout=LONG)
    assert process.returncode == 2, output
    assert why in output.splitlines()[-1]
    assert "Traceback" not in output


def test_it_is_in_the_namespace_of_the_environment(namespace: str) -> None:
    with program("--rank", "3", "--store", "tcp://127.0.0.1:0?master=1", ETHA_RAY_NAMESPACE=namespace) as process:
        paths = agent_paths(3, namespace)
        state, watch = find_agent(3, paths.state, paths.command_queue, LONG)
        assert watch.record.pid == process.pid
        state.close()
        process.terminate()
        output, _ = process.communicate(timeout=LONG)
        assert process.returncode == 0, output
    assert not Path(paths.state).exists()
