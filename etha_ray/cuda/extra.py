"""Which of this package's extras goes with the CUDA that torch was built for."""

from __future__ import annotations

import re
from importlib.metadata import PackageNotFoundError, requires


def install_cupy() -> str:
    """The line that installs cupy, NCCL, and what cupy compiles kernels with.

    The CUDA must be torch's: NCCL's packages for two of them have the same files. torch itself need not be importable.
    """
    try:
        found = re.search(r"\bnvidia-nccl-cu(\d+)", "\n".join(requires("torch") or ()))
    except PackageNotFoundError:
        found = None
    return f"pip install 'etha-ray[gpu-cuda{found[1] if found else 13}]'"
