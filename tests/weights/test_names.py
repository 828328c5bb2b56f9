"""Which tensors of a model take part, and what both sides call them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from etha_ray.errors import ConfigError
from etha_ray.weights.names import PRESETS, among, fits, named_tensors, patterns, shared_names


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 3)
        self.lm_head = nn.Linear(3, 5, bias=False)
        self.lm_head.weight = self.embed.weight
        self.norm = nn.BatchNorm1d(3)
        self.register_buffer("mask", torch.ones(2), persistent=False)


def test_a_modules_parameters_with_tied_ones_once() -> None:
    found = {one.own: one.names for one in named_tensors(Tied())}
    assert found == {
        "embed.weight": ("embed.weight", "lm_head.weight"),
        "norm.weight": ("norm.weight",),
        "norm.bias": ("norm.bias",),
    }


def test_persistent_buffers_on_request() -> None:
    found = {one.own for one in named_tensors(Tied(), buffers=True)}
    assert {"norm.running_mean", "norm.running_var", "norm.num_batches_tracked"} < found
    assert "mask" not in found


def test_tensors_by_name_tied_by_their_memory() -> None:
    weight = torch.zeros(4, 3)
    found = named_tensors({"a": weight, "b": weight[:], "c": weight[:2], "d": weight.t(), "empty": weight[:0], "none": weight[:0]})
    assert [one.names for one in found] == [("a", "b"), ("c",), ("d",), ("empty",), ("none",)]


def test_what_wrappers_add_to_names_is_taken_off() -> None:
    assert shared_names("_orig_mod.layers.0._checkpoint_wrapped_module.w", None) == "layers.0.w"


@pytest.mark.parametrize(
    ("own", "shared"),
    [
        ("model.layers.0.self_attn.qkv_proj.weight", tuple(f"model.layers.0.self_attn.{part}_proj.weight" for part in "qkv")),
        ("qkv_proj.bias", ("q_proj.bias", "k_proj.bias", "v_proj.bias")),
        ("mlp.gate_up_proj.weight", ("mlp.gate_proj.weight", "mlp.up_proj.weight")),
        ("model.norm.weight", "model.norm.weight"),
        ("my_qkv_proj.weight", "my_qkv_proj.weight"),
    ],
)
def test_presets_take_ends_from_a_dot_on(own: str, shared: str | tuple[str, ...]) -> None:
    assert shared_names(own, "llama") == shared_names(own, "qwen") == shared_names(own, PRESETS["llama"]) == shared


def test_the_longest_end_wins() -> None:
    assert shared_names("a.b.w", {"w": "x", "b.w": "y"}) == "a.y"
    assert shared_names("a.b.w", {"a.b.w": "z", "b.w": "y"}) == "z"


def test_a_function_renames_and_leaves_out() -> None:
    def rename(own: str) -> str | list[str] | None:
        return None if own == "b" else ["x", "y"] if own == "c" else f"model.{own}"

    found = named_tensors({name: torch.zeros(2) for name in "abc"}, rename)
    assert [(one.own, one.names, one.parts) for one in found] == [("a", ("model.a",), ()), ("c", (), ("x", "y"))]


def test_only() -> None:
    tensors = named_tensors({"l.lora_a": torch.zeros(1), "l.w": torch.zeros(1)})
    assert [one.own for one in among(tensors, patterns("*.lora_*"))] == ["l.lora_a"]
    assert [one.own for one in among(tensors, patterns(["*.w", "nothing"]))] == ["l.w"]
    assert [one.own for one in among(tensors, patterns(None))] == ["l.lora_a", "l.w"]
    with pytest.raises(ConfigError, match=r"none of 2 tensors fits only=\['\*\.q'\].*l\.lora_a"):
        among(tensors, ("*.q",))
    assert fits("x", ())


@pytest.mark.parametrize(
    ("source", "rename", "says"),
    [
        ([torch.zeros(1)], None, "a list has no weights"),
        ({"a": 3}, None, "'a' is a int and no tensor"),
        ({"a": torch.zeros(1)}, "gpt", "no preset: give one of \\['llama', 'qwen'\\]"),
        ({"a": torch.zeros(1), "b": torch.zeros(1)}, {"b": "a"}, "'a' and 'b' are both called 'a'"),
        ({"a": torch.zeros(1), "b": torch.zeros(1)}, {"b": ["c", "a"]}, "'a' and 'b' are both called 'a'"),
    ],
)
def test_bad_input(source: object, rename: object, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        named_tensors(source, rename)  # type: ignore[arg-type]
