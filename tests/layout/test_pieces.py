"""Shards that ranks describe themselves."""

from __future__ import annotations

import pytest

from etha_ray.errors import LayoutError
from etha_ray.layout import Pieces


def test_each_rank_has_its_box() -> None:
    pieces = Pieces((6, 4), (((0, 0), (2, 4)), None, ((2, 1), (4, 3)), ((0, 0), (2, 4)), ((5, 0), (1, 0))))
    assert pieces.ranks == 5
    assert pieces.region(2, (6, 4)).intervals == (((2, 6),), ((1, 4),))
    assert [pieces.region(rank, (6, 4)).shape for rank in range(5)] == [(2, 4), (0, 0), (4, 3), (2, 4), (1, 0)]
    assert pieces.holders() == {((0, 0), (2, 4)): (0, 3), ((2, 1), (4, 3)): (2,)}
    assert pieces.partial is None


def test_a_tensor_without_dimensions() -> None:
    pieces = Pieces((), (((), ()), ((), ())))
    assert pieces.region(1, ()).numel == 1
    assert pieces.holders() == {((), ()): (0, 1)}
    pieces.check_source()


def test_lists_are_taken_and_equal_pieces_are_equal() -> None:
    one = Pieces([4], [([0], [2]), ([2], [2])])  # type: ignore[arg-type]
    other = Pieces((4,), (((0,), (2,)), ((2,), (2,))))
    assert one == other
    assert hash(one) == hash(other)
    assert one.encode() == "pieces of 4: 0+2 2+2"


def test_encode_tells_pieces_apart() -> None:
    texts = [
        Pieces((4, 4), (((0, 0), (4, 2)), None)),
        Pieces((4, 4), (None, ((0, 0), (4, 2)))),
        Pieces((4, 4), (((0, 0), (2, 4)), None)),
        Pieces((4, 5), (((0, 0), (4, 2)), None)),
    ]
    assert len({pieces.encode() for pieces in texts}) == 4


@pytest.mark.parametrize(
    ("shape", "pieces", "says"),
    [
        ((4,), (), "at least one rank"),
        ((-1,), (None,), "below 0"),
        ((4.0,), (None,), "sequence of integers"),
        ((4,), (((0,), (4, 1)),), "rank 0 holds"),
        ((4, 4), (None, ((0,), (4,))), "rank 1 holds"),
        ((4,), (((2,), (3,)),), r"\[2:5\], which is not inside a tensor of shape \(4,\)"),
        ((4,), (((-1,), (2,)),), "not inside"),
        ((4,), (((1,), (-1,)),), "not inside"),
        ((4,), ((("a",), (1,)),), "offsets of rank 0"),
        ((), (((), ()), None), "rank 1 holds nothing"),
    ],
)
def test_what_cannot_be_is_refused(shape: tuple[int, ...], pieces: tuple[object, ...], says: str) -> None:
    with pytest.raises(LayoutError, match=says):
        Pieces(shape, pieces)  # type: ignore[arg-type]


def test_pieces_belong_to_one_shape() -> None:
    pieces = Pieces((4,), (((0,), (4,)),))
    with pytest.raises(LayoutError, match=r"shape \(4,\) cannot be used for one of shape \(5,\)"):
        pieces.region(0, (5,))
    with pytest.raises(LayoutError, match="no rank 1"):
        pieces.region(1, (4,))


def test_overlapping_boxes_make_no_source() -> None:
    Pieces((6, 4), (((0, 0), (3, 4)), ((3, 0), (3, 4)), ((0, 0), (3, 4)), None)).check_source()
    with pytest.raises(LayoutError) as caught:
        Pieces((6, 4), (((0, 0), (3, 4)), ((3, 0), (3, 4)), ((2, 3), (2, 1)))).check_source()
    for part in ("ranks 0 and 2", "(6, 4)", "[0:3, 0:4]", "[2:4, 3:4]"):
        assert part in str(caught.value)
