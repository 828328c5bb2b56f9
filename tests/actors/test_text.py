from __future__ import annotations

import pytest
import torch

from actors.text import START_TOKEN, Corpus, decode, held_out_batch, load_corpus, train_batch


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    return load_corpus()


def test_corpus_is_english_in_two_contiguous_parts(corpus: Corpus) -> None:
    whole = len(corpus.train) + len(corpus.held_out)
    assert whole > 200_000
    assert len(corpus.held_out) == whole // 10
    for part in (corpus.train, corpus.held_out):
        assert part.dtype == torch.int64
        assert part.ndim == 1
        assert int(part.max()) < START_TOKEN
        assert " the " in decode(part[:5_000].tolist())


def test_held_out_text_is_not_trained_on(corpus: Corpus) -> None:
    size = 60
    train = bytes(corpus.train.tolist())
    trained = {train[at : at + size] for at in range(len(train) - size)}
    held_out = bytes(corpus.held_out.tolist())
    probes = [held_out[at : at + size] for at in range(0, len(held_out) - size, 7)]
    assert sum(probe in trained for probe in probes) < 0.05 * len(probes)


def test_corpus_is_the_same_every_time(corpus: Corpus) -> None:
    again = load_corpus()
    assert torch.equal(again.train, corpus.train)
    assert torch.equal(again.held_out, corpus.held_out)


def test_train_batch_repeats_for_its_seed_and_differs_by_rank_and_step(corpus: Corpus) -> None:
    def inputs(step: int = 3, rank: int = 1, seed: int = 0) -> torch.Tensor:
        return train_batch(corpus, step=step, rank=rank, windows=4, length=32, seed=seed).inputs

    assert torch.equal(inputs(), inputs())
    for other in (inputs(step=4), inputs(rank=0), inputs(seed=1)):
        assert not torch.equal(inputs(), other)


def test_inputs_are_the_targets_moved_by_one_behind_the_start_token(corpus: Corpus) -> None:
    for batch in (
        train_batch(corpus, step=0, rank=0, windows=5, length=16),
        held_out_batch(corpus, windows=5, length=16),
    ):
        assert batch.inputs.shape == batch.targets.shape == (5, 16)
        assert batch.inputs.dtype == batch.targets.dtype == torch.int64
        assert (batch.inputs[:, 0] == START_TOKEN).all()
        assert torch.equal(batch.inputs[:, 1:], batch.targets[:, :-1])


def test_held_out_batch_spans_the_whole_held_out_text(corpus: Corpus) -> None:
    batch = held_out_batch(corpus, windows=3, length=16)
    assert torch.equal(batch.targets[0], corpus.held_out[:16])
    assert torch.equal(batch.targets[-1], corpus.held_out[-16:])


def test_window_that_does_not_fit_is_refused(corpus: Corpus) -> None:
    with pytest.raises(ValueError, match="does not fit a text of"):
        held_out_batch(corpus, windows=1, length=len(corpus.held_out) + 1)
    with pytest.raises(ValueError, match="window of 0 bytes"):
        train_batch(corpus, step=0, rank=0, windows=1, length=0)


def test_decode_leaves_out_the_start_token_and_survives_cut_characters() -> None:
    assert decode([START_TOKEN, 104, 105]) == "hi"
    assert decode([104, 0xE2]) == "h\N{REPLACEMENT CHARACTER}"
