from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.placement_types import Placement

from actors.model import (
    ModelConfig,
    ShardedTrainer,
    TensorParallelGenerator,
    build_model,
    cross_entropy,
    crossings,
    generator_shapes,
    parameter_shapes,
)
from actors.sharding import (
    digest,
    gather_full,
    global_digests,
    local_shape,
    local_slices,
    pair_name,
    shard_range,
    target_placement,
)
from actors.text import held_out_batch, load_corpus, train_batch

from .gloo import run_group

SMALL = ModelConfig(layers=2, heads=6, head_size=8, mlp=61)


def _fill(generator: TensorParallelGenerator, config: ModelConfig, rank: int, generators: int, whole: dict[str, Tensor]) -> None:
    for each in crossings(config):
        generator.weights[each.name].copy_(whole[each.name][local_slices(each.shape, each.target, generators, rank)])


@pytest.mark.parametrize(("size", "parts"), [(10, 2), (7, 3), (257, 4), (2, 4), (0, 2), (5, 4)])
def test_shard_range_cuts_as_torch_chunk_does(size: int, parts: int) -> None:
    chunks = [chunk.tolist() for chunk in torch.arange(size).chunk(parts)] if size else []
    chunks += [[]] * (parts - len(chunks))
    assert [list(range(*shard_range(size, parts, index))) for index in range(parts)] == chunks


@pytest.mark.parametrize(
    ("name", "shape", "expected"),
    [
        ("layers.0.q_proj.weight", (8, 8), Shard(0)),
        ("layers.0.q_proj.bias", (8,), Shard(0)),
        ("lm_head.weight", (9, 8), Shard(0)),
        ("layers.0.down_proj.weight", (8, 9), Shard(1)),
        ("layers.0.down_proj.bias", (8,), Replicate()),
        ("encoder.layer.0.attention.self.key.weight", (8, 8), Shard(0)),
        ("encoder.layer.0.attention.output.dense.weight", (8, 8), Shard(1)),
        ("encoder.layer.0.output.LayerNorm.weight", (8,), Replicate()),
        ("pooler.dense.weight", (8, 8), Replicate()),
        ("monkey.weight", (8, 8), Replicate()),
        ("scale", (), Replicate()),
    ],
)
def test_target_placement_follows_the_layer_name(name: str, shape: tuple[int, ...], expected: Placement) -> None:
    assert target_placement(name, shape) == expected


def test_pair_name_tells_both_placements() -> None:
    assert pair_name(Shard(0), Shard(1)) == "S0-to-S1"
    assert pair_name(Replicate(), Replicate()) == "R-to-R"


def test_digest_tells_bits_apart() -> None:
    zero = torch.zeros(4)
    assert digest(zero) == digest(torch.zeros(8)[::2])
    for other in (-zero, zero.reshape(2, 2), zero.to(torch.int32), torch.zeros(3), torch.zeros(())):
        assert digest(other) != digest(zero)
    assert digest(torch.tensor(math.nan)) == digest(torch.tensor(math.nan))


def test_default_sizes_leave_uneven_shards() -> None:
    shapes = parameter_shapes(ModelConfig())
    assert 0.8e6 < sum(math.prod(shape) for shape in shapes.values()) < 2e6
    for trainers in (2, 3):
        assert any(shape[0] % trainers for shape in shapes.values())


@pytest.mark.parametrize("generators", [1, 2, 3, 4])
def test_generators_shares_make_the_whole_model(generators: int) -> None:
    config = ModelConfig()
    parameters = crossings(config)
    ranks = [generator_shapes(config, generators, rank) for rank in range(generators)]
    assert {type(each.target) for each in parameters} == {Shard, Replicate}
    for each in parameters:
        held = sum(math.prod(rank[each.name]) for rank in ranks)
        assert held == math.prod(each.shape) * (1 if isinstance(each.target, Shard) else generators)


def test_generators_that_cannot_share_the_heads_are_refused() -> None:
    with pytest.raises(ValueError, match=r"5 generators cannot share 12 attention heads.*\[1, 2, 3, 4, 6, 12\]"):
        generator_shapes(ModelConfig(), 5, 0)


