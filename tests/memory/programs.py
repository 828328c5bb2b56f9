"""Other processes for the tests of memory, and what is seen of them."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap

import msgspec

from etha_ray.memory import (
    TensorHandle,
    decode_handle,
)


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
    """A process that exports ``torch.arange(count)`` and holds it until killed."""

    def __init__(self, count: int = 100_000, setup: str = "") -> None:
        self.process = python(f"""
            {setup}
            weight = torch.arange({count}, dtype=torch.int32)
            exported = export_tensors([weight, weight[10:20]])
            print(os.getpid(), *(encode_handle(handle).hex() for handle in exported.handles), flush=True)
            for line in sys.stdin:
                if line == "sum\\n":
                    print(weight.sum().item(), flush=True)
                else:
                    exported.close(); del exported, weight
                    print("closed", flush=True)
        """)
        self.pid, *handles = line_of(self.process).split()
        self.handles = [decode_handle(bytes.fromhex(handle)) for handle in handles]

    def ask(self, line: str) -> str:
        assert self.process.stdin is not None
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()
        return line_of(self.process)


def names_of(*pids: int | str) -> set[str]:
    """What these processes have in /dev/shm: torch puts the pid into the name."""
    return {name for name in os.listdir("/dev/shm") if any(f"_{pid}_" in name for pid in pids)}


# Use descriptors for nothing: each storage gets a name.
NAMED = "from etha_ray import shared_files; shared_files.SPARE_DESCRIPTORS = 1 << 40"
