"""``python -m tests.soak --syncs 10000``: what `make soak` runs. Exits with 1 if memory or open files grow."""

from __future__ import annotations

import argparse
import os
import sys
import time

from rich.console import Console
from rich.table import Table

from tests.soak.soak import soak
from tests.tensor_bus.cluster import process_cluster

_KIB_A_THOUSAND = 8.0  # 8 bytes a sync: half of Python's smallest object


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--syncs", type=int, default=10_000)
    syncs = parser.parse_args().syncs
    # Each thread that allocates while others do gets an arena of its own, once; in one arena nothing grows but what is kept.
    os.environ["MALLOC_ARENA_MAX"] = "1"
    begin = time.monotonic()
    with process_cluster(2) as cluster:
        courses = soak(cluster, syncs)
    table = Table(title=f"{syncs} syncs in {time.monotonic() - begin:.0f} s")
    for column in ("process", "first, MiB", "last, MiB", "KiB per 1000 syncs", "± noise", "open files"):
        table.add_column(column, justify="right")
    bad = False
    for each in courses:
        slope, noise, files = each.slope(syncs), each.noise(syncs), sorted(set(each.files))
        bad |= slope > max(noise, _KIB_A_THOUSAND) or len(files) > 1
        shown = f"{each.kib[0] / 1024:.1f}", f"{each.kib[-1] / 1024:.1f}", f"{slope:.1f}", f"{noise:.1f}"
        table.add_row(each.name, *shown, ", ".join(map(str, files)))
    Console(width=100).print(table)
    return int(bad)


if __name__ == "__main__":
    sys.exit(main())
