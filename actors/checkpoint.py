"""A Hugging Face checkpoint directory, read shard by shard.

The trainers load their `Shard(0)` slices, the generators hold tensor-parallel ones; no process ever loads a whole
sharded tensor.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor.placement_types import Placement

from actors.sharding import Crossing, Side, local_shape, local_slices, source_placement, spoil, target_placement

_SINGLE_FILE = "model.safetensors"
_INDEX_FILE = "model.safetensors.index.json"

# The names of safetensors' header.
_DTYPES = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "I16": torch.int16, "I32": torch.int32, "I64": torch.int64,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F16": torch.float16, "BF16": torch.bfloat16,
    "F32": torch.float32, "F64": torch.float64,
}  # fmt: skip


@dataclass(frozen=True)
class TensorEntry(Crossing):
    """One tensor of a checkpoint, and where its bytes lie."""

    file: Path
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of the whole tensor."""
        return math.prod(self.shape) * self.dtype.itemsize


def read_checkpoint(directory: str | Path) -> tuple[TensorEntry, ...]:
    """Every tensor of a checkpoint directory, ordered by name: the same in every process. Reads headers only.

    The directory holds `model.safetensors`, or `model.safetensors.index.json` with the files it names.

    Raises FileNotFoundError when the directory or one of its files is missing, ValueError when the index or a file
    says what this cannot use, and ModuleNotFoundError without the `safetensors` package.
    """
    folder = Path(directory)
    entries = [entry for file, names in _files_of(folder).items() for entry in _read_header(file, names)]
    if not entries:
        raise ValueError(f"The checkpoint {folder} holds no tensors.")
    return tuple(sorted(entries, key=lambda entry: entry.name))


def load_shards(entries: tuple[TensorEntry, ...], side: Side, rank: int, ranks: int) -> dict[str, Tensor]:
    """The part of every tensor that `rank` of `ranks` holds, read from the files; contiguous, in its own memory."""
    shards: dict[str, Tensor] = {}
    for file in sorted({entry.file for entry in entries}):
        with _opened(file) as opened:
            for entry in entries:
                if entry.file == file:
                    shards[entry.name] = _read_shard(opened, entry, entry.placement(side), rank, ranks)
    return {entry.name: shards[entry.name] for entry in entries}


def empty_shards(entries: tuple[TensorEntry, ...], side: Side, rank: int, ranks: int) -> dict[str, Tensor]:
    """Tensors of the shapes that `load_shards` gives, to receive into; spoiled, so that a part left out shows."""
    shards = {entry.name: torch.empty(local_shape(entry.shape, entry.placement(side), ranks, rank), dtype=entry.dtype) for entry in entries}
    spoil(shards.values())
    return shards


def _files_of(folder: Path) -> dict[Path, list[str] | None]:
    """The checkpoint's files, each with the names of its tensors as the index tells them (None: all that are in it)."""
    if not folder.is_dir():
        raise FileNotFoundError(f"There is no checkpoint directory {folder}.")
    index = folder / _INDEX_FILE
    if not index.is_file():
        single = folder / _SINGLE_FILE
        if not single.is_file():
            raise FileNotFoundError(f"{folder} holds neither {_SINGLE_FILE} nor {_INDEX_FILE}; save the model as safetensors first.")
        return {single: None}
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"].items()
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{index} is not an index of safetensors files (JSON with a weight_map): {error!r}") from error
    files: dict[Path, list[str] | None] = {}
    for name, file_name in sorted(weight_map):
        if not isinstance(file_name, str) or Path(file_name).name != file_name:
            raise ValueError(f"{index} places the tensor {name} in {file_name!r}; a file beside the index was expected.")
        file = folder / file_name
        if not file.is_file():
            raise FileNotFoundError(f"{index} places the tensor {name} in {file_name}, which is not in {folder}; fetch that file too.")
        names = files.setdefault(file, [])
        if names is not None:
            names.append(name)
    return files


def _read_header(file: Path, names: list[str] | None) -> Iterator[TensorEntry]:
    with _opened(file) as opened:
        present = set(opened.keys())
        for name in sorted(present) if names is None else names:
            if name not in present:
                raise ValueError(f"The index places the tensor {name} in {file}, which does not hold it.")
            header = opened.get_slice(name)
            dtype = _DTYPES.get(header.get_dtype())
            if dtype is None:
                raise ValueError(f"The tensor {name} in {file} is of type {header.get_dtype()}; supported are {', '.join(_DTYPES)}.")
            shape = tuple(header.get_shape())
            yield TensorEntry(name, shape, source_placement(shape), target_placement(name, shape), file, dtype)


def _read_shard(opened: Any, entry: TensorEntry, placement: Placement, rank: int, ranks: int) -> Tensor:
    shape = local_shape(entry.shape, placement, ranks, rank)
    shard = torch.empty(shape, dtype=entry.dtype)
    if not entry.shape:
        shard.copy_(opened.get_tensor(entry.name))
    elif shard.numel() > 0:
        # A copy: what safetensors hands out may be a view of the mapped file.
        shard.copy_(opened.get_slice(entry.name)[local_slices(entry.shape, placement, ranks, rank)])
    return shard


@contextmanager
def _opened(file: Path) -> Iterator[Any]:
    try:
        from safetensors import SafetensorError, safe_open
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("Reading a checkpoint directory needs the safetensors package: pip install safetensors") from error
    try:
        with safe_open(file, framework="pt", device="cpu") as opened:
            yield opened
    except SafetensorError as error:
        raise ValueError(f"{file} cannot be read as a safetensors file: {error}") from error
