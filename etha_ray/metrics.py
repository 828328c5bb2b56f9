"""What agents measure, for Ray's metrics: Prometheus scrapes them from every node, and `dashboards/grafana.json` draws them.

An agent tells its observer twice a second what ended, on a thread of its own (`tensor_bus.history`): no transfer waits for a metric.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from etha_ray.tensor_bus.history import PastTransfer

_BATCHES = 32
"""Batches that have a tag of their own; those that come later are "other", or a program that names its batches anew each time would
fill Prometheus."""

_SECONDS = (0.0001, 0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)


@dataclass(frozen=True)
class Metric:
    """One metric as it is given to Ray, which puts ``ray_`` before its name, and ``_total`` behind that of a counter.

    All have the tags ``namespace`` and ``agent``, and ``tags`` on top. Of a histogram Ray keeps counts by bucket; its sum is made from
    the buckets' middles.
    """

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    description: str
    tags: tuple[str, ...] = ()

    @property
    def series(self) -> tuple[str, ...]:
        """What Prometheus calls it."""
        ends = {"counter": ("_total",), "gauge": ("",), "histogram": ("_bucket", "_count", "_sum")}
        return tuple(f"ray_{self.name}{end}" for end in ends[self.kind])


TRANSFER_SECONDS = Metric(
    "etha_ray_transfer_seconds", "histogram", "Seconds from a worker's call to its end, waiting included.", ("direction", "batch")
)
WAIT_SECONDS = Metric("etha_ray_wait_seconds", "histogram", "Seconds of a transfer in which no byte moved.", ("direction", "batch"))
BYTES = Metric("etha_ray_bytes", "counter", "Bytes that workers sent or received.", ("direction", "batch"))
GB_PER_SECOND = Metric(
    "etha_ray_gb_per_second", "gauge", "Speed of the last transfer while bytes moved, in 1e9 bytes a second.", ("direction", "batch")
)
VERSION = Metric("etha_ray_version", "gauge", "Version that the last transfer sent or received.", ("direction", "batch"))
ERRORS = Metric("etha_ray_errors", "counter", "Commands that failed, by the error's class.", ("kind",))
WORKERS = Metric("etha_ray_workers", "gauge", "Workers that the agent serves.")
PAIRS = Metric("etha_ray_pairs", "gauge", "Pairs that its workers are in.")
BATCHES = Metric("etha_ray_batches", "gauge", "Batches that its workers have registered.")

METRICS = (TRANSFER_SECONDS, WAIT_SECONDS, BYTES, GB_PER_SECOND, VERSION, ERRORS, WORKERS, PAIRS, BATCHES)


class RayMetrics:
    """An observer of one agent (`tensor_bus.history.Observer`), inside a Ray actor.

    Args:
        namespace: the pool.
        rank: the agent.
    """

    def __init__(self, namespace: str, rank: int) -> None:
        from ray.util import metrics

        self._common = {"namespace": namespace, "agent": str(rank)}
        self._made: dict[Metric, Any] = {}
        for metric in METRICS:
            keys = ("namespace", "agent", *metric.tags)
            if metric.kind == "histogram":
                made: Any = metrics.Histogram(metric.name, metric.description, boundaries=list(_SECONDS), tag_keys=keys)
            else:
                made = {"counter": metrics.Counter, "gauge": metrics.Gauge}[metric.kind](metric.name, metric.description, tag_keys=keys)
            made.set_default_tags(self._common)
            self._made[metric] = made
        self._batches: set[str] = set()

    def __call__(self, transfers: Sequence[PastTransfer], errors: Mapping[str, int], counts: Mapping[str, int]) -> None:
        """Record what ended, and how much there is now."""
        for past in transfers:
            report = past.report
            if report is None:
                continue  # counted by its error
            tags = {"direction": past.direction, "batch": self._batch(past.batch_id)}
            self._made[TRANSFER_SECONDS].observe(report.seconds, tags)
            self._made[WAIT_SECONDS].observe(max(0.0, report.seconds - report.move_seconds), tags)
            if report.bytes:
                self._made[BYTES].inc(report.bytes, tags)
                self._made[GB_PER_SECOND].set(report.gb_per_s, tags)
            self._made[VERSION].set(report.version, tags)
        for kind, count in errors.items():
            self._made[ERRORS].inc(count, {"kind": kind})
        for metric, what in ((WORKERS, "workers"), (PAIRS, "pairs"), (BATCHES, "batches")):
            self._made[metric].set(counts[what])

    def _batch(self, batch_id: str) -> str:
        if batch_id not in self._batches and len(self._batches) < _BATCHES:
            self._batches.add(batch_id)
        return batch_id if batch_id in self._batches else "other"
