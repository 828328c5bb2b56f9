"""The trainers: they hold the weights as FSDP does, `Shard(0)`, and send them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from actors.checkpoint import TensorEntry, load_shards
from actors.model import ModelConfig, ShardedTrainer, crossings
from actors.text import load_corpus, train_batch
from actors.worker import Seat, Worker

WINDOW = 128
"""Bytes of text in one window, for training and for held-out loss."""


@dataclass(frozen=True)
class Training:
    """What the trainers do: `windows` windows of text a trainer and step, at this peak learning rate."""

    model: ModelConfig
    steps: int
    windows: int = 8
    learning_rate: float = 6e-3
    seed: int = 0


class Trainer(Worker):
    """Trains a small decoder-only transformer on real text, together with the other trainers; its weights are DTensors."""

    def __init__(self, seat: Seat, training: Training) -> None:
        super().__init__(seat, crossings(training.model))
        self._training = training

    def build(self) -> Mapping[str, DTensor]:
        training = self._training
        mesh = init_device_mesh(self.device, (self.seat.ranks,))
        self.mesh = mesh
        self._corpus = load_corpus()
        self._model = ShardedTrainer(
            training.model,
            mesh,
            total_steps=training.steps,
            learning_rate=training.learning_rate,
            seed=training.seed,
        )
        return self._model.weights

    def step(self, step: int) -> float:
        """Train one step; returns the loss of all trainers' text before it, in nats per byte. A collective."""
        training = self._training
        batch = train_batch(
            self._corpus,
            step=step,
            rank=self.seat.rank,
            windows=training.windows,
            length=WINDOW,
            seed=training.seed,
        )
        return self._model.step(batch)

    def _local_weights(self) -> Mapping[str, Tensor]:
        return {name: weight.to_local() for name, weight in self._model.weights.items()}


class CheckpointTrainer(Worker):
    """Holds this rank's part of a checkpoint directory; trains nothing."""

    def __init__(self, seat: Seat, entries: tuple[TensorEntry, ...]) -> None:
        super().__init__(seat, entries)
        self._entries = entries

    def build(self) -> Mapping[str, Tensor]:
        shards = load_shards(self._entries, "source", self.seat.rank, self.seat.ranks)
        return {name: shard.to(self.device) for name, shard in shards.items()}
