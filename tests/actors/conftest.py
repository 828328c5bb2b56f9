"""Applications that a test started end with it."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from typing import Protocol

import pytest

from . import application


class Start(Protocol):
    """See `application.start`."""

    def __call__(self, module: str, *arguments: str, cluster: str | None = None) -> subprocess.Popen[str]: ...


@pytest.fixture
def start() -> Iterator[Start]:
    """`application.start`; a test that fails leaves none behind, which would slow down those that come after."""
    started: list[subprocess.Popen[str]] = []

    def start(module: str, *arguments: str, cluster: str | None = None) -> subprocess.Popen[str]:
        started.append(application.start(module, *arguments, cluster=cluster))
        return started[-1]

    yield start
    for process in started:
        if process.poll() is not None:
            continue
        process.terminate()
        try:
            process.communicate(timeout=60)
        except subprocess.TimeoutExpired:
            process.kill()
