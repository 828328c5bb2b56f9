"""The kernels' text, and the numbers that it and the tables must agree on."""

from __future__ import annotations

from importlib.resources import files

from etha_ray.accelerator.base import Kernel, KernelSource

THREADS = 256
"""Of a block."""
BATCH = 4
"""Loads that a thread has under way: with 16 bytes each, and as few as four blocks on a multiprocessor, enough for HBM's latency."""
TILE = 2048
"""Units that a block takes at a time: 32 KiB of the widest."""
SUM_TILE = 8192
"""Words that a block sums at a time."""
SLOTS = 32
"""Sums that each message has while they are made: threads of a warp add to different ones."""
DIMS = 6
"""Dimensions that a region may have, once those that can be are merged."""
PACK = 4
"""Elements that are cast together where they lie together."""
CAST, IN_PACKS = 16, 32
"""Flags of a region's kind."""

_CONSTANTS = (
    *(("THREADS", THREADS), ("BATCH", BATCH), ("TILE", TILE), ("SUM_TILE", SUM_TILE), ("SLOTS", SLOTS)),
    *(("DIMS", DIMS), ("PACK", PACK), ("IN_PACKS", IN_PACKS)),
)

SOURCE = KernelSource(files(__package__).joinpath("kernels.cu").read_text(encoding="utf-8"), _CONSTANTS)

COPY_REGIONS = Kernel(SOURCE, "copy_regions", THREADS)
SUM_PIECES = Kernel(SOURCE, "sum_pieces", THREADS)
SUM_EDGES = Kernel(SOURCE, "sum_edges", THREADS)
