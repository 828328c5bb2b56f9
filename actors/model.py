"""A small decoder-only transformer, held in two ways: FSDP-style by the trainers, tensor-parallel by the generators.

Both sides run the same block below. The trainers' parameters are whole inside a block (FSDP gathers them), so its
`sum_over_ranks` does nothing; a generator's block has its slice of every layer, and the partial sums meet in an
all-reduce.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from actors.sharding import Crossing, local_shape, shard_range, source_placement, target_placement
from actors.text import START_TOKEN, VOCABULARY, Batch

_NORM_EPSILON = 1e-6
_ROTARY_BASE = 10_000.0
_WARMUP_STEPS = 10
_FINAL_RATE_SHARE = 0.1

SumOverRanks = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class ModelConfig:
    """Sizes of the transformer; the defaults give 1.4 million parameters.

    Vocabulary and MLP are odd, so that no even number of ranks divides them.
    """

    vocabulary: int = VOCABULARY
    layers: int = 3
    heads: int = 12
    head_size: int = 16
    mlp: int = 509

    @property
    def width(self) -> int:
        """Elements of one token's activation."""
        return self.heads * self.head_size

    def check_generators(self, generators: int) -> None:
        """Raise ValueError unless `generators` ranks can share the attention heads evenly."""
        if generators < 1 or self.heads % generators != 0:
            fitting = [count for count in range(1, self.heads + 1) if self.heads % count == 0]
            raise ValueError(
                f"{generators} generators cannot share {self.heads} attention heads evenly; choose a number of generators out of {fitting}."
            )


def _identity(partial: Tensor) -> Tensor:
    return partial


def _rotate(x: Tensor) -> Tensor:
    """Rotary positions for x of shape (windows, heads, length, head size)."""
    half = x.shape[-1] // 2
    rates = _ROTARY_BASE ** (-torch.arange(half, dtype=torch.float32, device=x.device) / half)
    angles = torch.arange(x.shape[-2], dtype=torch.float32, device=x.device).outer(rates)
    cos, sin = angles.cos(), angles.sin()
    first, second = x[..., :half], x[..., half:]
    return torch.cat([first * cos - second * sin, first * sin + second * cos], dim=-1)


def _run_block(x: Tensor, weights: Mapping[str, Tensor], head_size: int, sum_over_ranks: SumOverRanks) -> Tensor:
    """One layer over x of shape (windows, length, width), with as many heads and MLP columns as `weights` hold."""

    def heads(projection: str) -> Tensor:
        projected = F.linear(hidden, weights[f"{projection}.weight"])
        return projected.view(*projected.shape[:-1], -1, head_size).transpose(1, 2)

    hidden = _normalize(x, weights["attention_norm.weight"])
    mixed = F.scaled_dot_product_attention(_rotate(heads("q_proj")), _rotate(heads("k_proj")), heads("v_proj"), is_causal=True)
    x = x + sum_over_ranks(F.linear(mixed.transpose(1, 2).flatten(-2), weights["o_proj.weight"]))

    hidden = _normalize(x, weights["mlp_norm.weight"])
    gated = F.silu(F.linear(hidden, weights["gate_proj.weight"])) * F.linear(hidden, weights["up_proj.weight"])
    return x + sum_over_ranks(F.linear(gated, weights["down_proj.weight"]))


def _normalize(x: Tensor, weight: Tensor) -> Tensor:
    return F.rms_norm(x, weight.shape, weight, _NORM_EPSILON)


