"""The short form of `make soak`."""

from __future__ import annotations

from tests.soak.soak import LOOKS, soak
from tests.tensor_bus.cluster import process_cluster


def test_300_syncs_keep_nothing_open_and_little_in_memory() -> None:
    with process_cluster(2) as cluster:
        for course in soak(cluster, 300):
            # A look may fall into a moment at which a process reads a file: what stays open is what the least have.
            thirds = [course.files[LOOKS // 4 * part : LOOKS // 4 * (part + 1)] for part in (1, 2, 3)]
            assert len({min(third) for third in thirds}) == 1, course
            assert course.kib[-1] - course.kib[LOOKS // 4] < 4 << 10, course  # KiB; what leaks a page a sync shows in the long form
