"""What is installed: Python's packages, and what GPUs need."""

from __future__ import annotations

import importlib.util
import platform
import re
import shutil
import subprocess
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from etha_ray.cuda.extra import install_cupy
from etha_ray.doctor.check import Check, fail, ok, warn

_NEEDED = ("torch", "lmdb", "posix_ipc", "msgspec", "numpy")
_SMI_TIMEOUT = 20.0


def packages() -> Check:
    """What etha_ray runs on."""
    import etha_ray

    found = ", ".join(f"{package} {version(package)}" for package in _NEEDED)
    return ok("versions", f"etha_ray {etha_ray.__version__}, Python {platform.python_version()}, {found}")


def etcd_client(needed: bool) -> Check:
    """The client of etcd, which only that store needs."""
    name = "etcd client"
    try:
        found = f"etcd-sdk-python {version('etcd-sdk-python')}"
        importlib.import_module("pyetcd")
    except (PackageNotFoundError, ImportError) as error:
        remedy = "pip install 'etha-ray[etcd]'"
        if needed:
            return fail(name, f"cannot be loaded ({error}), and the store is etcd", remedy)
        return ok(name, f"not installed, and not needed for other stores ({remedy})")
    return ok(name, found)


def gpus(smi: str | None = None) -> list[Check]:
    """GPUs, how they are joined, and cupy with NCCL; one line where there are none."""
    smi = smi or shutil.which("nvidia-smi")
    listed = _said(smi, "--query-gpu=index,name,memory.total", "--format=csv,noheader") if smi else None
    if listed is None or not listed.strip():
        if Path("/dev/nvidia0").exists():
            return [
                fail("gpus", "/dev/nvidia0 is there and nvidia-smi does not work", "install the driver's nvidia-smi, and see what it says")
            ]
        return [ok("gpus", "none: CPU tensors only")]
    lines = [line.strip() for line in listed.strip().splitlines()]
    checks = [ok("gpus", "; ".join(lines)), _cupy()]
    if len(lines) > 1 and smi:
        checks.append(topology(_said(smi, "topo", "-m") or ""))
    return checks


def topology(table: str) -> Check:
    """How GPUs are joined, from the table of ``nvidia-smi topo -m``."""
    name = "gpu topology"
    plain = re.sub(r"\x1b\[[0-9;]*m", "", table)
    links: dict[str, int] = {}
    for line in plain.splitlines():
        cells = line.split()
        if not cells or not re.fullmatch(r"GPU\d+", cells[0]):
            continue
        row = int(cells[0].removeprefix("GPU"))
        for link in cells[1 : 1 + row]:  # the lower triangle: each pair once
            links[link] = links.get(link, 0) + 1
    if not links:
        return warn(name, "nvidia-smi topo -m says nothing that can be read", "run it, and see which GPUs share NVLink")
    found = ", ".join(f"{count} pairs by {link}" for link, count in sorted(links.items(), key=lambda item: -item[1]))
    if not any(link.startswith("NV") for link in links):
        return warn(name, f"{found}: no NVLink", "bytes between GPUs cross PCIe or the CPU; nothing to do unless NVLink should be there")
    return ok(name, found)


def _cupy(load: Callable[[str], object] = importlib.import_module) -> Check:
    name = "cupy and NCCL"
    remedy = f"install those that go with torch's CUDA: {install_cupy()}"
    try:
        cupy = load("cupy")
        nccl = load("cupy.cuda.nccl")
        number = int(nccl.get_version())  # type: ignore[attr-defined]
    except Exception as error:  # cupy raises whatever its libraries do
        return warn(name, f"cannot be loaded ({type(error).__name__}: {error}): GPUs of different hosts cannot exchange", remedy)
    return ok(name, f"cupy {cupy.__version__}, NCCL {number // 10000}.{number // 100 % 100}.{number % 100}")  # type: ignore[attr-defined]


def _said(*command: str | None) -> str | None:
    try:
        done = subprocess.run([part for part in command if part], capture_output=True, text=True, timeout=_SMI_TIMEOUT, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout
