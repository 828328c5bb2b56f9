"""A plan in a few lines of text."""

from __future__ import annotations

from etha_ray.plan.whole import TensorPlan

_TABLE_LIMIT = 16
"""Ranks a side up to which the whole source x target table is printed."""


def explain_plan(plan: TensorPlan, itemsize: int) -> str:
    """A short text about ``plan`` for a terminal: totals, then bytes by source (rows) and target (columns).

    The table is left out where a side has more than 16 ranks.
    """
    crossing = plan.bytes_between(itemsize)
    source, target = plan.source, plan.target
    between_hosts = sum(size for (giver, taker), size in crossing.items() if source.hosts[giver] != target.hosts[taker])
    egress = [0] * source.layout.ranks
    for (giver, _), size in crossing.items():
        egress[giver] += size
    total = sum(egress)
    lines = [
        f"{source.layout}  ->  {target.layout}   shape {plan.shape}, {itemsize} bytes an element",
        f"{_bytes(total)} in {len(plan.routes)} routes, {sum(len(route.boxes) for route in plan.routes)} boxes; "
        f"{_bytes(between_hosts)} between hosts; most from one source {_bytes(max(egress))}, mean {_bytes(total / len(egress))}",
    ]
    if plan.reduction is not None:
        divided = f", divided by {plan.reduction.divisor}" if plan.reduction.divisor > 1 else ""
        lines.append(f"each element is the {plan.reduction.op} of {plan.reduction.count} contributions{divided}")
    if max(len(egress), target.layout.ranks) <= _TABLE_LIMIT:
        rows = [["source", *(f"-> {taker}" for taker in range(target.layout.ranks))]]
        for giver in range(len(egress)):
            sizes = (crossing.get((giver, taker), 0) for taker in range(target.layout.ranks))
            rows.append([str(giver), *(_bytes(size) if size else "." for size in sizes)])
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines += ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    return "\n".join(lines)


def _bytes(size: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.4g} {unit}"
        size /= 1024
    return f"{size:.4g} TiB"
