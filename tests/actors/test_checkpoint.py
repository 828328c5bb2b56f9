from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.placement_types import Placement

from actors.checkpoint import TensorEntry, empty_shards, load_shards, read_checkpoint
from actors.sharding import Side, digest, local_slices, placement_token

from .minilm import SENTENCES, MiniLM, model_directory

safetensors = pytest.importorskip("safetensors.torch")


def _tensors() -> dict[str, Tensor]:
    torch.manual_seed(7)
    return {
        "model.embed_tokens.weight": torch.randn(37, 6),
        "model.layers.0.self_attn.q_proj.weight": torch.randn(7, 6).to(torch.bfloat16),
        "model.layers.0.self_attn.q_proj.bias": torch.randn(7),
        "model.layers.0.self_attn.o_proj.weight": torch.randn(6, 7).to(torch.float16),
        "model.layers.0.mlp.down_proj.bias": torch.randn(6),
        "model.norm.weight": torch.randn(6),
        "model.position_ids": torch.arange(5).reshape(1, 5),
        "model.mask": torch.tensor([True, False, True]),
        "model.scale": torch.tensor(3.5, dtype=torch.float64),
    }


def _save(folder: Path, tensors: Mapping[str, Tensor], files: int) -> Path:
    folder.mkdir()
    if files == 1:
        safetensors.save_file(dict(tensors), folder / "model.safetensors")
        return folder
    names = list(tensors)
    weight_map = {name: f"model-{index % files + 1:05}-of-{files:05}.safetensors" for index, name in enumerate(names)}
    for file in set(weight_map.values()):
        safetensors.save_file({name: tensors[name] for name in names if weight_map[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def _reassemble(entry: TensorEntry, shards: list[Tensor], placement: Placement) -> Tensor:
    whole = torch.empty(entry.shape, dtype=entry.dtype)
    for rank, shard in enumerate(shards):
        whole[local_slices(entry.shape, placement, len(shards), rank)] = shard
    return whole


@pytest.mark.parametrize("files", [1, 3])
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_shards_of_all_ranks_make_the_checkpoint_again(tmp_path: Path, files: int, ranks: int) -> None:
    tensors = _tensors()
    entries = read_checkpoint(_save(tmp_path / "model", tensors, files))
    assert [entry.name for entry in entries] == sorted(tensors)
    for side in ("source", "target"):
        shards = [load_shards(entries, side, rank, ranks) for rank in range(ranks)]
        for entry in entries:
            whole = _reassemble(entry, [shard[entry.name] for shard in shards], entry.placement(side))
            assert digest(whole) == digest(tensors[entry.name]), entry


def test_placements_follow_the_names(tmp_path: Path) -> None:
    entries = {entry.name: entry for entry in read_checkpoint(_save(tmp_path / "model", _tensors(), 1))}
    assert entries["model.scale"].source == Replicate()
    assert all(entry.source == Shard(0) for name, entry in entries.items() if name != "model.scale")
    targets = {name: entry.target for name, entry in entries.items()}
    assert targets == {
        "model.embed_tokens.weight": Shard(0),
        "model.layers.0.self_attn.q_proj.weight": Shard(0),
        "model.layers.0.self_attn.q_proj.bias": Shard(0),
        "model.layers.0.self_attn.o_proj.weight": Shard(1),
        "model.layers.0.mlp.down_proj.bias": Replicate(),
        "model.norm.weight": Replicate(),
        "model.position_ids": Replicate(),
        "model.mask": Replicate(),
        "model.scale": Replicate(),
    }


def test_each_shard_owns_memory_of_its_own_size(tmp_path: Path) -> None:
    entries = read_checkpoint(_save(tmp_path / "model", _tensors(), 1))
    for shard in load_shards(entries, "target", 1, 2).values():
        assert shard.is_contiguous()
        assert shard.untyped_storage().nbytes() == shard.numel() * shard.itemsize


def test_empty_shards_have_the_shapes_of_loaded_ones_and_other_bytes(tmp_path: Path) -> None:
    entries = read_checkpoint(_save(tmp_path / "model", _tensors(), 2))
    loaded = load_shards(entries, "target", 2, 3)
    empty = empty_shards(entries, "target", 2, 3)
    assert list(empty) == list(loaded)
    for name, shard in empty.items():
        assert (shard.shape, shard.dtype) == (loaded[name].shape, loaded[name].dtype)
        assert shard.numel() == 0 or digest(shard) != digest(loaded[name])


def test_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no checkpoint directory"):
        read_checkpoint(tmp_path / "absent")
    with pytest.raises(FileNotFoundError, match=r"neither model\.safetensors nor"):
        read_checkpoint(tmp_path)
    folder = _save(tmp_path / "model", _tensors(), 3)
    (folder / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="fetch that file too"):
        read_checkpoint(folder)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ("{", "not an index of safetensors files"),
        ("[]", "not an index of safetensors files"),
        ('{"weight_map": {"w": "../model.safetensors"}}', "a file beside the index was expected"),
        ('{"weight_map": {"w": "model.safetensors"}}', "does not hold it"),
        ('{"weight_map": {}}', "holds no tensors"),
    ],
)
def test_bad_index_is_refused(tmp_path: Path, index: str, message: str) -> None:
    folder = _save(tmp_path / "model", _tensors(), 1)
    (folder / "model.safetensors.index.json").write_text(index)
    with pytest.raises(ValueError, match=message):
        read_checkpoint(folder)


def test_damaged_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"\xff" * 64)
    with pytest.raises(ValueError, match="cannot be read as a safetensors file"):
        read_checkpoint(tmp_path)


def test_real_pretrained_model_survives_sharding_on_both_sides() -> None:
    folder = model_directory()
    entries = read_checkpoint(folder)
    assert sum(entry.nbytes for entry in entries) > 90_000_000
    assert {placement_token(entry.target) for entry in entries} == {"S0", "S1", "R"}

    from_file = MiniLM(folder, safetensors.load_file(folder / "model.safetensors")).embed(SENTENCES)
    sides: tuple[tuple[Side, int], ...] = (("source", 3), ("target", 2))
    for side, ranks in sides:
        shards = [load_shards(entries, side, rank, ranks) for rank in range(ranks)]
        whole = {entry.name: _reassemble(entry, [shard[entry.name] for shard in shards], entry.placement(side)) for entry in entries}
        assert torch.equal(MiniLM(folder, whole).embed(SENTENCES), from_file)

    river, stream, software = from_file
    assert torch.allclose(from_file.norm(dim=1), torch.ones(3), atol=1e-5)
    assert float(river @ stream) > float(river @ software) + 0.3
