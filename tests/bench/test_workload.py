"""The tensors that a benchmark moves, and how it knows that they arrived."""

from __future__ import annotations

import math

import numpy as np
import pytest

from etha_ray.bench.workload import MODELS, Shards, Workload, bits_of, model, numpy_copies, uniform
from etha_ray.errors import ConfigError


def test_qwen3_has_the_parameters_of_the_real_model() -> None:
    tensors = list(MODELS["qwen3-0.6b"].tensors())
    assert sum(math.prod(spec.shape) for spec in tensors) == 596_049_920
    assert len(tensors) == 310
    shapes = {spec.name: (spec.shape, spec.dst) for spec in tensors}
    assert shapes["model.embed_tokens.weight"] == ((151936, 1024), "S0")
    assert shapes["model.layers.27.self_attn.q_proj.weight"] == ((2048, 1024), "S0")
    assert shapes["model.layers.0.self_attn.o_proj.weight"] == ((1024, 2048), "S1")
    assert shapes["model.layers.0.self_attn.k_norm.weight"] == ((128,), "R")


def test_bytes_of_both_sides() -> None:
    workload = model("tiny", 2, 3, "bfloat16")
    whole = sum(math.prod(spec.shape) for spec in workload.tensors) * 2
    replicated = sum(math.prod(spec.shape) for spec in workload.tensors if spec.dst == "R") * 2
    assert sum(workload.nbytes("src", index) for index in range(2)) == whole
    assert workload.moved_bytes == whole + 2 * replicated
    assert uniform(10, 4096).moved_bytes == 40960


@pytest.mark.parametrize(
    ("shape", "src", "dst", "dtype", "named"), [("gpt-9", 1, 1, "bfloat16", "gpt-9"), ("tiny", 0, 1, "bfloat16", "at least 1")]
)
def test_impossible_models_are_refused(shape: str, src: int, dst: int, dtype: str, named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        model(shape, src, dst, dtype)


def test_unknown_dtype_is_refused() -> None:
    with pytest.raises(ConfigError, match="bfloat61"):
        model("tiny", 1, 1, "bfloat61")
    with pytest.raises(ConfigError, match="at least 1"):
        uniform(0, 4096)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "uint8"])
def test_copies_fill_every_target_with_what_the_pattern_wants(dtype: str) -> None:
    workload = model("tiny", 2, 3, dtype)
    sources = [Shards(workload, "src", index) for index in range(2)]
    for shards in sources:
        shards.fill(1)
    for index in range(3):
        targets = Shards(workload, "dst", index)
        assert targets.wrong(1), "zeros are not the pattern"
        for source, position, part, target in numpy_copies(workload, targets, index):
            np.copyto(target, bits_of(sources[source].tensors[position]).numpy()[part])
        assert targets.wrong(1) == []
        assert targets.wrong(2), "data of another version is not taken for this one"


def test_one_flipped_bit_and_swapped_rows_are_seen() -> None:
    workload = Workload(model("tiny", 1, 1, "bfloat16").tensors, 1, 1, "bfloat16")
    shards = Shards(workload, "dst", 0)
    shards.fill(3)
    bits = bits_of(shards.tensors[0])
    bits[100, 7] ^= 1
    assert shards.wrong(3) == ["model.embed_tokens.weight"]
    bits[100, 7] ^= 1
    assert shards.wrong(3) == []
    bits[[4, 5]] = bits[[5, 4]].clone()
    assert shards.wrong(3) == ["model.embed_tokens.weight"]
