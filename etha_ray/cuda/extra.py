"""Which of this package's extras goes with the CUDA that torch was built for."""

from __future__ import annotations

import re
import sys
from importlib.metadata import PackageNotFoundError, requires


def install_cupy() -> str:
    """The line that installs cupy, NCCL, and what cupy compiles kernels with.

    The CUDA must be torch's: NCCL's packages for two of them have the same files. torch itself need not be importable.
    """
    return f"pip install 'etha-ray[gpu-cuda{_release()}]'"


def _release() -> str:
    try:
        found = re.search(r"\bnvidia-nccl-cu(\d+)", "\n".join(requires("torch") or ()))
    except PackageNotFoundError:
        found = None
    if found:
        return found[1]
    torch = sys.modules.get("torch")  # one that was built from source names no package
    cuda: str | None = getattr(getattr(torch, "version", None), "cuda", None)
    return (cuda or "13").partition(".")[0]
