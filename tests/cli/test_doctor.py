"""`doctor`: each check, on this machine and on ones that lack something."""

from __future__ import annotations

import json
import os
import secrets
import stat
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from etha_ray.cli import app
from etha_ray.doctor import host, services, software
from etha_ray.doctor.check import Check
from etha_ray.kvstore.tcp import TorchTCPStore
from tests.tensor_bus.cluster import free_port, process_cluster


def run(*arguments: str) -> Result:
    return CliRunner(env={"COLUMNS": "200", "NO_COLOR": "1"}).invoke(app, ["doctor", *arguments])


class TestCommand:
    def test_this_machine_is_well_and_a_store_is_reached(self) -> None:
        store = TorchTCPStore("127.0.0.1", 0, None, True, 30.0, namespace="doctor")
        try:
            result = run("--store", f"tcp://127.0.0.1:{store.port}?master=0", "--json")
        finally:
            store.close()
        said = json.loads(result.stdout)
        assert (result.exit_code, said["ok"]) == (0, True), said
        names = [check["name"] for check in said["checks"]]
        for name in ("shared memory", "ptrace scope", "lmdb", "semaphores", "temporary files", "descriptors", "etcd client", "gpus", "ray"):
            assert name in names
        assert next(check for check in said["checks"] if check["name"] == "store")["found"].startswith("a put, a get and a delete took")
        assert all(check["remedy"] for check in said["checks"] if check["state"] != "ok")

    def test_what_fails_is_said_with_a_remedy_and_ends_with_1(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(services, "RayQuestion", _NoRay)
        result = run("--store", f"tcp://127.0.0.1:{free_port()}?master=0&world_size=1&timeout=1")
        assert result.exit_code == 1
        assert "✗ store" in result.stdout
        assert "→ start the store, or give its right URL" in result.stdout.replace("\n", " ")
        assert "1 fail" in result.stdout

    def test_wrong_use_ends_with_2(self) -> None:
        assert run("--namespace", "../up").exit_code == 2

    def test_help_has_an_example(self) -> None:
        assert "etha-ray doctor --store etcd://" in run("--help").stdout


class _NoRay:
    def __init__(self, address: str) -> None:
        pass

    def answer(self, needed: bool) -> Check:
        return services.read_answer({"state": "none", "why": "there is none"}, "auto", needed)


class TestHost:
    @pytest.mark.parametrize(("free", "state"), [(0, "fail"), (100 << 20, "warn"), (8 << 30, "ok")])
    def test_room_in_shared_memory(self, free: int, state: str, monkeypatch: pytest.MonkeyPatch) -> None:
        found = SimpleNamespace(f_blocks=1 << 24, f_bavail=free // 4096, f_frsize=4096)
        monkeypatch.setattr(os, "statvfs", lambda path: found)
        check = host.shared_memory()
        assert check.state == state
        assert state == "ok" or "--shm-size" in check.remedy

    def test_no_shared_memory(self, tmp_path: Path) -> None:
        check = host.shared_memory(str(tmp_path / "none"))
        assert check.state == "fail"
        assert "mount -t tmpfs" in check.remedy

    @pytest.mark.parametrize(("scope", "state"), [("0", "ok"), ("1", "ok"), ("2", "warn"), ("3", "warn")])
    def test_ptrace(self, scope: str, state: str, tmp_path: Path) -> None:
        (tmp_path / "scope").write_text(scope + "\n")
        check = host.ptrace(str(tmp_path / "scope"))
        assert check.state == state
        assert state == "ok" or check.remedy == "sysctl -w kernel.yama.ptrace_scope=1"

    def test_memory_of_another_process_is_opened(self) -> None:
        assert host.shared_files().state == "ok"

    def test_a_folder_that_takes_no_file(self, tmp_path: Path) -> None:
        assert host.lmdb_works(str(tmp_path)).state == "ok"
        assert os.listdir(tmp_path) == []
        check = host.lmdb_works(str(tmp_path / "none"))
        assert (check.state, "mmap" in check.remedy) == ("fail", True)

    def test_semaphores_leave_nothing(self) -> None:
        before = set(os.listdir("/dev/shm"))
        assert host.semaphores().state == "ok"
        assert {name for name in set(os.listdir("/dev/shm")) - before if "doctor" in name} == set()

    @pytest.mark.parametrize(("mode", "state"), [(0o1777, "ok"), (0o700, "ok"), (0o777, "fail")])
    def test_the_temporary_folder(self, mode: int, state: str, tmp_path: Path) -> None:
        folder = tmp_path / "tmp"
        folder.mkdir()
        folder.chmod(mode)
        assert stat.S_IMODE(folder.stat().st_mode) == mode
        check = host.temporary_folder(str(folder))
        assert check.state == state
        assert state == "ok" or "chmod 1777" in check.remedy
        assert host.temporary_folder(str(tmp_path / "none")).state == "fail"

    def test_limits(self) -> None:
        assert host.descriptors((1024, 1048576)).state == "ok"
        few = host.descriptors((1024, 1024))
        assert (few.state, "ulimit" in few.remedy) == ("warn", True)
        assert host.mappings(65530).state == "ok"
        assert "vm.max_map_count" in host.mappings(1000).remedy

    def test_a_name_that_nobody_knows(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(host.socket, "gethostname", lambda: "no-such-host.invalid")
        check = host.names()
        assert check.state == "warn"
        assert "/etc/hosts" in check.remedy

    def test_files_of_killed_agents(self) -> None:
        with process_cluster(1) as cluster:
            assert cluster.namespace not in host.leftovers().found
            cluster.client(0).close()
            cluster.kill(cluster.pids[0])
            check = host.leftovers()
            assert check.state == "warn"
            assert f"0 of pool '{cluster.namespace}'" in check.found
        assert cluster.namespace not in host.leftovers().found


_TOPOLOGY = """\
\x1b[4m\tGPU0\tGPU1\tGPU2\tNIC0\tCPU Affinity\tNUMA Affinity\x1b[0m
GPU0\t X \tNV18\tPHB\tSYS\t0-47\t0
GPU1\tNV18\t X \tNV18\tSYS\t0-47\t0
GPU2\tPHB\tNV18\t X \tSYS\t48-95\t1
NIC0\tSYS\tSYS\tSYS\t X
"""


class TestSoftware:
    def test_without_gpus_there_is_one_line(self, tmp_path: Path) -> None:
        silent = _smi(tmp_path, "exit 9")
        assert [(check.name, check.state) for check in software.gpus(silent)] == [("gpus", "ok")]

    def test_gpus_are_listed_with_cupy_and_how_they_are_joined(self, tmp_path: Path) -> None:
        (tmp_path / "topology").write_text(_TOPOLOGY)
        script = f"""case "$1" in topo) cat {tmp_path}/topology;; *) printf '0, H100, 81559 MiB\\n1, H100, 81559 MiB\\n';; esac"""
        gpus, cupy, topology = software.gpus(_smi(tmp_path, script))
        assert gpus.found == "0, H100, 81559 MiB; 1, H100, 81559 MiB"
        assert cupy.name == "cupy and NCCL"
        assert (topology.state, topology.found) == ("ok", "2 pairs by NV18, 1 pairs by PHB")

    def test_gpus_without_nvlink_are_a_warning(self) -> None:
        assert software.topology("GPU0 X PHB\nGPU1 PHB X\n").state == "warn"
        assert software.topology("nothing").state == "warn"

    def test_versions_of_cupy_and_nccl(self) -> None:
        modules: dict[str, Any] = {
            "cupy": SimpleNamespace(__version__="14.0.1"),
            "cupy.cuda.nccl": SimpleNamespace(get_version=lambda: 22803),
        }
        assert software._cupy(modules.__getitem__).found == "cupy 14.0.1, NCCL 2.28.3"
        assert software._cupy({}.__getitem__).remedy.endswith("pip install 'etha-ray[gpu-cuda13]'")

    def test_the_etcd_client_is_missed_only_where_it_is_needed(self, monkeypatch: pytest.MonkeyPatch) -> None:
        assert software.etcd_client(needed=True).state == "ok"
        monkeypatch.setitem(sys.modules, "pyetcd", None)
        assert software.etcd_client(needed=False).state == "ok"
        check = software.etcd_client(needed=True)
        assert (check.state, check.remedy) == ("fail", "pip install 'etha-ray[etcd]'")


def _smi(folder: Path, script: str) -> str:
    path = folder / f"nvidia-smi-{secrets.token_hex(4)}"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o700)
    return str(path)


class TestRay:
    @pytest.mark.parametrize(
        ("answer", "needed", "state", "says"),
        [
            ({"state": "ok", "nodes": 3, "gpus": 8.0, "address": "h:6379"}, True, "ok", "h:6379 answers: 3 nodes, 8 GPUs"),
            ({"state": "token", "why": "unauthenticated"}, False, "fail", "RAY_AUTH_MODE=token"),
            ({"state": "none", "why": "nothing"}, False, "ok", "no cluster runs here"),
            ({"state": "none", "why": "nothing"}, True, "fail", "ray start --head"),
            ({"state": "failed", "why": "TimeoutError: x"}, False, "fail", "does not serve (TimeoutError: x)"),
            ({}, False, "fail", "no answer in"),
        ],
    )
    def test_answers(self, answer: dict[str, object], needed: bool, state: str, says: str) -> None:
        check = services.read_answer(answer, "auto", needed)
        assert check.state == state
        assert says in f"{check.found} {check.remedy}"

    def test_an_address_where_nobody_is_fails(self) -> None:
        check = services.RayQuestion(f"127.0.0.1:{free_port()}").answer(needed=True)
        assert check.state == "fail"
        assert "refused" in check.found
