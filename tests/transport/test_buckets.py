from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from etha_ray.transport.buckets import Bucket, Member, Region, cut_into_buckets

regions_of = st.lists(
    st.builds(
        Region,
        size=st.lists(st.integers(0, 9), max_size=4).map(tuple),
        itemsize=st.sampled_from([1, 2, 4, 8, 16]),
    ),
    max_size=12,
)


def elements(member: Member, region: Region) -> range:
    """Where a member's elements lie in its region, in row-major order: a box of consecutive ones is one range."""
    first = 0
    for start, size in zip(member.start, region.size, strict=True):
        first = first * size + start
    return range(first, first + math.prod(member.size))


@given(regions_of, st.integers(1, 600))
def test_every_element_is_in_exactly_one_bucket(regions: list[Region], bucket_size: int) -> None:
    seen: list[list[int]] = [[] for _ in regions]
    for bucket in cut_into_buckets(regions, bucket_size):
        for member in bucket.members:
            region = regions[member.region]
            assert all(s >= 0 and s + n <= size for s, n, size in zip(member.start, member.size, region.size, strict=True))
            assert member.nbytes == math.prod(member.size) * region.itemsize
            seen[member.region].extend(elements(member, region))
    assert [sorted(numbers) for numbers in seen] == [list(range(math.prod(region.size))) for region in regions]


@given(regions_of, st.integers(1, 600))
def test_no_bucket_is_too_large_nor_has_gaps(regions: list[Region], bucket_size: int) -> None:
    for bucket in cut_into_buckets(regions, bucket_size):
        assert bucket.nbytes <= bucket_size or (bucket.is_direct and math.prod(bucket.members[0].size) == 1)
        end = 0
        for member in bucket.members:
            assert member.offset == end
            assert member.offset % regions[member.region].itemsize == 0
            assert member.nbytes > 0
            end += member.nbytes
        assert bucket.nbytes == end == sum(member.nbytes for member in bucket.members)


@given(regions_of, st.integers(1, 600))
def test_small_ones_share(regions: list[Region], bucket_size: int) -> None:
    """No two neighbours of those that share would have fitted into one."""
    shared = [bucket for bucket in cut_into_buckets(regions, bucket_size) if bucket.nbytes <= bucket_size // 2]
    assert len(shared) <= 1


@given(regions_of, st.integers(1, 600))
def test_the_same_regions_give_the_same_buckets(regions: list[Region], bucket_size: int) -> None:
    again = [Region(tuple(region.size), region.itemsize) for region in regions]
    assert cut_into_buckets(regions, bucket_size) == cut_into_buckets(again, bucket_size)


def test_rows_are_kept_whole() -> None:
    """A large tensor is cut along its first dimension, so that a piece is contiguous where the tensor is."""
    assert cut_into_buckets([Region((10, 100), 2)], bucket_size=700) == tuple(
        Bucket((Member(0, (first, 0), (min(3, 10 - first), 100), 0, min(3, 10 - first) * 200),)) for first in (0, 3, 6, 9)
    )


def test_rows_longer_than_a_bucket_are_cut() -> None:
    buckets = cut_into_buckets([Region((2, 5), 4)], bucket_size=8)
    assert sorted((member.start, member.size) for bucket in buckets for member in bucket.members) == [
        ((row, column), (1, min(2, 5 - column))) for row in range(2) for column in (0, 2, 4)
    ]


def test_what_is_empty_is_nowhere() -> None:
    assert cut_into_buckets([Region((3, 0, 2), 4), Region((0,), 1)]) == ()


def test_a_number_is_a_region_too() -> None:
    assert cut_into_buckets([Region((), 8)]) == (Bucket((Member(0, (), (), 0, 8),)),)


def test_ten_thousand_small_regions_are_few_buckets() -> None:
    assert len(cut_into_buckets([Region((4096,), 1)] * 10_000, 4 << 20)) == 10


@pytest.mark.parametrize(("region", "size", "named"), [(Region((1,), 2), 0, "bucket_size is 0"), (Region((1,), 3), 8, "itemsize of 3")])
def test_bad_arguments_are_named(region: Region, size: int, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        cut_into_buckets([region], size)
