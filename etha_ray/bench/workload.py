"""What a benchmark moves: tensors with the layouts of both sides, and the shards that one rank holds of them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, Literal, TypeAlias

import msgspec
import numpy as np
import torch

from etha_ray.errors import ConfigError
from etha_ray.layout import Layout
from etha_ray.plan import Side, routes_into

SideName = Literal["src", "dst"]

NumpyCopy: TypeAlias = "tuple[int, int, tuple[slice, ...], np.ndarray[Any, Any]]"
"""Source rank, tensor, part of the source's shard, and the array that it fills."""

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_DTYPES = {name: getattr(torch, name) for name in ("bfloat16", "float16", "float32", "float64", "float8_e4m3fn", "int8", "uint8")}
_CHUNK = 1 << 21


class TensorSpec(msgspec.Struct, frozen=True):
    """One global tensor; ``src`` and ``dst`` are the placements ("S0", "S1", "R") on the one-dimensional mesh of each side."""

    name: str
    shape: tuple[int, ...]
    src: str
    dst: str

    @property
    def pair(self) -> str:
        """The pair that it belongs to: one for each way of laying out both sides."""
        return f"{self.src}-{self.dst}"


class Workload(msgspec.Struct, frozen=True):
    """Tensors of one dtype that go from ``src`` ranks to ``dst`` ranks, all in one batch."""

    tensors: tuple[TensorSpec, ...]
    src: int
    dst: int
    dtype: str

    @property
    def torch_dtype(self) -> torch.dtype:
        """What all tensors are of."""
        dtype: torch.dtype = _DTYPES[self.dtype]
        return dtype

    @property
    def itemsize(self) -> int:
        """Bytes of an element."""
        return self.torch_dtype.itemsize

    def ranks(self, side: SideName) -> int:
        """How many ranks a side has."""
        return self.src if side == "src" else self.dst

    def layout(self, spec: TensorSpec, side: SideName) -> Layout:
        """How a side holds a tensor."""
        return Layout.of((self.ranks(side),), (spec.src if side == "src" else spec.dst,))

    def nbytes(self, side: SideName, index: int) -> int:
        """Bytes that one rank holds."""
        return sum(self.layout(spec, side).region(index, spec.shape).numel for spec in self.tensors) * self.itemsize

    @property
    def moved_bytes(self) -> int:
        """Bytes that arrive in one sync, on all receiving ranks together."""
        return sum(self.nbytes("dst", index) for index in range(self.dst))


def model(shape: str, src: int, dst: int, dtype: str) -> Workload:
    """The decoder-only model ``shape`` from FSDP shards to tensor-parallel shards.

    Raises `ConfigError` for a shape that is not in `MODELS`, an unknown dtype, or a number of ranks below 1.
    """
    if shape not in MODELS:
        raise ConfigError(f"shape {shape!r} is not known: give one of {', '.join(MODELS)}")
    if src < 1 or dst < 1:
        raise ConfigError(f"{src} source and {dst} target ranks: give at least 1 of each")
    if dtype not in _DTYPES:
        raise ConfigError(f"dtype {dtype!r} is not known here: give one of {', '.join(sorted(_DTYPES))}")
    return Workload(tuple(MODELS[shape].tensors()), src, dst, dtype)


def uniform(count: int, nbytes: int) -> Workload:
    """``count`` separate tensors of ``nbytes`` bytes, whole, from one rank to another."""
    if count < 1 or nbytes < 1:
        raise ConfigError(f"{count} tensors of {nbytes} bytes: give at least 1 of each")
    return Workload(tuple(TensorSpec(f"tensor.{number}", (nbytes,), "R", "R") for number in range(count)), 1, 1, "uint8")


def distinct(count: int, nbytes: int) -> Workload:
    """As `uniform`, but each of another size, from ``nbytes`` on: no two share a plan."""
    return Workload(tuple(TensorSpec(f"tensor.{number}", (nbytes + number,), "R", "R") for number in range(count)), 1, 1, "uint8")


