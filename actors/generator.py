"""The generators: they hold the weights tensor-parallel, receive each version, and use it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from actors.checkpoint import TensorEntry, empty_shards
from actors.model import TensorParallelGenerator, crossings
from actors.sharding import spoil
from actors.text import decode, held_out_batch, load_corpus
from actors.trainer import WINDOW, Training
from actors.worker import Seat, Worker

_HELD_OUT_WINDOWS = 32
_SAMPLE_BYTES = 120


@dataclass(frozen=True)
class Judgement:
    """What the generators make of a version: its loss on held-out text in nats per byte, and text they wrote with it."""

    held_out_loss: float
    sample: str


class Receiver(Worker):
    """A generator's part in a sync."""

    def spoil(self) -> None:
        """Overwrite all weights, so that the next sync has to bring every byte."""
        spoil(self.weights.values())


class Generator(Receiver):
    """Holds its slice of every layer of the transformer and runs inference with the other generators."""

    def __init__(self, seat: Seat, training: Training) -> None:
        super().__init__(seat, crossings(training.model))
        self._training = training

    def build(self) -> Mapping[str, Tensor]:
        self._held_out = held_out_batch(load_corpus(), windows=_HELD_OUT_WINDOWS, length=WINDOW)
        seat, config = self.seat, self._training.model
        self._model = TensorParallelGenerator(config, rank=seat.rank, generators=seat.ranks, device=self.device)
        return self._model.weights

    def judge(self) -> Judgement:
        """Use the weights that arrived. A collective; the answer is the same on all ranks."""
        loss = self._model.loss(self._held_out)
        return Judgement(loss, decode(self._model.sample(_SAMPLE_BYTES, seed=self._training.seed)))


class CheckpointGenerator(Receiver):
    """Room for this rank's part of a checkpoint."""

    def __init__(self, seat: Seat, entries: tuple[TensorEntry, ...]) -> None:
        super().__init__(seat, entries)
        self._entries = entries

    def build(self) -> Mapping[str, Tensor]:
        shards = empty_shards(self._entries, "target", self.seat.rank, self.seat.ranks)
        return {name: shard.to(self.device) for name, shard in shards.items()}
