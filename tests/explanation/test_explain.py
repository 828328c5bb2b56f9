"""What `explain` may be given, and what it refuses."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.tensor import Replicate, Shard

import etha_ray
from etha_ray.errors import ConfigError, LayoutError
from etha_ray.explanation import explain
from etha_ray.layout import Layout, Pieces
from etha_ray.plan import Side, plan


def test_all_forms_mean_the_same() -> None:
    wanted = explain("4x2: S0,S1", "8: R", (64, 32))
    layouts = Layout.decode("4x2: S0,S1"), Layout.decode("8: R")
    sides = (
        Side(layouts[0], tuple(range(8)), ("host0",) * 8),
        Side(layouts[1], tuple(range(8, 16)), ("host1",) * 8),
    )
    assert explain(*layouts, [64, 32]) == wanted
    assert explain(((4, 2), [Shard(0), Shard(1)]), ((8,), [Replicate()]), torch.Size((64, 32)), torch.bfloat16) == wanted
    assert explain(*sides, "64x32", 2) == wanted
    assert explain(plan(*sides, (64, 32))) == wanted
    assert etha_ray.explain is explain


def test_explicit_pieces() -> None:
    source = Pieces((4, 6), (((0, 0), (4, 2)), ((0, 2), (4, 4))))
    assert explain(source, "1: R", (4, 6), 1).pairs == {(0, 0): 8, (1, 0): 16}


def test_ranks_are_numbered_through_and_seated_on_hosts() -> None:
    made = explain("3: S0", "3: S0", (6,), gpus_per_host=2)
    assert made.source.agents + made.target.agents == tuple(range(6))
    assert made.source.hosts + made.target.hosts == ("host0", "host0", "host1", "host1", "host2", "host2")
    assert made.hosts == ("host0", "host1", "host2")


@pytest.mark.parametrize(("shape", "wanted"), [("", ()), ("7", (7,)), (" 2 x 3", (2, 3)), ((), ()), ([5], (5,))])
def test_shapes(shape: Any, wanted: tuple[int, ...]) -> None:
    assert explain("2: R", "1: R", shape).shape == wanted


@pytest.mark.parametrize(("dtype", "itemsize"), [("bfloat16", 2), (torch.float64, 8), ("float8_e4m3fn", 1), (3, 3)])
def test_dtypes(dtype: Any, itemsize: int) -> None:
    assert explain("2: S0", "1: R", (4,), dtype).itemsize == itemsize


@pytest.mark.parametrize(
    ("arguments", "options", "error", "says"),
    [
        (("2 S0", "1: R", (4,)), {}, LayoutError, "source: '2 S0' is not a layout"),
        (("2: S0", "1: Q", (4,)), {}, LayoutError, "target: 'Q' is not a placement"),
        (("2: S0", 8, (4,)), {}, LayoutError, "target is 8, but it must be a layout"),
        (("2: S0", ((2,), [object()]), (4,)), {}, LayoutError, "target: placement"),
        (("2: S1", "1: R", (4,)), {}, LayoutError, "shard dimension 1"),
        (("2: S0", "1: P(sum)", (4,)), {}, LayoutError, "has a Partial"),
        (("2: S0", "1: R", "4x"), {}, LayoutError, "'4x' is not a shape"),
        (("2: S0", "1: R", (4, -1)), {}, LayoutError, "is not a shape"),
        (("2: S0", "1: R", (4,), "bfloat61"), {}, ConfigError, "dtype 'bfloat61' is not known"),
        (("2: S0", "1: R", (4,), 0), {}, ConfigError, "dtype 0 is not known"),
        (("2: S0", "1: R", (4,)), {"gpus_per_host": 0}, ConfigError, "gpus_per_host is 0"),
        (("2: S0", "1: R", (4,)), {"bandwidth": 0.0}, ConfigError, "bandwidth is 0"),
        (("2: S0", "1: R", (4,)), {"bandwidth": float("nan")}, ConfigError, "bandwidth is nan"),
        (("2: S0", "1: R"), {}, ConfigError, "give source, target and shape"),
        ((Side(Layout.whole(), (0,), ("a",)), "1: R", (4,)), {}, LayoutError, "give both as Side"),
    ],
)
def test_what_cannot_be_read_is_named(arguments: Any, options: Any, error: type[Exception], says: str) -> None:
    with pytest.raises(error) as caught:
        explain(*arguments, **options)
    assert says in str(caught.value)


def test_needs_no_ray_and_no_process_group_and_no_drawing_library(tmp_path: Path) -> None:
    code = (
        "import sys, etha_ray, torch.distributed\n"
        f"made = etha_ray.explain('4x2: S0,S1', '8: R', '64x32'); made.save({str(tmp_path / 'made.svg')!r}); made._repr_html_()\n"
        "assert not torch.distributed.is_initialized()\n"
        "print([name for name in ('ray', 'PIL', 'matplotlib', 'etcd', 'grpc', 'cupy') if name in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_file_is_written_by_its_ending(tmp_path: Path) -> None:
    pytest.importorskip("PIL")
    made = explain("2: S0", "2: S1", (8, 8))
    for name, start in (("made.svg", b"<svg "), ("made.PNG", b"\x89PNG"), ("made.html", b"<!doctype html>")):
        made.save(tmp_path / name)
        assert (tmp_path / name).read_bytes().startswith(start)
    with pytest.raises(ConfigError, match=r"ends in \.svg, \.png or \.html"):
        made.save(tmp_path / "made.pdf")
