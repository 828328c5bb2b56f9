"""What crosses between two sides: matching of names, errors that list them, pairs."""

from __future__ import annotations

import pytest
import torch
from torch.distributed.tensor import Replicate, Shard

from etha_ray.errors import LayoutError, NamesMismatchError, TensorMismatchError
from etha_ray.weights.agreement import agree
from etha_ray.weights.layouts import Layouts, Seat
from etha_ray.weights.names import named_tensors
from etha_ray.weights.tables import encode_table, make_table
from tests.weights.sides import Group, agreed, crossed


def numbered(*shape: int, start: float = 0.0) -> torch.Tensor:
    return torch.arange(start, start + torch.Size(shape).numel()).reshape(shape)


def test_whole_tensors_cross_by_one_pair() -> None:
    source = Group([{"a": numbered(2, 3), "b": numbered(4)}] * 2)
    target = Group([{"b": torch.zeros(4), "a": torch.zeros(2, 3)} for _ in range(3)])
    agreement = crossed(source, target)
    assert len(agreement.pairs) == 1
    assert [crossing.target.names[0] for crossing in agreement.crossings] == ["a", "b"]
    for held in target.ranks:
        assert torch.equal(held["a"], numbered(2, 3))
        assert torch.equal(held["b"], numbered(4))


def test_a_pair_for_each_combination_of_layouts() -> None:
    whole = {"up.w": numbered(5, 4), "down.w": numbered(4, 6), "norm": numbered(4)}
    source = Group([{n: t.chunk(2)[rank].clone() for n, t in whole.items()} for rank in range(2)], placements=Shard(0))
    target = Group(
        [
            {"up.w": torch.zeros(2 - rank, 4), "down.w": torch.zeros(4, 2), "norm": torch.zeros(4)}
            for rank in (0, 0, 1)  # torch.chunk(3) of 5 rows: 2, 2, 1
        ],
        placements={"up.*": Shard(0), "down.*": [Shard(1)]},
    )
    agreement = crossed(source, target)
    assert len(agreement.pairs) == 4  # everyone; S0 to S0, to S1 and to R
    for rank, held in enumerate(target.ranks):
        assert torch.equal(held["up.w"], whole["up.w"].chunk(3)[rank])
        assert torch.equal(held["down.w"], whole["down.w"].chunk(3, 1)[rank])
        assert torch.equal(held["norm"], whole["norm"])


