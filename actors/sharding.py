"""How the two sides of the main job hold one tensor: which placement, which slice, which digest.

Everything here works on one-dimensional meshes: a row of trainers, or a row of generators. The rules are pure
functions of a tensor's name and shape, so trainer, generator and driver agree without talking.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.placement_types import Placement

# A layer is named by the component in front of ".weight" or ".bias"; by two where one says too little ("dense").
_COLUMN_PARALLEL = (
    "q_proj", "k_proj", "v_proj", "query", "key", "value",
    "gate_proj", "up_proj", "intermediate.dense", "fc1", "w1", "w3", "lm_head",
)  # fmt: skip
_ROW_PARALLEL = ("o_proj", "output.dense", "down_proj", "fc2", "w2")
_VOCABULARY_PARALLEL = ("embed_tokens", "word_embeddings")

Side = Literal["source", "target"]


@dataclass(frozen=True)
class Crossing:
    """One tensor that crosses the bus: its global shape, and how each side holds it on its one-dimensional mesh."""

    name: str
    shape: tuple[int, ...]
    source: Placement
    target: Placement

    @property
    def pair(self) -> str:
        """The name of the pair that carries it: a pair is one combination of placements."""
        return pair_name(self.source, self.target)

    def placement(self, side: Side) -> Placement:
        """How `side` holds this tensor."""
        return self.source if side == "source" else self.target


def source_placement(shape: Sequence[int]) -> Placement:
    """The trainers' placement: FSDP's `Shard(0)`; `Replicate()` for a scalar, which has no dimension to cut."""
    return Shard(0) if len(shape) > 0 else Replicate()


def target_placement(name: str, shape: Sequence[int]) -> Placement:
    """The generators' tensor-parallel placement of the tensor `name` with this global shape.

    Column-parallel layers are cut along their outputs (`Shard(0)`, their bias too), row-parallel weights along their
    inputs (`Shard(1)`), token embeddings along the vocabulary (`Shard(0)`); norms, a row-parallel layer's bias and
    all else are whole on every generator (`Replicate()`).
    """
    layer, _, kind = name.rpartition(".")
    if kind == "weight" and len(shape) == 2:
        if _ends_with_component(layer, _COLUMN_PARALLEL) or _ends_with_component(layer, _VOCABULARY_PARALLEL):
            return Shard(0)
        if _ends_with_component(layer, _ROW_PARALLEL):
            return Shard(1)
    if kind == "bias" and len(shape) == 1 and _ends_with_component(layer, _COLUMN_PARALLEL):
        return Shard(0)
    return Replicate()


def placement_token(placement: Placement) -> str:
    """A placement as one short word for names and tables: `S0`, `S1`, `R`.

    Raises ValueError for any placement the main job does not use.
    """
    if isinstance(placement, Shard):
        return f"S{placement.dim}"
    if isinstance(placement, Replicate):
        return "R"
    raise ValueError(f"The main job places tensors with Shard and Replicate only, not {placement!r}.")


def pair_name(source: Placement, target: Placement) -> str:
    """The name of the pair for every tensor that trainers hold as `source` and generators as `target`."""
    return f"{placement_token(source)}-to-{placement_token(target)}"


def shard_range(size: int, parts: int, index: int) -> tuple[int, int]:
    """Start and stop of part `index` when `size` elements are cut into `parts`, by DTensor's rule.

    Each part has ceil(size / parts) elements until none are left, so the last parts may be short or empty.
    """
    chunk = -(-size // parts)
    start = min(index * chunk, size)
    return start, min(start + chunk, size)


def local_slices(shape: Sequence[int], placement: Placement, parts: int, index: int) -> tuple[slice, ...]:
    """The slice of each dimension of a global tensor that rank `index` of `parts` holds; `()` for a scalar."""
    slices = [slice(0, size) for size in shape]
    if isinstance(placement, Shard):
        slices[placement.dim] = slice(*shard_range(shape[placement.dim], parts, index))
    return tuple(slices)


def local_shape(shape: Sequence[int], placement: Placement, parts: int, index: int) -> tuple[int, ...]:
    """The shape of what rank `index` of `parts` holds."""
    return tuple(part.stop - part.start for part in local_slices(shape, placement, parts, index))


def gather_full(local: Tensor, placement: Placement, shape: Sequence[int], parts: int, group: dist.ProcessGroup | None = None) -> Tensor:
    """The whole tensor, put together from the shards of `parts` ranks; a replicated tensor is this rank's own copy.

    A collective for sharded tensors: every rank of `group` (None: the default group) calls it for the same tensors in
    the same order. It serves the check after a sync only; the sync itself never gathers.
    """
    local = local.detach()
    if not isinstance(placement, Shard) or parts == 1:
        return local
    dim = placement.dim
    # Collectives want equal shapes, so short shards travel padded to the first one's size.
    padded_shape = local_shape(shape, placement, parts, 0)
    padded = local.new_zeros(padded_shape)
    padded.narrow(dim, 0, local.shape[dim]).copy_(local)
    gathered = [torch.empty_like(padded) for _ in range(parts)]
    # As bytes: gloo has no bfloat16 or bool on every build, and a digest is about bytes anyway.
    dist.all_gather([_as_bytes(part) for part in gathered], _as_bytes(padded), group=group)
    kept = [part.narrow(dim, 0, local_shape(shape, placement, parts, index)[dim]) for index, part in enumerate(gathered)]
    return torch.cat(kept, dim=dim)


def digest(tensor: Tensor) -> str:
    """A hash of a tensor's dtype, shape and bytes (blake2b, 128 bits, hexadecimal): equal when every bit is."""
    whole = tensor.detach().cpu().contiguous()
    state = hashlib.blake2b(f"{whole.dtype} {tuple(whole.shape)} ".encode(), digest_size=16)
    state.update(_as_bytes(whole).numpy().data)
    return state.hexdigest()


