"""DeepSeek-V3, a mixture of experts of 671 billion parameters, as a trainer shards it and as an inference engine does.

Shapes are those of its published configuration, without the layer that predicts a second token. Weights are
``[output, input]``; the 256 experts of a layer are stacked to one tensor, or one matrix each.

========================  ============================================  ====================================================
tensor                    trainer, mesh FSDP x 16 EP                    engine, mesh EP x 8 TP
========================  ============================================  ====================================================
stacked experts           ``S1,S0``: FSDP cuts the rows of each expert  ``S0,S1`` (gate, up) or ``S0,S2`` (down)
matrix of one expert      explicit: rows over its group's FSDP ranks    explicit: cut over the 8 TP ranks of its place
attention, dense layers   ``S0,S0``: rows over all ranks                ``R,S0`` by columns, ``R,S1`` by rows
norms, router, latent     ``S0,S0``                                     ``R,R``
========================  ============================================  ====================================================
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Literal

from etha_ray.errors import ConfigError
from etha_ray.layout import Layout, Piece, Pieces

LAYERS, DENSE_LAYERS, EXPERTS = 61, 3, 256
HIDDEN, DENSE, EXPERT, VOCABULARY = 7168, 18432, 2048, 129280
_HEADS, _QUERY_RANK, _KEY_RANK, _NOPE, _ROPE, _VALUE = 128, 1536, 512, 128, 64, 128
SOURCE_EP, TARGET_TP = 16, 8

Form = Literal["stacked", "matrices"]
"""Whether the experts of a layer are one tensor, or each matrix is one."""

_Cut = Literal["S0", "S1", "R"]


@dataclass(frozen=True)
class ModelTensor:
    """One parameter, and how both sides hold it."""

    name: str
    shape: tuple[int, ...]
    source: Layout | Pieces
    target: Layout | Pieces


@dataclass(frozen=True)
class Moe:
    """The model between ``ranks`` trainer ranks and half as many engine ranks.

    Raises:
        ConfigError: ``ranks`` is not a multiple of 16 that gives each side at least one rank per expert group.
    """

    ranks: int
    form: Form = "stacked"

    def __post_init__(self) -> None:
        groups = self.ranks // 2 // TARGET_TP
        if self.ranks < SOURCE_EP or self.ranks % SOURCE_EP or EXPERTS % groups:
            raise ConfigError(f"{self.ranks} source ranks do not fit: give 16, 32, 64, ... up to 4096 (16 times a power of 2)")

    @property
    def fsdp(self) -> int:
        """Trainer ranks that share the experts of one group."""
        return self.ranks // SOURCE_EP

    @property
    def target_ep(self) -> int:
        """Groups of experts in the engine."""
        return self.ranks // 2 // TARGET_TP

    def tensors(self) -> Iterator[ModelTensor]:
        """Every parameter, in the order of the layers."""
        yield self._dense("model.embed_tokens", (VOCABULARY, HIDDEN), "S0")
        for layer in range(LAYERS):
            prefix = f"model.layers.{layer}."
            yield from self._attention(prefix)
            if layer < DENSE_LAYERS:
                yield from self._mlp(f"{prefix}mlp.", DENSE)
            else:
                yield self._dense(f"{prefix}mlp.gate", (EXPERTS, HIDDEN), "R")
                yield self._dense(f"{prefix}mlp.gate.e_score_correction_bias", (EXPERTS,), "R")
                yield from self._mlp(f"{prefix}mlp.shared_experts.", EXPERT)
                yield from self._experts(f"{prefix}mlp.experts.")
        yield self._dense("model.norm", (HIDDEN,), "R")
        yield self._dense("lm_head", (VOCABULARY, HIDDEN), "S0")

    def _attention(self, prefix: str) -> Iterator[ModelTensor]:
        shapes: dict[str, tuple[tuple[int, ...], _Cut]] = {
            "q_a_proj": ((_QUERY_RANK, HIDDEN), "R"),
            "q_a_layernorm": ((_QUERY_RANK,), "R"),
            "q_b_proj": ((_HEADS * (_NOPE + _ROPE), _QUERY_RANK), "S0"),
            "kv_a_proj_with_mqa": ((_KEY_RANK + _ROPE, HIDDEN), "R"),
            "kv_a_layernorm": ((_KEY_RANK,), "R"),
            "kv_b_proj": ((_HEADS * (_NOPE + _VALUE), _KEY_RANK), "S0"),
            "o_proj": ((HIDDEN, _HEADS * _VALUE), "S1"),
        }
        yield from (self._dense(f"{prefix}self_attn.{name}", shape, cut) for name, (shape, cut) in shapes.items())
        yield self._dense(f"{prefix}input_layernorm", (HIDDEN,), "R")
        yield self._dense(f"{prefix}post_attention_layernorm", (HIDDEN,), "R")

    def _mlp(self, prefix: str, width: int) -> Iterator[ModelTensor]:
        yield self._dense(f"{prefix}gate_proj", (width, HIDDEN), "S0")
        yield self._dense(f"{prefix}up_proj", (width, HIDDEN), "S0")
        yield self._dense(f"{prefix}down_proj", (HIDDEN, width), "S1")

    def _dense(self, name: str, shape: tuple[int, ...], cut: _Cut) -> ModelTensor:
        source = Layout((self.fsdp, SOURCE_EP), ("S0", "S0"))
        return ModelTensor(name, shape, source, Layout((self.target_ep, TARGET_TP), ("R", cut)))

    def _experts(self, prefix: str) -> Iterator[ModelTensor]:
        matrices: tuple[tuple[str, int, int, int], ...] = (
            ("gate_proj", EXPERT, HIDDEN, 0),
            ("up_proj", EXPERT, HIDDEN, 0),
            ("down_proj", HIDDEN, EXPERT, 1),
        )
        for name, rows, columns, cut in matrices:
            if self.form == "stacked":
                source = Layout((self.fsdp, SOURCE_EP), ("S1", "S0"))
                target = Layout((self.target_ep, TARGET_TP), ("S0", f"S{cut + 1}"))
                yield ModelTensor(f"{prefix}{name}", (EXPERTS, rows, columns), source, target)
                continue
            for expert in range(EXPERTS):
                trained = _placed((rows, columns), 0, self.ranks, range(expert * SOURCE_EP // EXPERTS, self.ranks, SOURCE_EP))
                first = expert * self.target_ep // EXPERTS * TARGET_TP
                served = _placed((rows, columns), cut, self.ranks // 2, range(first, first + TARGET_TP))
                yield ModelTensor(f"{prefix}{expert}.{name}", (rows, columns), trained, served)


@cache
def _placed(shape: tuple[int, int], dim: int, ranks: int, holders: range) -> Pieces:
    """A matrix cut along ``dim`` over ``holders``, of which other ranks hold nothing."""
    pieces: list[Piece | None] = [None] * ranks
    step = -(-shape[dim] // len(holders))
    for number, holder in enumerate(holders):
        start = min(number * step, shape[dim])
        size = min(step, shape[dim] - start)
        pieces[holder] = ((start, 0), (size, shape[1])) if dim == 0 else ((0, start), (shape[0], size))
    return Pieces(shape, tuple(pieces))
