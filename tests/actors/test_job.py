"""Both groups and the bus between them, without the screen."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import ray
import torch
from torch import Tensor

from actors.checkpoint import read_checkpoint
from actors.generator import CheckpointGenerator, Generator
from actors.job import checkpoint_workload, sync_job, training_workload
from actors.model import ModelConfig
from actors.sharding import gather_full
from actors.trainer import Training

from .minilm import SENTENCES, MiniLM, model_directory

pytestmark = pytest.mark.usefixtures("ray_cluster")

SMALL = Training(ModelConfig(layers=1, heads=6, head_size=8, mlp=61), steps=4, windows=2)


@pytest.mark.slow  # five actors and their agents
def test_each_version_arrives_whole_where_nothing_divides_evenly() -> None:
    trainers, generators = 3, 2
    with sync_job(training_workload(SMALL), trainers, generators) as job:
        judgements = []
        for step in range(2):
            losses = job.trainers.call("step", step)
            assert len(losses) == trainers
            assert len(set(losses)) == 1
            sync = job.sync()
            assert sync.differences == ()
            assert sync.seconds > 0
            assert sync.byte_map.total == sync.nbytes
            assert [len(row) for row in sync.byte_map.nbytes] == [generators] * trainers
            assert sum(sum(row) > 0 for row in sync.byte_map.nbytes) == trainers
            answers = job.generators.call("judge")
            assert answers.count(answers[0]) == generators
            judgements.append(answers[0])
        assert judgements[1].held_out_loss < judgements[0].held_out_loss < 6


class EmbeddingGenerator(CheckpointGenerator):
    """Computes sentence embeddings from nothing but the weights that arrived."""

    def embed(self, folder: Path, sentences: Sequence[str]) -> Tensor:
        whole = {each.name: gather_full(self.weights[each.name], each.target, each.shape, self.seat.ranks) for each in self.crossings}
        return MiniLM(folder, whole).embed(sentences)


@pytest.mark.slow
def test_a_pretrained_model_gives_the_same_embeddings_after_it_crossed() -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    folder = model_directory()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as the actors do: more threads add up in another order
    expected = MiniLM(folder, safetensors.load_file(folder / "model.safetensors")).embed(SENTENCES)
    torch.set_num_threads(threads)
    workload = replace(checkpoint_workload(read_checkpoint(folder)), generator=EmbeddingGenerator)
    with sync_job(workload, 2, 2) as job:
        assert job.sync().differences == ()
        for embeddings in job.generators.call("embed", folder, SENTENCES):
            assert torch.equal(embeddings, expected)


class FailingGenerator(Generator):
    """Cannot be built."""

    def build(self) -> dict[str, Tensor]:
        raise ValueError("no such weights")


@pytest.mark.slow
def test_a_worker_that_fails_ends_the_job() -> None:
    workload = replace(training_workload(SMALL), generator=FailingGenerator)
    with pytest.raises(ValueError, match="no such weights"), sync_job(workload, 1, 1):
        pass
    assert ray.util.list_named_actors(all_namespaces=True) == []