def test_building_a_model_leaves_the_random_state_alone() -> None:
    torch.manual_seed(3)
    before = torch.random.get_rng_state()
    first, second = build_model(SMALL, seed=1), build_model(SMALL, seed=1)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def test_one_generator_computes_what_the_model_computes() -> None:
    model = build_model(SMALL, seed=5)
    batch = held_out_batch(load_corpus(), windows=4, length=24)
    generator = TensorParallelGenerator(SMALL)
    assert math.isnan(generator.loss(batch))
    _fill(generator, SMALL, 0, 1, dict(model.named_parameters()))
    with torch.no_grad():
        assert generator.loss(batch) == pytest.approx(cross_entropy(model(batch.inputs), batch.targets).item(), abs=1e-6)


def _compare_tensor_parallel(rank: int, folder: Path) -> None:
    model = build_model(SMALL, seed=5)
    # Larger weights than a fresh model's, so that every layer matters to the loss.
    whole = {name: parameter.detach() * (1 if parameter.ndim == 1 else 4) for name, parameter in model.named_parameters()}
    model.load_state_dict(whole)
    batch = held_out_batch(load_corpus(), windows=4, length=24)
    with torch.no_grad():
        expected = cross_entropy(model(batch.inputs), batch.targets).item()
    alone = TensorParallelGenerator(SMALL)
    _fill(alone, SMALL, 0, 1, whole)

    for generators in (2, 3):
        group = dist.new_group(list(range(generators)))
        if rank >= generators:
            continue
        generator = TensorParallelGenerator(SMALL, rank=rank, generators=generators, group=group)
        _fill(generator, SMALL, rank, generators, whole)
        assert abs(generator.loss(batch) - expected) < 1e-5
        assert generator.sample(20, seed=1) == alone.sample(20, seed=1)
        digests = global_digests(generator.weights, crossings(SMALL), "target", generators, group)
        assert digests == {name: digest(tensor) for name, tensor in whole.items()}
    (folder / f"done{rank}").touch()


def test_tensor_parallel_loss_equals_the_whole_models(tmp_path: Path) -> None:
    run_group(_compare_tensor_parallel, 3, tmp_path)
    assert len(list(tmp_path.glob("done*"))) == 3


def _train(rank: int, folder: Path) -> None:
    ranks, steps = dist.get_world_size(), 30
    mesh = init_device_mesh("cpu", (ranks,))
    corpus = load_corpus()
    trainer = ShardedTrainer(SMALL, mesh, total_steps=steps, learning_rate=1e-2)
    shapes = parameter_shapes(SMALL)
    assert {name: tuple(weight.shape) for name, weight in trainer.weights.items()} == shapes
    locals_before = {name: weight.to_local() for name, weight in trainer.weights.items()}
    for name, weight in trainer.weights.items():
        assert weight.placements == (Shard(0),)
        assert tuple(weight.to_local().shape) == local_shape(shapes[name], Shard(0), ranks, rank)
    first = gather_full(locals_before["lm_head.weight"], Shard(0), shapes["lm_head.weight"], ranks)
    assert torch.equal(first, build_model(SMALL).lm_head.weight)

    losses = []
    for step in range(steps):
        losses.append(trainer.step(train_batch(corpus, step=step, rank=rank, windows=8, length=32)))
        assert all(torch.isfinite(weight.to_local()).all() for weight in trainer.weights.values())

    for name, weight in trainer.weights.items():
        assert weight.to_local().data_ptr() == locals_before[name].data_ptr(), name
        assert torch.equal(weight.full_tensor(), gather_full(weight.to_local(), Shard(0), shapes[name], ranks))
    (folder / f"losses{rank}.json").write_text(json.dumps(losses))


def test_two_trainers_learn_together_without_moving_their_weights(tmp_path: Path) -> None:
    run_group(_train, 2, tmp_path)
    first, second = (json.loads((tmp_path / f"losses{rank}.json").read_text()) for rank in range(2))
    assert first == second
    assert first[0] == pytest.approx(math.log(257), abs=0.2)
    assert first[-1] < 3.6


def test_one_trainer_is_a_group_too(tmp_path: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        trainer = ShardedTrainer(SMALL, init_device_mesh("cpu", (1,)), total_steps=1)
        assert math.isfinite(trainer.step(train_batch(load_corpus(), step=0, rank=0, windows=2, length=16)))
    finally:
        dist.destroy_process_group()