def global_digests(
    shards: Mapping[str, Tensor],
    crossings: Iterable[Crossing],
    side: Side,
    parts: int,
    group: dist.ProcessGroup | None = None,
) -> dict[str, str]:
    """The digest of every whole tensor as this rank of `side` sees it, one tensor gathered at a time.

    A collective, like `gather_full`. A replicated tensor's digest is that of this rank's own copy, so compare every
    rank's answer.
    """
    return {each.name: digest(gather_full(shards[each.name], each.placement(side), each.shape, parts, group)) for each in crossings}


def differences(sources: Sequence[Mapping[str, str]], targets: Sequence[Mapping[str, str]]) -> list[str]:
    """What is not bit-exact, a line a tensor and rank: empty when every rank of both sides has the same digests.

    `sources` and `targets` are the answers of `global_digests`, a rank each; the first source says what is right.
    """
    right = sources[0]
    sides = [(f"trainer {rank}", found) for rank, found in enumerate(sources)]
    sides += [(f"generator {rank}", found) for rank, found in enumerate(targets)]
    return [
        f"{name}: {holder} has {found.get(name, 'nothing')}, trainer 0 has {right.get(name, 'nothing')}"
        for holder, found in sides
        for name in sorted(right.keys() | found.keys())
        if found.get(name) != right.get(name)
    ]


def spoil(tensors: Iterable[Tensor]) -> None:
    """Set every byte of these contiguous tensors to 0xFF (NaN, or -1; True for bool), a pattern that no trained weight has.

    A part that a sync leaves out then shows.
    """
    for tensor in tensors:
        if tensor.dtype == torch.bool:
            tensor.fill_(True)
        else:
            _as_bytes(tensor).fill_(0xFF)


def _ends_with_component(layer: str, suffixes: Sequence[str]) -> bool:
    return any(layer == suffix or layer.endswith(f".{suffix}") for suffix in suffixes)


def _as_bytes(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1).view(torch.uint8)
