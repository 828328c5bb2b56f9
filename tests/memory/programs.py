"""Other processes for the tests of memory, and what is seen of them."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from typing import Any

import msgspec
import torch

from etha_ray import shared_files
from etha_ray.memory import TensorHandle, decode_handle, encode_handle, export_tensors, open_tensors
from tests.tensor_bus.cluster import Worker


def open_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def changed(handle: TensorHandle, **fields: object) -> TensorHandle:
    return msgspec.structs.replace(handle, **fields)


def python(code: str) -> subprocess.Popen[str]:
    """A fresh interpreter that runs ``code`` with the imports that every such program here needs."""
    head = "import os, sys, time, resource, torch\nfrom etha_ray.memory import *\n"
    return subprocess.Popen([sys.executable, "-c", head + textwrap.dedent(code)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def line_of(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    line = process.stdout.readline().strip()
    assert line, f"the process ended with {process.wait()}"
    return line


def kill(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.wait()
    for stream in (process.stdin, process.stdout):
        if stream is not None:
            stream.close()


class Owner:
    """A process that exports ``torch.arange(100_000)``, and a part of it, and holds it until killed.

    ``named``: it uses descriptors for nothing, so the storage gets a name.
    """

    def __init__(self, named: bool = False) -> None:
        self._worker = Worker()
        self.pid = self._worker.pid
        self.handles = [decode_handle(handle) for handle in self._worker.call(_export, named)]

    def sum(self) -> int:
        return int(self._worker.call(_sum))

    def let_go(self) -> None:
        self._worker.call(_let_go)

    def kill(self) -> None:
        self._worker.process.kill()
        self._worker.process.join()


def _export(state: dict[str, Any], named: bool) -> list[bytes]:
    if named:
        shared_files.SPARE_DESCRIPTORS = 1 << 40
    state["weight"] = torch.arange(100_000, dtype=torch.int32)
    state["exported"] = export_tensors([state["weight"], state["weight"][10:20]])
    return [encode_handle(handle) for handle in state["exported"].handles]


def _sum(state: dict[str, Any]) -> int:
    return int(state["weight"].sum())


def _let_go(state: dict[str, Any]) -> None:
    state.pop("exported").close()
    del state["weight"]


def open_and_set(state: dict[str, Any], handle: bytes, value: int) -> None:
    """For a `Worker`: it opens the tensor, keeps it, and sets its first element."""
    state["opened"] = open_tensors([decode_handle(handle)])
    state["opened"].tensors[0][0] = value


def names_of(*pids: int | str) -> set[str]:
    """What these processes have in /dev/shm: torch puts the pid into the name."""
    return {name for name in os.listdir("/dev/shm") if any(f"_{pid}_" in name for pid in pids)}
