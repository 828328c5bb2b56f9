"""``bench gpu`` at a tiny size, its kernels on the CPU: what it gives, and what it says where there is no GPU."""

from __future__ import annotations

import contextlib
import json
from functools import partial

import pytest
import torch
from typer.testing import CliRunner

from etha_ray.bench import gpu
from etha_ray.bench.gpu import run_gpu
from etha_ray.bench.processes import BenchError
from etha_ray.bench.reshard import Reshard
from etha_ray.bench.workload import model, uniform
from etha_ray.cli import app
from etha_ray.errors import ConfigError, OptionalDependencyError
from etha_ray.transport import CopyProgram, MappedTransport
from etha_ray.transport.kernels import KernelTransport
from tests.accelerator.host import HostAccelerator


def test_figures_and_ratios(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "_BUFFER_BYTES", 4096)
    accelerator = HostAccelerator()
    monkeypatch.setattr("etha_ray.cli.bench.run_gpu", partial(run_gpu, accelerator=accelerator))
    asked = ["--shape", "tiny", "--src", "3", "--dst", "2", "--steps", "2", "--tensors", "20", "--json"]
    result = CliRunner().invoke(app, ["bench", "gpu", *asked])
    assert result.exit_code == 0, result.stderr
    data = json.loads(result.stdout)
    figures, ratios = data["figures"], data["ratios"]
    assert data["bench"] == "gpu"
    assert data["machine"]["gpu"] == "cpu"
    assert figures["steps_count"] == 2
    assert all(value > 0 for value in (*figures.values(), *ratios.values()))
    for name in ("reshard_tiny", "cast_tiny"):
        assert {f"{name}_ms", f"{name}_gb_per_s", f"{name}_prepare_ms"} <= figures.keys()
        assert {f"{name}_copy_limit", f"{name}_torch_loop", f"{name}_gather"} <= ratios.keys()
    assert {"small_torch_loop", "small_torch_foreach"} <= ratios.keys()
    assert figures["small_ms"] == pytest.approx(figures["small_ns_per_tensor"] * 20 / 1e6, rel=1e-3)
    assert set(accelerator.launched) == {"copy_regions"}


@pytest.mark.parametrize("source_dtype", ["bfloat16", "float32"])
def test_all_ways_move_the_same(source_dtype: str) -> None:
    reshard = Reshard(model("tiny", 3, 2, "bfloat16"), HostAccelerator(), source_dtype)
    read = sum(source.nbytes for move in reshard.moves for source in move.sources if isinstance(source, torch.Tensor))
    assert reshard.bytes_read == read
    assert reshard.bytes_written == sum(move.target.nbytes for move in reshard.moves)
    with contextlib.closing(KernelTransport(HostAccelerator(), MappedTransport(1))) as transport:
        reshard.verified("ours", reshard.prepare(transport), 1)
    for version, (name, way) in enumerate({"loop": reshard.copy_each, "gather": reshard.gather_and_slice}.items(), 2):

        class Way(CopyProgram):
            nbytes = 0

            def run(self, way: object = way) -> int:
                way()  # type: ignore[operator]
                return 0

        reshard.verified(name, Way(), version)
        for shards in reshard.targets:
            shards.tensors[-1].zero_()
        with pytest.raises(BenchError, match=f"{name} moved wrong bytes"):
            reshard.verified(name, _Nothing(), version + 10)


class _Nothing(CopyProgram):
    nbytes = 0

    def run(self) -> int:
        return 0


def test_what_is_not_possible() -> None:
    with pytest.raises(ConfigError, match="0 steps"):
        run_gpu(steps=0, accelerator=HostAccelerator())
    with pytest.raises(ConfigError, match="gpt-9"):
        run_gpu(("gpt-9",), accelerator=HostAccelerator())
    without = HostAccelerator()
    without.launches = False
    with pytest.raises(OptionalDependencyError, match=r"etha-ray\[gpu-cuda13\]"):
        run_gpu(("tiny",), accelerator=without)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so() -> None:
    result = CliRunner().invoke(app, ["bench", "gpu", "--json"])
    assert result.exit_code == 1
    assert result.stdout == ""
    assert "cuda:0 is not there" in " ".join(result.stderr.split())


def test_the_larger_model_has_its_parameters() -> None:
    assert sum(torch.Size(spec.shape).numel() for spec in model("qwen3-8b", 2, 2, "bfloat16").tensors) == 8_190_735_360
    assert uniform(3, 5).moved_bytes == 15
