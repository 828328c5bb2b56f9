"""GPUs, processes and limits for the tests of memory."""

from __future__ import annotations

import gc
import resource
from collections.abc import Iterator

import pytest

from etha_ray.cuda import driver
from tests.cuda.fake import FakeGpus, install
from tests.memory.programs import Owner


@pytest.fixture(scope="module", autouse=True)
def nothing_left() -> None:
    """Descriptors are counted here: what earlier tests have left to Python's collector must not be closed meanwhile."""
    gc.collect()


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> FakeGpus:
    """This process sees two GPUs, which the host counts 0 and 1."""
    monkeypatch.setenv("FAKE_CUDA_DEVICES", "")
    monkeypatch.setattr(driver, "_driver", None)
    return install("0,1", patch=monkeypatch.setattr)


@pytest.fixture
def owner() -> Iterator[Owner]:
    owner = Owner()
    yield owner
    owner.kill()


@pytest.fixture
def named(monkeypatch: pytest.MonkeyPatch) -> None:
    """In this process, storages are shared by name, as where descriptors are too few."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (64, 64))
    monkeypatch.setattr(resource, "setrlimit", lambda kind, limits: None)
    assert soft <= hard
