"""The short form of `make soak`."""

from __future__ import annotations

from tests.soak.soak import LOOKS, soak
from tests.tensor_bus.cluster import process_cluster


def test_300_syncs_keep_nothing_open_and_little_in_memory() -> None:
    with process_cluster(2) as cluster:
        for course in soak(cluster, 300):
            assert len(set(course.files[LOOKS // 4 :])) == 1, course
            assert course.kib[-1] - course.kib[LOOKS // 4] < 4 << 10, course  # KiB; what leaks a page a sync shows in the long form