class Block(nn.Module):
    """One layer's parameters; `_run_block` is its arithmetic."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width = config.width
        self._head_size = config.head_size
        self.attention_norm = nn.RMSNorm(width)
        self.q_proj = nn.Linear(width, width, bias=False)
        self.k_proj = nn.Linear(width, width, bias=False)
        self.v_proj = nn.Linear(width, width, bias=False)
        self.o_proj = nn.Linear(width, width, bias=False)
        self.mlp_norm = nn.RMSNorm(width)
        self.gate_proj = nn.Linear(width, config.mlp, bias=False)
        self.up_proj = nn.Linear(width, config.mlp, bias=False)
        self.down_proj = nn.Linear(config.mlp, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return _run_block(x, dict(self.named_parameters()), self._head_size, _identity)


class Transformer(nn.Module):
    """The whole model.

    `forward` takes int64 tokens of shape (windows, length) and returns logits of shape (windows, length, vocabulary).
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocabulary, config.width)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = nn.RMSNorm(config.width)
        self.lm_head = nn.Linear(config.width, config.vocabulary, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed_tokens(tokens)
        for layer in self.layers:
            x = layer(x)
        logits: Tensor = self.lm_head(_normalize(x, self.norm.weight))
        return logits


def build_model(config: ModelConfig, seed: int = 0) -> Transformer:
    """A new model, the same on every rank for the same seed. Leaves torch's global random state as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Transformer(config)
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2:
                # Layers that add to the residual stream start smaller, so that its size does not grow with depth.
                adds_to_stream = name.endswith(("o_proj.weight", "down_proj.weight"))
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * config.layers) if adds_to_stream else 0.02)
    return model


def parameter_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name and global shape of every parameter, in the model's order; the same on every rank."""
    with torch.device("meta"):
        model = Transformer(config)
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def crossings(config: ModelConfig) -> tuple[Crossing, ...]:
    """Every parameter with its placements on both sides, ordered by name."""
    shapes = sorted(parameter_shapes(config).items())
    return tuple(Crossing(name, shape, source_placement(shape), target_placement(name, shape)) for name, shape in shapes)


def generator_shapes(config: ModelConfig, generators: int, rank: int) -> dict[str, tuple[int, ...]]:
    """Name and local shape of every parameter on generator `rank` of `generators`.

    Raises ValueError when the generators cannot share the attention heads evenly.
    """
    config.check_generators(generators)
    return {name: local_shape(shape, target_placement(name, shape), generators, rank) for name, shape in parameter_shapes(config).items()}


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean loss per byte, in nats, as a scalar."""
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


class ShardedTrainer:
    """One trainer of a data-parallel group: its `Shard(0)` part of every parameter, and AdamW over those parts.

    All ranks of `mesh` (one-dimensional, over the default process group) call the constructor and `step` together. It says on
    which device the model is.
    `weights` maps names to the parameters themselves. They are updated in place: their storage stays where it is for
    the trainer's whole life, so it may be registered once, and is at rest whenever no `step` runs.
    """

    def __init__(self, config: ModelConfig, mesh: DeviceMesh, *, total_steps: int, learning_rate: float = 3e-3, seed: int = 0) -> None:
        self._model = build_model(config, seed).to(mesh.device_type)
        for layer in self._model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(self._model, mesh=mesh)
        # Taken here: FSDP swaps whole parameters in while a step runs, these objects stay the sharded ones.
        self.weights: dict[str, DTensor] = {}
        for name, parameter in self._model.named_parameters():
            if not isinstance(parameter, DTensor):
                raise TypeError(f"FSDP left the parameter {name} unsharded ({type(parameter).__name__}).")
            self.weights[name] = parameter
        self._mesh = mesh
        self._optimizer = torch.optim.AdamW(self._model.parameters(), lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.01)
        self._schedule = torch.optim.lr_scheduler.LambdaLR(self._optimizer, lambda step: _rate_share(step, total_steps))

    def step(self, batch: Batch) -> float:
        """Learn from this rank's batch together with the others; returns the mean loss of all batches (nats a byte)."""
        inputs, targets = (tokens.to(self._mesh.device_type) for tokens in (batch.inputs, batch.targets))
        loss = cross_entropy(self._model(inputs), targets)
        loss.backward()  # type: ignore[no-untyped-call]
        self._optimizer.step()
        self._schedule.step()
        self._optimizer.zero_grad()
        mean = loss.detach() / self._mesh.size()
        dist.all_reduce(mean, group=self._mesh.get_group())
        return mean.item()


def _rate_share(step: int, total_steps: int) -> float:
    """The learning rate at `step` as a share of its peak: a short rise, then a cosine down to a tenth."""
    rise = min(1.0, (step + 1) / _WARMUP_STEPS)
    progress = min(1.0, step / max(1, total_steps))
    return rise * (_FINAL_RATE_SHARE + (1 - _FINAL_RATE_SHARE) * 0.5 * (1 + math.cos(math.pi * progress)))


class TensorParallelGenerator:
    """One generator of a tensor-parallel group: its slice of every parameter, and inference with those slices.

    `weights` maps names to plain tensors on `device`, of the shapes of `generator_shapes`, full of NaN until weights arrive;
    their storage never moves. `loss` and `sample` are collectives: all ranks of `group` (None: the default group)
    call them together with equal arguments.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        rank: int = 0,
        generators: int = 1,
        group: dist.ProcessGroup | None = None,
        device: str = "cpu",
    ) -> None:
        self._config = config
        self._device = device
        self._rank = rank
        self._generators = generators
        self._group = group
        # NaN and not zeros: a weight that never arrived must spoil the loss, not hide in it.
        self.weights: dict[str, Tensor] = {
            name: torch.full(shape, math.nan, device=device) for name, shape in generator_shapes(config, generators, rank).items()
        }

    @torch.no_grad()
    def loss(self, batch: Batch) -> float:
        """Mean loss per byte over `batch`, in nats."""
        return cross_entropy(self._logits(batch.inputs.to(self._device)), batch.targets.to(self._device)).item()

    @torch.no_grad()
    def sample(self, length: int, *, temperature: float = 0.7, seed: int = 0) -> list[int]:
        """Write `length` bytes from nothing: the same on all ranks, and in every run with the same weights and seed."""
        generator = torch.Generator(self._device).manual_seed(seed)
        tokens = torch.tensor([[START_TOKEN]], device=self._device)
        for _ in range(length):
            logits = self._logits(tokens)[0, -1]
            logits[START_TOKEN] = -math.inf
            chosen = torch.multinomial(torch.softmax(logits / temperature, dim=0), 1, generator=generator)
            # Ranks on different processors may round differently: one of them decides.
            if self._generators > 1:
                dist.broadcast(chosen, group_src=0, group=self._group)
            tokens = torch.cat([tokens, chosen[None]], dim=1)
        return [int(token) for token in tokens[0, 1:]]

    def _logits(self, tokens: Tensor) -> Tensor:
        x = self._embed(tokens)
        for index in range(self._config.layers):
            prefix = f"layers.{index}."
            layer = {name.removeprefix(prefix): weight for name, weight in self.weights.items() if name.startswith(prefix)}
            x = _run_block(x, layer, self._config.head_size, self._sum_over_ranks)
        part = F.linear(_normalize(x, self.weights["norm.weight"]), self.weights["lm_head.weight"])
        return self._whole_vocabulary(part)

    def _embed(self, tokens: Tensor) -> Tensor:
        """Each rank looks up the tokens of its part of the vocabulary, and adds nothing for the others."""
        start, stop = shard_range(self._config.vocabulary, self._generators, self._rank)
        mine = (tokens >= start) & (tokens < stop)
        rows = F.embedding((tokens - start).where(mine, 0), self.weights["embed_tokens.weight"])
        return self._sum_over_ranks(rows.where(mine[..., None], 0.0))

    def _sum_over_ranks(self, partial: Tensor) -> Tensor:
        if self._generators > 1:
            dist.all_reduce(partial, group=self._group)
        return partial

    def _whole_vocabulary(self, part: Tensor) -> Tensor:
        """Logits of all ranks side by side; shorter parts travel padded, since a gather wants equal shapes."""
        if self._generators == 1:
            return part
        chunk = shard_range(self._config.vocabulary, self._generators, 0)[1]
        padded = F.pad(part, (0, chunk - part.shape[-1]))
        parts = [torch.empty_like(padded) for _ in range(self._generators)]
        dist.all_gather(parts, padded, group=self._group)
        return torch.cat(parts, dim=-1)[..., : self._config.vocabulary]
