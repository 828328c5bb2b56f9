"""`publish` and `pull` under torchrun, without Ray: a trainer with FSDP, generators that hold columns, agents beside them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from etha_ray.config import agent_paths
from etha_ray.testing import eventually
from etha_ray.testing.etcd_server import free_ports
from tests.tensor_bus.cluster import LONG, left_in_shm

SCRIPT = """
import os, sys
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard
import etha_ray

side, rank = sys.argv[1], int(os.environ["RANK"])
model = torch.nn.Linear(6, 4, bias=False)
if side == "trainer":
    torch.distributed.init_process_group("gloo")
    fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    with etha_ray.publish(model, "policy") as sender:
        for step in (1, 2, 3):
            with torch.no_grad():
                model.weight.to_local().copy_(torch.arange(24.0).reshape(4, 6)[2 * rank : 2 * rank + 2] + step)
            sender.push(version=step, timeout=60)
    torch.distributed.destroy_process_group()
else:
    held = {"weight": torch.zeros(4, 3)}
    with etha_ray.pull(held, "policy", placements=[Shard(1)]) as receiver:
        while (version := receiver.update(timeout=60)) < 3:
            pass
    wanted = torch.arange(24.0).reshape(4, 6)[:, 3 * rank : 3 * rank + 3] + 3
    print(f"generator {rank}: version {version}, {torch.equal(held['weight'], wanted)}", flush=True)
"""


def torchrun(count: int, port: int, *arguments: str, **environment: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={count}", f"--master-port={port}", *arguments]
    folder = Path(__file__).parents[2]
    return subprocess.Popen(
        command, env={**os.environ, "PYTHONPATH": str(folder), **environment}, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


@pytest.mark.slow  # of torchrun, README's section is run by `make test`
def test_fsdp_to_columns(tmp_path: Path) -> None:
    script = tmp_path / "sync.py"
    script.write_text(SCRIPT)
    store, *ports = free_ports(4)
    namespace = f"test-torchrun-{os.getpid()}"
    paths = [agent_paths(rank, namespace) for rank in range(4)]
    agents = torchrun(4, ports[0], "-m", "etha_ray.tensor_bus.agent", "--store", f"tcp://127.0.0.1:{store}", "--namespace", namespace)
    sides = [
        torchrun(2, port, str(script), name, AGENT_RANK_OFFSET=str(offset), ETHA_RAY_NAMESPACE=namespace)
        for port, name, offset in ((ports[1], "trainer", 0), (ports[2], "generator", 2))
    ]
    try:
        ended = [side.communicate(timeout=150)[0] for side in sides]
    finally:
        for process in (agents, *sides):
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
        said = agents.communicate(timeout=LONG)[0]
    assert [side.returncode for side in sides] == [0, 0], "\n".join([*ended, said])
    for rank in range(2):
        assert f"generator {rank}: version 3, True" in ended[1]
    eventually(lambda: left_in_shm(set(), paths) == [] and not Path(paths[0].state).parent.exists())
