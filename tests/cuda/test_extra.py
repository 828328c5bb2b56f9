"""The install line says torch's own CUDA."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError

import pytest
import torch

from etha_ray.cuda import extra


@pytest.mark.parametrize(
    ("required", "line"),
    [
        (["filelock", 'nvidia-nccl-cu12==2.28.3; platform_system == "Linux"'], "pip install 'etha-ray[gpu-cuda12]'"),
        (['nvidia-nccl-cu13==2.30.7; platform_system == "Linux"'], "pip install 'etha-ray[gpu-cuda13]'"),
        (["filelock"], "pip install 'etha-ray[gpu-cuda13]'"),
        (None, "pip install 'etha-ray[gpu-cuda13]'"),
    ],
    ids=["12", "13", "without CUDA", "nothing said"],
)
def test_it_is_torchs(required: list[str] | None, line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extra, "requires", lambda name: required)
    assert extra.install_cupy() == line


def test_a_torch_that_names_no_package_is_asked_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extra, "requires", lambda name: ["filelock"])
    monkeypatch.setattr(torch.version, "cuda", "12.6")
    assert extra.install_cupy() == "pip install 'etha-ray[gpu-cuda12]'"


def test_without_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(extra, "requires", missing)
    assert extra.install_cupy() == "pip install 'etha-ray[gpu-cuda13]'"
