"""Which rank of its side a process is, and how it holds tensors."""

from __future__ import annotations

import pytest
import torch
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard

from etha_ray.errors import ConfigError, LayoutError
from etha_ray.layout import Layout, MeshSpec
from etha_ray.weights.layouts import Held, Layouts, Seat, find_seat
from tests.layout.dtensor import playing


def test_alone() -> None:
    assert find_seat([torch.zeros(1)], None, None, None) == Seat(0, 1)


def test_given_by_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "2")
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert find_seat([], None, None, None) == Seat(2, 4)
    assert find_seat([], None, 3, 1) == Seat(1, 3)
    assert find_seat([], MeshSpec((2, 3), (1, 1)), None, None) == Seat(4, 6)


def test_in_a_process_group() -> None:
    with playing(5, 8):
        assert find_seat([], None, None, None) == Seat(5, 8)
        assert find_seat([], None, 4, 1) == Seat(1, 4, (4, 5, 6, 7))


def test_by_the_meshes_of_dtensors() -> None:
    with playing(6, 8):
        half = DeviceMesh("cpu", [4, 5, 6, 7])
        tensor = DTensor.from_local(torch.zeros(2, 3), half, [Shard(0)])
        seat = find_seat([torch.zeros(1), tensor], None, None, None)
        assert seat == Seat(2, 4, (4, 5, 6, 7))
        assert seat == find_seat([], half, None, None)
        held = Layouts(seat).of("w", tensor)
        assert held == Held(Layout((4,), ("S0",)), (0, 1, 2, 3), (8, 3), True)


def test_a_stage_of_a_pipeline_is_in_the_mesh_that_it_was_sliced_from() -> None:
    with playing(5, 8):
        mesh = init_device_mesh("cpu", (2, 4), mesh_dim_names=("stage", "shard"))
        tensor = DTensor.from_local(torch.zeros(2), mesh["shard"], [Shard(0)])
        seat = find_seat([tensor], None, None, None)
        assert seat == Seat(5, 8, tuple(range(8)))
        assert Layouts(seat).of("w", tensor).ranks == (4, 5, 6, 7)


def test_a_mesh_that_is_not_of_this_side() -> None:
    with playing(1, 8):
        seat = find_seat([], None, 4, 1)
        tensor = DTensor.from_local(torch.zeros(2), DeviceMesh("cpu", [1, 6]), [Shard(0)])
        with pytest.raises(ConfigError, match=r"a mesh has ranks \[6\], which are not among the 4 of this side"):
            Layouts(seat).of("w", tensor)


def test_plain_tensors() -> None:
    tensor = torch.zeros(4, 2)
    assert Layouts(Seat(1, 2)).of("w", tensor) == Held(None, None, (4, 2), True)
    assert Layouts(Seat(1, 2), None, Shard(0)).of("w", tensor) == Held(Layout((2,), ("S0",)), (0, 1), (4, 2), False)
    by_name = Layouts(Seat(3, 4), MeshSpec((2, 2), (1, 1)), {"*.w": [Replicate(), Shard(1)], "*": [Replicate(), Replicate()]})
    assert by_name.of("a.w", tensor) == Held(Layout((2, 2), ("R", "S1")), (0, 1, 2, 3), (4, 2), False)
    assert by_name.of("b", tensor) == Held(Layout((2, 2), ("R", "R")), (0, 1, 2, 3), (4, 2), True)


@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        (lambda: find_seat([], None, 2, None), ConfigError, "give both, or neither"),
        (lambda: find_seat([], None, 2, 2), ConfigError, "ranks go from 0"),
        (lambda: Layouts(Seat(0, 4), MeshSpec((2,), (0,))), ConfigError, "does not fit rank 0 of 4"),
        (lambda: Layouts(Seat(0, 2), MeshSpec((2,), (1,))), ConfigError, "does not fit rank 0 of 2"),
        (lambda: Layouts(Seat(0, 2), None, [Shard(0), Shard(1)]).of("w", torch.zeros(2, 2)), LayoutError, "'w'"),
        (lambda: Layouts(Seat(0, 2), None, Shard(2)).of("w", torch.zeros(2, 2)), LayoutError, "'w'"),
    ],
)
def test_bad_input(call: object, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        call()  # type: ignore[operator]