class Decoder(msgspec.Struct, frozen=True):
    """The sizes of a decoder-only transformer with grouped-query attention and a gated MLP; its embeddings may be tied."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    tied: bool = True

    def tensors(self) -> Iterator[TensorSpec]:
        """Every weight, as FSDP shards it and as tensor parallelism does: by columns, by rows, or whole."""
        query, key = self.heads * self.head_dim, self.kv_heads * self.head_dim
        by_column = {
            "self_attn.q_proj": (query, self.hidden),
            "self_attn.k_proj": (key, self.hidden),
            "self_attn.v_proj": (key, self.hidden),
            "mlp.gate_proj": (self.intermediate, self.hidden),
            "mlp.up_proj": (self.intermediate, self.hidden),
        }
        by_row = {"self_attn.o_proj": (self.hidden, query), "mlp.down_proj": (self.hidden, self.intermediate)}
        norms = {
            "self_attn.q_norm": self.head_dim,
            "self_attn.k_norm": self.head_dim,
            "input_layernorm": self.hidden,
            "post_attention_layernorm": self.hidden,
        }
        yield TensorSpec("model.embed_tokens.weight", (self.vocabulary, self.hidden), "S0", "S0")
        for layer in range(self.layers):
            prefix = f"model.layers.{layer}."
            yield from (TensorSpec(f"{prefix}{name}.weight", shape, "S0", "S0") for name, shape in by_column.items())
            yield from (TensorSpec(f"{prefix}{name}.weight", shape, "S0", "S1") for name, shape in by_row.items())
            yield from (TensorSpec(f"{prefix}{name}.weight", (size,), "S0", "R") for name, size in norms.items())
        yield TensorSpec("model.norm.weight", (self.hidden,), "S0", "R")
        if not self.tied:
            yield TensorSpec("lm_head.weight", (self.vocabulary, self.hidden), "S0", "S0")


MODELS = {
    "qwen3-0.6b": Decoder(layers=28, hidden=1024, intermediate=3072, heads=16, kv_heads=8, head_dim=128, vocabulary=151936),
    "qwen3-8b": Decoder(layers=36, hidden=4096, intermediate=12288, heads=32, kv_heads=8, head_dim=128, vocabulary=151936, tied=False),
    "tiny": Decoder(layers=2, hidden=64, intermediate=96, heads=4, kv_heads=2, head_dim=16, vocabulary=257),
}
"""Shapes that the benchmarks know. "tiny" shards unevenly and is for tests."""


class Shards:
    """What one rank of a side holds: zeros at first. Each tensor has a storage of its own, on ``device``.

    With ``as_values`` the pattern of `fill` and `wrong` are numbers, rounded to the dtype, and else bits: numbers survive a cast.
    """

    def __init__(self, workload: Workload, side: SideName, index: int, device: torch.device | None = None, as_values: bool = False) -> None:
        self._workload = workload
        self._device = device or torch.device("cpu")
        self._as_values = as_values
        self._regions = [workload.layout(spec, side).region(index, spec.shape) for spec in workload.tensors]
        self.tensors = [torch.zeros(region.shape, dtype=workload.torch_dtype, device=self._device) for region in self._regions]

    def fill(self, version: int) -> None:
        """Write into each element what `wrong` with the same version expects there."""
        for position, tensor in enumerate(self.tensors):
            for part, expected in self._pattern(position, tensor, version):
                part.copy_(expected)

    def wrong(self, version: int) -> list[str]:
        """The names of the tensors that hold anything else than `fill` with this version wrote at the same global indices."""
        return [
            self._workload.tensors[position].name
            for position, tensor in enumerate(self.tensors)
            if not all(torch.equal(part, expected) for part, expected in self._pattern(position, tensor, version))
        ]

    def _pattern(self, position: int, tensor: torch.Tensor, version: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Pieces of a tensor, and what each should hold: a hash of the global index, the tensor and the version."""
        shape, held = self._workload.tensors[position].shape, tensor if self._as_values else bits_of(tensor)
        width = math.prod(shape[1:])
        for start, local, size in self._regions[position].boxes():
            # All dimensions but the first as one axis of global offsets within a row.
            columns = torch.zeros((1,), dtype=torch.int64, device=self._device)
            for dim in range(1, len(shape)):
                along = torch.arange(start[dim], start[dim] + size[dim], device=self._device)
                columns = (columns[:, None] * shape[dim] + along).reshape(-1)
            step = max(1, _CHUNK // max(1, len(columns)))
            for row in range(0, size[0], step):
                count = min(step, size[0] - row)
                rows = torch.arange(start[0] + row, start[0] + row + count, device=self._device) * width
                indices = (rows[:, None] + columns).to(torch.int32)
                expected = (indices * -1640531535 + (position * 7919 + version * 104729)) >> 15
                part = held[tuple(slice(first, first + n) for first, n in zip(local, size, strict=True))][row : row + count]
                yield part, (expected.float() if self._as_values else expected).to(held.dtype).reshape(part.shape)


def numpy_copies(workload: Workload, targets: Shards, index: int) -> list[NumpyCopy]:
    """All pieces that fill target rank ``index``."""
    copies: list[NumpyCopy] = []
    for position, spec in enumerate(workload.tensors):
        sides = [_side(workload.layout(spec, side)) for side in ("src", "dst")]
        for route in routes_into(sides[0], sides[1], spec.shape, index):
            for box in route.boxes:
                target = bits_of(targets.tensors[position]).numpy()[_slices(box.target_start, box.size)]
                copies.append((route.source, position, _slices(box.source_start, box.size), target))
    return copies


def _side(layout: Layout) -> Side:
    return Side(layout, tuple(range(layout.ranks)), ("host",) * layout.ranks)


def _slices(start: Sequence[int], size: Sequence[int]) -> tuple[slice, ...]:
    return tuple(slice(first, first + count) for first, count in zip(start, size, strict=True))


def bits_of(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor's memory as integers of its element size, which NumPy knows and which compare bit for bit."""
    return tensor.view(_BITS[tensor.dtype.itemsize])
