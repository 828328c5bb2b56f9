"""The text that the main job trains on: the Python language reference that every Python carries, byte by byte.

A token is a byte, 0 to 255; token 256 stands before the first byte of every window, so that a generator can start
from nothing.
"""

from __future__ import annotations

import pydoc_data.topics
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

START_TOKEN = 256
VOCABULARY = 257
_HELD_OUT_SHARE = 0.1
_TABLE_EDGES = ("|", "+-", "+=", "--", "==")


@dataclass(frozen=True)
class Corpus:
    """One text in two parts that do not overlap; both are one-dimensional int64 tensors of byte values."""

    train: Tensor
    held_out: Tensor


@dataclass(frozen=True)
class Batch:
    """Windows of text, int64 of shape (windows, length): `targets[i, t]` is the byte after `inputs[i, :t + 1]`."""

    inputs: Tensor
    targets: Tensor


def load_corpus() -> Corpus:
    """The topics of `pydoc_data` by name, each paragraph once, without drawn tables; the last tenth is held out."""
    topics = pydoc_data.topics.topics
    # Topics contain one another ("while" is part of "compound"): a tenth of the held-out text would be trained on.
    paragraphs: dict[str, str] = {}
    for name in sorted(topics):
        for paragraph in topics[name].split("\n\n"):
            words = " ".join(paragraph.split())
            if not words.startswith(_TABLE_EDGES):
                paragraphs.setdefault(words, paragraph)
    text = "\n\n".join(paragraphs.values()).encode()
    tokens = torch.frombuffer(bytearray(text), dtype=torch.uint8).to(torch.int64)
    cut = len(tokens) - int(len(tokens) * _HELD_OUT_SHARE)
    return Corpus(train=tokens[:cut].clone(), held_out=tokens[cut:].clone())


def train_batch(corpus: Corpus, *, step: int, rank: int, windows: int, length: int, seed: int = 0) -> Batch:
    """The windows that trainer `rank` learns from at `step`.

    Random ones, the same in every run with this seed, different for each rank and step.

    Raises ValueError when a window is longer than the text.
    """
    text = corpus.train
    _check_length(text, length)
    # One stream per (seed, step, rank): a rank's batch depends neither on the other ranks nor on the steps before.
    generator = torch.Generator().manual_seed((seed * 1_000_003 + step) * 1_000_003 + rank)
    starts = torch.randint(len(text) - length + 1, (windows,), generator=generator)
    return _windows_at(text, starts.tolist(), length)


def held_out_batch(corpus: Corpus, *, windows: int, length: int) -> Batch:
    """`windows` windows spread evenly over the held-out text.

    Always the same ones, so that losses of different versions compare.

    Raises ValueError when a window is longer than the text.
    """
    text = corpus.held_out
    _check_length(text, length)
    starts = torch.linspace(0, len(text) - length, windows).to(torch.int64)
    return _windows_at(text, starts.tolist(), length)


def decode(tokens: Sequence[int]) -> str:
    """Bytes as text; what is not UTF-8 becomes U+FFFD. The start token is left out."""
    return bytes(token for token in tokens if token < START_TOKEN).decode("utf-8", errors="replace")


def _windows_at(text: Tensor, starts: Sequence[int], length: int) -> Batch:
    targets = torch.stack([text[start : start + length] for start in starts])
    first = torch.full((len(starts), 1), START_TOKEN, dtype=torch.int64)
    return Batch(inputs=torch.cat([first, targets[:, :-1]], dim=1), targets=targets)


def _check_length(text: Tensor, length: int) -> None:
    if not 1 <= length <= len(text):
        raise ValueError(f"A window of {length} bytes does not fit a text of {len(text)} bytes; choose 1 to {len(text)}.")