def test_placements_may_be_a_function_and_a_mesh_have_more_dimensions() -> None:
    whole = numbered(4, 4)
    source = Group([{"w": whole}])
    target = Group(
        [{"w": torch.zeros(2, 2), "v": torch.zeros(1)} for _ in range(4)],
        placements=lambda name, tensor: [Shard(0), Shard(1)] if tensor.ndim == 2 else None,
        mesh=(2, 2),
        strict=False,
    )
    crossed(source, target)
    for rank, held in enumerate(target.ranks):
        assert torch.equal(held["w"], whole.chunk(2)[rank // 2].chunk(2, 1)[rank % 2])


def test_stages_of_a_pipeline_hold_different_tensors() -> None:
    source = Group([{"first": numbered(3)}, {"second": numbered(4, start=9)}, {"second": numbered(4, start=9)}])
    target = Group([{"first": torch.zeros(3), "second": torch.zeros(4)}])
    agreement = crossed(source, target)
    assert {plan.source_ranks for plan in agreement.pairs} == {(0, 1, 2), (0,), (1, 2)}
    assert torch.equal(target.ranks[0]["first"], numbered(3))
    assert torch.equal(target.ranks[0]["second"], numbered(4, start=9))


def test_tied_weights_cross_once_or_to_both() -> None:
    weight = numbered(3, 2)
    tied = {"embed": weight, "head": weight}
    into = torch.zeros(3, 2)
    agreement = crossed(Group([tied]), Group([{"head": into, "embed": into}]))
    assert len(agreement.crossings) == 1
    assert torch.equal(into, weight)
    apart = {"embed": torch.zeros(3, 2), "head": torch.zeros(3, 2)}
    assert len(crossed(Group([tied]), Group([apart])).crossings) == 2
    assert torch.equal(apart["embed"], weight)
    assert torch.equal(apart["head"], weight)
    into.zero_()
    assert len(crossed(Group([apart]), Group([{"embed": into, "head": into}])).crossings) == 1
    assert torch.equal(into, weight)


def test_names_that_one_side_lacks_are_listed_for_both() -> None:
    source = Group([{name: torch.zeros(1) for name in ("a", "b", "extra.1", "extra.2")}])
    target = Group([{name: torch.zeros(1) for name in ("a", "b", "missing")}])
    with pytest.raises(NamesMismatchError, match=r"has 2 that the receiver lacks: extra\.1, extra\.2; the receiver has 1 .*: missing"):
        agreed(source, target)


def test_long_lists_of_names_are_cut() -> None:
    source = Group([{f"w{number:03d}": torch.zeros(1) for number in range(50)}])
    with pytest.raises(NamesMismatchError, match=r"has 49 that the receiver lacks: w001, .*w020 and 29 more; the receiver has 0 .*: none"):
        agreed(source, Group([{"w000": torch.zeros(1)}]))


@pytest.mark.parametrize("lenient", ["sender", "receiver"])
def test_one_side_that_is_not_strict_is_enough(lenient: str) -> None:
    source = Group([{"a": numbered(2), "b": numbered(1)}], strict=lenient != "sender")
    target = Group([{"a": torch.zeros(2), "c": torch.zeros(3)}], strict=lenient != "receiver")
    assert [crossing.source.names for crossing in crossed(source, target).crossings] == [("a",)]
    assert torch.equal(target.ranks[0]["a"], numbered(2))


def test_nothing_in_common_is_always_an_error() -> None:
    source, target = Group([{"a": torch.zeros(1)}], strict=False), Group([{"b": torch.zeros(1)}])
    with pytest.raises(NamesMismatchError, match=r"no name in common\. The sender has a; the receiver has b"):
        agreed(source, target)


@pytest.mark.parametrize("side", ["sender", "receiver"])
def test_only_on_one_side_is_enough(side: str) -> None:
    only = ("*.lora_*",)
    source = Group([{"l.lora_a": numbered(2), "l.w": numbered(3)}], only=only if side == "sender" else ())
    target = Group([{"l.lora_a": torch.zeros(2), "l.v": torch.zeros(3)}], only=only if side == "receiver" else ())
    assert [crossing.source.names for crossing in crossed(source, target).crossings] == [("l.lora_a",)]


def test_shapes_that_differ_are_listed() -> None:
    source = Group([{"a": torch.zeros(2), "b": torch.zeros(2, 2), "c": torch.zeros(1)}])
    target = Group([{"a": torch.zeros(3), "b": torch.zeros(4), "c": torch.zeros(1)}])
    with pytest.raises(TensorMismatchError, match=r"2 tensors have one global shape .* a \[2\] and \[3\], b \[2, 2\] and \[4\]"):
        agreed(source, target)


@pytest.mark.parametrize(
    ("ranks", "placements", "error", "says"),
    [
        (
            [{"a": torch.zeros(2)}, {"a": torch.zeros(3)}],
            None,
            TensorMismatchError,
            r"'a': rank 1 of the sender holds float32 \[3\]",
        ),
        ([{"a": torch.zeros(2)}, {"a": torch.zeros(2).int()}], None, TensorMismatchError, "'a': rank 1 of the sender holds int32"),
        ([{"a": torch.zeros(2)}, {"b": torch.zeros(2)}], Shard(0), TensorMismatchError, r"'a': ranks \[0, 1\] of 2 .*on ranks \[0\]"),
        ([{"a": torch.zeros(2, 3)}, {"a": torch.zeros(2, 4)}], Shard(0), LayoutError, "'a' on the sender"),
        ([{"a": torch.zeros(2)}, {"a": torch.zeros(2)}], Shard(1), LayoutError, "'a'"),
        ([{"a": torch.zeros(2)}, {"a": torch.zeros(2)}], [Shard(0), Replicate()], LayoutError, "'a'"),
    ],
)
def test_ranks_of_one_side_that_do_not_fit(
    ranks: list[dict[str, torch.Tensor]], placements: object, error: type[Exception], says: str
) -> None:
    with pytest.raises(error, match=says):
        agreed(Group(ranks, placements=placements), Group([{"a": torch.zeros(4)}]))


def test_ranks_that_tie_weights_differently() -> None:
    weight = torch.zeros(2)
    source = Group([{"a": weight, "b": weight}, {"a": torch.zeros(2), "b": torch.zeros(2)}])
    with pytest.raises(NamesMismatchError, match="tie and fuse weights alike"):
        agreed(source, Group([{"a": torch.zeros(2), "b": torch.zeros(2)}]))


def test_options_that_differ_between_ranks() -> None:
    tables = [Group([{"a": torch.zeros(1)}], strict=strict).tables()[0] for strict in (True, False)]
    with pytest.raises(TensorMismatchError, match="rank 1 of the sender gives other only= or strict="):
        agree("policy", tables, Group([{"a": torch.zeros(1)}]).tables())


def test_a_large_model_on_many_ranks_is_agreed_on_quickly() -> None:
    tensors = {f"model.layers.{layer}.experts.{expert}.w": torch.zeros(2, 2) for layer in range(40) for expert in range(64)}
    table = make_table(named_tensors(tensors), Layouts(Seat(0, 64), None, Shard(0)), (), True)
    target = Group([{name: torch.zeros(128, 2) for name in tensors}]).tables()
    assert len(agree("policy", [table] * 64, target).crossings) == 2560
    assert len(encode_table(table)) < 30_000  # names repeat themselves
