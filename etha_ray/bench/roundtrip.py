"""``bench roundtrip``: a command that does nothing, from a worker to its agent and back, against a Ray actor call."""

from __future__ import annotations

from functools import partial

from etha_ray.bench.bus import open_bus
from etha_ray.bench.figures import BenchResult, Figure, Ratio, interleaved, median, percentile
from etha_ray.bench.processes import Workers
from etha_ray.bench.ray_baseline import RayCalls, open_ray
from etha_ray.errors import ConfigError

_ROUNDS = 10
_RAY_SHARE = 10
"""Round trips to one call of Ray, which takes many times as long."""
_WARM_UP = 500


def run_roundtrip(count: int = 20_000) -> BenchResult:
    """Measure ``count`` round trips in `_ROUNDS` rounds, in turns with a tenth as many Ray calls.

    Raises `ConfigError` for a count below 100, `BenchError` when a worker fails.
    """
    if count < 100:
        raise ConfigError(f"{count} round trips are too few for percentiles: give at least 100")
    with open_bus(1) as bus, Workers() as others, open_ray(1):
        client, queue, calls = bus.clients[0], others.start("queue", "queue worker"), RayCalls()
        client.call("ping", count=_WARM_UP)
        calls.call(_WARM_UP // _RAY_SHARE)
        samples = interleaved(
            _ROUNDS,
            {
                "bus": lambda: client.call("ping", count=count // _ROUNDS),
                "ray": partial(calls.call, count // _ROUNDS // _RAY_SHARE),
            },
        )
        puts, takes = queue.call("put_and_take", path=str(bus.folder / "alone.lmdb"), count=max(100, count // 10))
    ours, rays = ([second * 1e6 for second in samples[name]] for name in ("bus", "ray"))
    return BenchResult(
        bench="roundtrip",
        figures=[
            Figure("p50_us", median(ours), "round trip to the agent and back", reach=30.0),
            Figure("p99_us", percentile(ours, 99), "the same, 99th percentile"),
            Figure("mean_us", sum(ours) / len(ours), "the same, mean"),
            Figure("queue_put_us", median(puts) * 1e6, "of it, putting a command into the queue, with nobody to wake"),
            Figure("queue_take_us", median(takes) * 1e6, "of it, taking it out; the rest is two wake-ups and the outcome"),
            Figure("ray_p50_us", median(rays), "Ray actor call"),
            Figure("ray_p99_us", percentile(rays, 99), "the same, 99th percentile"),
            Figure("ray_mean_us", sum(rays) / len(rays), "the same, mean"),
            Figure("roundtrips_count", len(ours), "round trips measured"),
        ],
        ratios=[Ratio("ray_call", median(rays) / median(ours), "p50 of a Ray actor call over ours", reach=25.0)],
    )
